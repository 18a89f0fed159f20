"""What a model says of texts: the answers of its objective's predictor, in their order."""

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from llm_jax.core.contracts import Example, Predictor, Record, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.data import documents, encoding, pipeline
from llm_jax.parallel import hosts, shapes
from llm_jax.programs.inference import Inference

# Texts that are laid out together: at least so many, and of so many batches if each had a row of
# its own.
LEAST_BLOCK, BLOCK_BATCHES = 1024, 16


class Labeller:
  """Answers for records with the predictor of a program's objective.

  Args:
    program: of the network.
    tokenizer: that of the model.
    encoder: makes arrays of a record.
    few: whether batches have one of few shapes (`parallel.shapes`), for which `warm` compiles; rows
      must hold one text each, if a text is to get the same answer to the bit in any company.

  Raises:
    ValueError: the objective says nothing of texts.
  """

  def __init__(
    self,
    program: Inference,
    tokenizer: Tokenizer,
    encoder: encoding.Encoder,
    few: bool = False,
  ):
    if program.objective is None or program.objective.predictor is None:
      raise ValueError(
        f'the objective {program.config.objective.get("name")} gives no labels to texts; fine-tune '
        'the run first: --config=configs/classify.py --config.init_from=WORKDIR.'
      )
    self._program, self._tokenizer, self._encoder = program, tokenizer, encoder
    self._few = few
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

    Records are read block by block, the next one while the one before is answered; where batches
    have few shapes, all at once.

    Args:
      params: of the network.
      records: as a source yields them, without labels.
    """
    if self._few:
      yield from self._by_length(params, list(records))
      return
    count = cut = 0
    for block in self._ahead(records):
      yield from self._answers(params, block)
      count += len(block.documents)
      cut += block.rows.cut
    self._log_cut(cut, count)

  def _log_cut(self, cut: int, count: int) -> None:
    logging.log_if(
      logging.WARNING,
      '%d of %d texts are longer than seq_len=%d allows; their ends were not read.',
      cut > 0,
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

  def layout(self, texts: documents.Memory, seq_len: int | None = None) -> Any:
    """The rows of some texts, as long as the program's by default."""
    return self._predictor.layout(texts, seq_len or self._program.config.seq_len)

  def batch_size(self, length: int | None) -> int:
    """Rows of a batch of rows of one of few lengths, or as long as the program's."""
    return (
      self._program.config.batch_size
      if length is None
      else shapes.rows(self._program.mesh, length, self._program.config.batch_size)
    )

  def warm(self, params: PyTree, sample: Record) -> None:
    """Compiles for all lengths of rows, where they are few.

    Args:
      params: of the network.
      sample: a record as short as any.
    """
    texts = documents.Memory([sample], self._encoder, self._tokenizer)
    for length in shapes.lengths(self._program.mesh, self._program.config.seq_len):
      self._answers(params, _Block(texts, self, length))

  def _by_length(self, params: PyTree, records: list[Record]) -> list[dict[str, Any]]:
    """Answers, each of a row whose length goes by its record."""
    groups: dict[int, list[int]] = {}
    for number, record in enumerate(records):
      groups.setdefault(self._length(record), []).append(number)
    found: list[dict[str, Any]] = [{}] * len(records)
    cut = 0
    for length, numbers in groups.items():
      own = [records[number] for number in numbers]
      block = _Block(documents.Memory(own, self._encoder, self._tokenizer), self, length)
      cut += block.rows.cut
      for number, answer in zip(numbers, self._answers(params, block), strict=True):
        found[number] = answer
    self._log_cut(cut, len(records))
    return found

  def _length(self, record: Record) -> int:
    """The shortest rows that hold a record as the program's do: no more is cut, in as many rows."""
    texts = documents.Memory([record], self._encoder, self._tokenizer)
    *fewer, most = shapes.lengths(self._program.mesh, self._program.config.seq_len)
    whole = self.layout(texts, most)
    for length in fewer:
      try:
        rows = self.layout(texts, length)
      except ValueError:  # too short for what must be whole
        continue
      if (len(rows), rows.cut) == (len(whole), whole.cut):
        return length
    return most

  def _answers(self, params: PyTree, block: '_Block') -> list[dict[str, Any]]:
    if self._predict is None:
      self._predict = hosts.compiled(self._program.predict_step)
    parts: list[list[dict[str, Any]]] = [[] for _ in range(len(block.documents))]
    row, size = 0, block.batch_size
    for batch in pipeline.padded_batches(block, size, hosts.rows(self._program.mesh, size)):
      found = jax.device_get(self._predict(params, self._program.put(batch)))
      for number in range(min(size, len(block) - row)):
        arrays = {key: values[number] for key, values in found.items()}
        texts = block.rows.texts(row + number)
        said = self._predictor.answers(arrays, block.rows, row + number)
        for text, answer in zip(texts, said, strict=True):
          parts[text].append(answer)
      row += size
    return [self._predictor.joined(found) for found in parts]


class _Block:
  """Some texts and, as a sequence, the rows that hold them, of this length, or as long as the
  program's.
  """

  def __init__(self, texts: documents.Memory, labeller: Labeller, length: int | None = None):
    self.documents = texts
    self.rows = labeller.layout(texts, length)
    self.batch_size = labeller.batch_size(length)

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
