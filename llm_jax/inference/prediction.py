"""What a model says of texts: the answers of its objective's predictor, in their order."""

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from llm_jax.core.contracts import Example, Predictor, Record, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.data import documents, encoding
from llm_jax.parallel import hosts
from llm_jax.programs.inference import Inference
from llm_jax.training import evaluation

# Texts that are laid out together: at least so many, and of so many batches if each had a row of
# its own.
LEAST_BLOCK, BLOCK_BATCHES = 1024, 16


class Labeller:
  """Answers for records with the predictor of a program's objective.

  Args:
    program: of the network.
    tokenizer: that of the model.
    encoder: makes arrays of a record.

  Raises:
    ValueError: the objective says nothing of texts.
  """

  def __init__(self, program: Inference, tokenizer: Tokenizer, encoder: encoding.Encoder):
    if program.objective is None or program.objective.predictor is None:
      raise ValueError(
        f'the objective {program.config.objective.get("name")} gives no labels to texts; fine-tune '
        'the run first: --config=configs/classify.py --config.init_from=WORKDIR.'
      )
    self._program, self._tokenizer, self._encoder = program, tokenizer, encoder
    self._predictor: Predictor = program.objective.predictor
    size = program.config.batch_size
    self._block_size = max(LEAST_BLOCK, BLOCK_BATCHES * size)
    self._predict: Callable[..., dict[str, jax.Array]] | None = None

  @property
  def heads(self) -> dict[str, Any]:
    """The heads that answering needs."""
    return self._predictor.heads(self._program.network.model)

  def __call__(self, params: PyTree, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """An answer for each record, as JSON can hold it, in their order.

    Records are read block by block, the next one while the one before is answered.

    Args:
      params: of the network.
      records: as a source yields them, without labels.
    """
    count = cut = 0
    for block in self._ahead(records):
      yield from self._answers(params, block)
      count += len(block.documents)
      cut += block.rows.cut
    if cut:
      logging.warning(
        '%d of %d texts are longer than seq_len=%d allows; their ends were not read.',
        cut,
        count,
        self._program.config.seq_len,
      )

  def _ahead(self, records: Iterable[Record]) -> Iterator['_Block']:
    blocks = _blocks(records, self._block_size)
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='texts') as pool:
      waiting = pool.submit(self._load, blocks)
      while (block := waiting.result()) is not None:
        waiting = pool.submit(self._load, blocks)
        yield block

  def _load(self, blocks: Iterator[list[Record]]) -> '_Block | None':
    records = next(blocks, None)
    if records is None:
      return None
    return _Block(documents.Memory(records, self._encoder, self._tokenizer), self)

  def layout(self, texts: documents.Memory) -> Any:
    """The rows of some texts."""
    return self._predictor.layout(texts, self._program.config.seq_len)

  def _answers(self, params: PyTree, block: '_Block') -> list[dict[str, Any]]:
    if self._predict is None:
      self._predict = hosts.compiled(self._program.predict_step)
    parts: list[list[dict[str, Any]]] = [[] for _ in range(len(block.documents))]
    row = 0
    for batch in evaluation.batches(self._program, block):
      found = jax.device_get(self._predict(params, self._program.put(batch)))
      for number in range(min(self._program.config.batch_size, len(block) - row)):
        arrays = {key: values[number] for key, values in found.items()}
        texts = block.rows.texts(row + number)
        said = self._predictor.answers(arrays, block.rows, row + number)
        for text, answer in zip(texts, said, strict=True):
          parts[text].append(answer)
      row += self._program.config.batch_size
    return [self._predictor.joined(found) for found in parts]


class _Block:
  """Some texts and, as a sequence, the rows that hold them."""

  def __init__(self, texts: documents.Memory, labeller: Labeller):
    self.documents = texts
    self.rows = labeller.layout(texts)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Example:
    return self.rows.example(index, np.random.default_rng(0))


def _blocks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
  """Records, `size` at a time: few enough for any memory, many enough to fill rows."""
  block: list[Record] = []
  for record in records:
    block.append(record)
    if len(block) == size:
      yield block
      block = []
  if block:
    yield block


def record(text: str | Sequence[str] | Mapping[str, Any]) -> Record:
  """A text, a pair of texts or a record as a record."""
  if isinstance(text, str):
    return {'text': text}
  if isinstance(text, Mapping):
    return text
  first, second = text
  return {'text': first, 'pair': second}
