"""`--mode=embed`: a vector for each text of a file."""

import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from llm_jax.modes import _command
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.inference.session import Session

POOL = flags.DEFINE_enum(
  'pool',
  None,
  ['mean', 'cls', 'last'],
  'embed: what of a text its vector is; by default what a sentence-transformers folder says, else '
  'the mean.',
)
NORMALIZE = flags.DEFINE_bool(
  'normalize',
  None,
  'embed: vectors of length 1; by default what a sentence-transformers folder says, else yes.',
)
BLOCK = 4096  # texts that are laid out in rows together


def run(command: Command) -> None:
  """Reads --input, writes --output."""
  command.require('input=x.jsonl', 'output=y.npy')
  target = _command.output_path()
  with _command.input_file() as source:
    _check(source, target)  # before a model is opened
    embed(command.session(), source, target, POOL.value, NORMALIZE.value, _command.TEXT.value)


def embed(
  session: 'Session',
  source: pathlib.Path,
  target: pathlib.Path,
  pool: str | None = None,
  normalize: bool | None = None,
  text: str | None = None,
) -> None:
  """Writes the vectors of a file's texts, whole or not at all.

  Args:
    session: a model.
    source: one of `answers.SUFFIXES`.
    target: .npy, [texts, D] float32; or one of `answers.OUTPUTS`, each record again with
      `embedding`. A record that cannot be read is a row of NaN, or has `error`.
    pool, normalize: as in `Session.embed`.
    text: the field with the text, as `answers.Records` has it.

  Raises:
    ValueError: files that are not possible, a model that cannot pool so.
  """
  from llm_jax.inference import answers
  from llm_jax.parallel import hosts

  _check(source, target)
  own = {key: value for key, value in session.config.data.items() if key != 'pair'}
  records = answers.Records(source, own, text)

  def vectors(texts: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    while block := [record['text'] for record in itertools.islice(texts, BLOCK)]:
      for vector in session.embed(block, pool, normalize):
        yield {'embedding': vector}

  lines = records.answered(vectors)
  if not hosts.primary():
    for _ in lines:  # the devices of all processes are needed for each
      pass
    return
  lines = answers.progress(lines, len(records))
  if target.suffix == '.npy':
    _write_array(target, lines)
  else:
    answers.write(target, lines)
  logging.info('%d vectors in %s.', len(records) - records.faults, target)
  records.log_faults()


def _check(source: pathlib.Path, target: pathlib.Path) -> None:
  from llm_jax.inference import answers

  _command.check_input(source)
  _command.check_output(target, ('.npy', *answers.OUTPUTS), source)


def _write_array(target: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
  import numpy as np

  from llm_jax.core import files

  found = [line.get('embedding') if 'error' not in line else None for line in lines]
  (shape,) = {vector.shape for vector in found if vector is not None}
  nothing = np.full(shape, np.nan, np.float32)
  with files.whole_file(target, 'wb') as file:
    np.save(file, np.stack([nothing if vector is None else vector for vector in found]))
