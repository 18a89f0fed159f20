"""`--mode=embed`: a vector for each text of a file."""

import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

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
BLOCK = 1024  # texts that are laid out in rows together


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
  """Writes a vector for each text of a file; a call that is interrupted is gone on with by the same
  call (`answers.write_answers`).

  Args:
    session: a model.
    source: one of `records.SUFFIXES`.
    target: .npy, [texts, D] float32; or one of `answers.OUTPUTS`, each record again with
      `embedding`. A record that cannot be read is a row of NaN, or has `error`.
    pool, normalize: as in `Session.embed`.
    text: the field with the text, as `records.Records` has it.

  Raises:
    ValueError: files that are not possible, a model that cannot pool so.
  """
  from llm_jax.inference import answers
  from llm_jax.inference.records import Records

  _check(source, target)
  own = {key: value for key, value in session.config.data.items() if key != 'pair'}
  records = Records(source, own, text)

  def vectors(numbered: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    while block := [record['text'] for _, record in itertools.islice(numbered, BLOCK)]:
      for vector in session.embed(block, pool, normalize):
        yield {answers.VECTOR: vector}

  made_by = answers.model_key(session.origin, session.config, *session.beside, pool, normalize)
  width = session.program.network.model.options.dim
  answers.write_answers(records, vectors, target, made_by, width=width)


def _check(source: pathlib.Path, target: pathlib.Path) -> None:
  from llm_jax.inference import answers

  _command.check_input(source)
  _command.check_output(target, (answers.VECTORS, *answers.OUTPUTS), source)
