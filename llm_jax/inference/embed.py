"""`--mode=embed`: a vector for each text of a file, several texts a row."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from llm_jax.core.contracts import Source, Tokenizer
from llm_jax.data import pack
from llm_jax.inference import use
from llm_jax.parallel import hosts
from llm_jax.programs import build
from llm_jax.training import evaluation as evaluate

OUTPUTS = ('.npy', '.jsonl')
TILE = 64  # rows are as long as the longest text, rounded up to this: attention costs their square


def run(
  opened: use.Opened,
  source: pathlib.Path,
  target: pathlib.Path,
  pool: str = 'mean',
  normalize: bool = True,
) -> None:
  """Writes the vectors of a file's texts, whole or not at all.

  Args:
    opened: a run or a Hugging Face folder.
    source: .jsonl, an object a line, the text in the field `config.data.text` ('text'); or .txt, a
      text a line.
    target: .npy, [texts, D] float32; or .jsonl, {"text": ..., "embedding": [...]} a line.
    pool: one of `heads.POOLS`.
    normalize: whether the vectors have length 1.

  Raises:
    ValueError: files that cannot be, a text without tokens, a model that cannot pool so.
  """
  if target.suffix not in OUTPUTS or target.is_dir() or not target.absolute().parent.is_dir():
    raise ValueError(
      f'--output={target} must be a {" or ".join(OUTPUTS)} file in a folder that exists.'
    )
  documents = use.texts(source, opened.config.data.get('text') or 'text')
  config = dataclasses.replace(
    opened.config,
    objective={'name': 'embed', 'pool': pool, 'normalize': normalize},
    micro_batches=1,
  )
  ids = _ids(documents, opened.tokenizer, build.create_model(config).causal, config.seq_len)
  length = min(config.seq_len, -(-max(map(len, ids)) // TILE) * TILE)
  plan = pack.best_fit([len(text) for text in ids], length)
  full, least = config.batch_size * (config.seq_len // length), jax.device_count()
  config = dataclasses.replace(
    config, seq_len=length, batch_size=min(full, -(-len(plan) // least) * least)
  )
  rows = _Rows(ids, plan, build.create_objective(config, opened.tokenizer), config.seq_len)
  logging.info(
    '%d texts in %d rows of %d tokens: %.0f%% of the places are used.',
    len(ids),
    len(plan),
    config.seq_len,
    100 * sum(map(len, ids)) / (len(plan) * config.seq_len),
  )
  program = build.build(config, opened.tokenizer, rows[0])
  vectors = _vectors(program, use.load_params(program, opened.origin), rows, len(ids))
  if hosts.primary():
    _write(target, vectors, documents)
  logging.info('%d vectors of %d numbers in %s.', *vectors.shape, target)


class _Rows:
  """Rows of several texts, by a plan."""

  def __init__(self, ids: Sequence[np.ndarray], plan: pack.Plan, objective: Any, seq_len: int):
    self.ids, self.plan, self.objective, self.seq_len = ids, plan, objective, seq_len
    self.slots = int(np.max(np.diff(plan.offsets)))

  def __len__(self) -> int:
    return len(self.plan)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self.objective.lay_out(
      [self.ids[number] for number in self.texts(index)], self.seq_len, self.slots
    )

  def texts(self, index: int) -> list[int]:
    """Which texts a row holds."""
    return [number for number, _, _ in self.plan[index]]


def _ids(documents: Source, tokenizer: Tokenizer, causal: bool, seq_len: int) -> list[np.ndarray]:
  """The ids of each text with what stands around it, cut to a row."""
  before, after = use.template(tokenizer, causal)
  room, found, cut = seq_len - len(before) - len(after), [], 0
  for number in range(len(documents)):
    ids = tokenizer.encode(documents[number]['text'])
    cut += len(ids) > room
    found.append(np.concatenate([before, ids[:room], after]).astype(np.int32))
    if not len(found[-1]):
      raise ValueError(
        f'text {number} of the input is empty: there is nothing to make a vector of.'
      )
  if cut:
    logging.warning(
      '%d of %d texts are longer than seq_len=%d allows; their ends were not read.',
      cut,
      len(found),
      seq_len,
    )
  return found


def _vectors(program: build.Program, params: Any, rows: _Rows, count: int) -> np.ndarray:
  predict, index = evaluate.predictions(program, params, ()), 0
  vectors = np.zeros((count, program.network.model.dim), np.float32)
  for batch in evaluate.batches(program, rows):
    for found in jax.device_get(predict(batch)['vectors']):
      if index < len(rows):  # the last batch is filled up
        texts = rows.texts(index)
        vectors[texts] = found[: len(texts)]
      index += 1
  return vectors


def _write(target: pathlib.Path, vectors: np.ndarray, documents: Source) -> None:
  partial = target.with_name(f'{target.name}.partial')
  with open(partial, 'wb') as file:
    if target.suffix == '.npy':
      np.save(file, vectors)
    else:
      for number, vector in enumerate(vectors):
        line = {'text': documents[number]['text'], 'embedding': [float(x) for x in vector]}
        file.write(json.dumps(line, ensure_ascii=False).encode() + b'\n')
  partial.rename(target)
