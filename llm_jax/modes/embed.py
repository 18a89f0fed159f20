"""`--mode=embed`: a vector for each text of a file."""

import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags, logging

from llm_jax.modes import _command
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  import numpy as np

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
OUTPUTS = ('.npy', '.jsonl')


def run(command: Command) -> None:
  """Reads --input, writes --output."""
  command.require('input=x.jsonl', 'output=y.npy')
  embed(
    command.session(),
    _command.input_file(),
    _command.output_path(),
    POOL.value,
    NORMALIZE.value,
  )


def embed(
  session: 'Session',
  source: pathlib.Path,
  target: pathlib.Path,
  pool: str | None = None,
  normalize: bool | None = None,
) -> None:
  """Writes the vectors of a file's texts, whole or not at all.

  Args:
    session: a model.
    source: .jsonl, an object per line, the text in the field `config.data.text` ('text'); or .txt,
      a text per line.
    target: .npy, [texts, D] float32; or .jsonl, {"text": ..., "embedding": [...]} per line.
    pool, normalize: as in `Session.embed`.

  Raises:
    ValueError: files that are not possible, a model that cannot pool so.
  """
  from llm_jax.parallel import hosts

  _command.check_output(target, OUTPUTS)
  texts = read_texts(source, session.config.data.get('text') or 'text')
  vectors = session.embed(texts, pool, normalize)
  if hosts.primary():
    _write(target, vectors, texts)
  logging.info('%d vectors of %d numbers in %s.', *vectors.shape, target)


def read_texts(source: pathlib.Path, field: str) -> list[str]:
  """The texts of one file: .jsonl, in the field of that name; or .txt, one per line, empty lines
  included, so that the answers stand in the lines of their texts.

  Raises:
    ValueError: no such file, a line that cannot be read.
  """
  from llm_jax.data.sources import jsonl

  if source.suffix not in ('.jsonl', '.txt') or not source.is_file():
    raise ValueError(f'--input={source} must be a .jsonl or .txt file that exists.')
  if source.suffix == '.jsonl':
    lines = jsonl.Source(str(source), field)
    return [lines[index]['text'] for index in range(len(lines))]
  texts = []
  for number, line in enumerate(source.read_bytes().splitlines(), 1):
    try:
      texts.append(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
    except UnicodeDecodeError as error:
      raise ValueError(f'{source}:{number}: not UTF-8 ({error.reason}).') from error
  if not texts:
    raise ValueError(f'--input={source} has no line.')
  return texts


def _write(target: pathlib.Path, vectors: 'np.ndarray', texts: Sequence[str]) -> None:
  import numpy as np

  from llm_jax.core import files

  with files.whole_file(target, 'wb') as file:
    if target.suffix == '.npy':
      np.save(file, vectors)
      return
    for text, vector in zip(texts, vectors, strict=True):
      line = {'text': text, 'embedding': vector.tolist()}
      file.write(json.dumps(line, ensure_ascii=False).encode() + b'\n')
