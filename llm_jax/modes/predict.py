"""`--mode=predict`: labels the records of a file, each again with the answer in it."""

import pathlib
from typing import TYPE_CHECKING

from llm_jax.modes import _command
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.inference.records import Records
  from llm_jax.inference.session import Session


def run(command: Command) -> None:
  """Reads --input, writes --output."""
  command.require('input=x.jsonl', 'output=y.jsonl')
  target = _command.output_path()
  with _command.input_file() as source:
    check(source, target)  # before a model is opened
    predict(command.session(), source, target, _command.TEXT.value, _command.PAIR.value)


def predict(
  session: 'Session',
  source: pathlib.Path,
  target: pathlib.Path,
  text: str | None = None,
  pair: str | None = None,
) -> None:
  """Labels the records of a file: each again, with the prediction in it, or with `error`.

  A field that the prediction brings too (`label`, say) is kept as `input_label`. A call that is
  interrupted is gone on with by the same call (`answers.write_answers`).

  Args:
    session: a model whose objective gives answers.
    source: one of `records.SUFFIXES`.
    target: has all answers or is not there; one of `answers.OUTPUTS`.
    text, pair: the fields with the texts, as `records.Records` has them.

  Raises:
    ValueError: an objective that predicts no labels, files that are not possible.
  """
  from llm_jax.inference import answers

  check(source, target)
  made_by = answers.model_key(session.origin, session.config)
  ask = lambda numbered: session.answers(record for _, record in numbered)
  records = read(session, source, text, pair)
  # A record as it is was not looked at yet: what is wrong with it must cost that record alone.
  check_record = session.check_record if records.fields is None else None
  answers.write_answers(records, ask, target, made_by, check_record)


def read(session: 'Session', source: pathlib.Path, text: str | None, pair: str | None) -> 'Records':
  """The records of a file for a model that answers texts or pairs; an objective with an `encode` of
  its own gets each record as it is.
  """
  from llm_jax.data import encoding
  from llm_jax.inference.records import Records
  from llm_jax.programs import assemble

  whole = assemble.encoder(session.config).identity != (encoding.TEXT,)
  return Records(source, session.config.data, text, pair, whole)


def check(source: pathlib.Path, target: pathlib.Path) -> None:
  """Raises ValueError unless the files are possible."""
  from llm_jax.inference import answers

  _command.check_input(source)
  _command.check_output(target, answers.OUTPUTS, source)
