"""`--mode=predict`: labels the records of a file, each again with the answer in it; or chooses
those that are most worth a label by hand. An encoder-decoder writes its answers.
"""

import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.modes import _command, _decoding
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.generation.sampling import Sampling
  from llm_jax.inference.records import Records
  from llm_jax.inference.selection import Selection
  from llm_jax.inference.session import Session

SELECT = flags.DEFINE_integer(
  'select',
  None,
  'predict: only so many records are written, those that are most worth a label: whose answers are '
  'least sure, by --by, the least sure first.',
)
BY = flags.DEFINE_enum(
  'by',
  None,
  ['entropy', 'margin', 'confidence'],
  'predict: with --select, the highest entropy (the default), the smallest margin between the best '
  'class and the second, or the lowest probability of the best.',
)


def run(command: Command) -> None:
  """Reads --input, writes --output."""
  command.require('input=x.jsonl', 'output=y.jsonl')
  target, selection = _command.output_path(), _selection()
  with _command.input_file() as source:
    check(source, target)  # before a model is opened
    text, pair = _command.TEXT.value, _command.PAIR.value
    sampling = _decoding.sampling(temperature=0.0)
    predict(command.session(), source, target, text, pair, selection, sampling)


def predict(
  session: 'Session',
  source: pathlib.Path,
  target: pathlib.Path,
  text: str | None = None,
  pair: str | None = None,
  selection: 'Selection | None' = None,
  sampling: 'Sampling | None' = None,
) -> None:
  """Labels the records of a file: each again, with the prediction in it, or with `error`.

  A field that the prediction brings too (`label`, say) is kept as `input_label`. A call that is
  interrupted is gone on with by the same call (`answers.write_answers`).

  Args:
    session: a model whose objective gives answers.
    source: one of `records.SUFFIXES`.
    target: has all answers or is not there; one of `answers.OUTPUTS`.
    text, pair: the fields with the texts, as `records.Records` has them.
    selection: which records are written; None for all.
    sampling: how the tokens of an encoder-decoder are chosen; None for the most likely ones.

  Raises:
    ValueError: an objective that predicts no labels, files that are not possible, a selection by
      what answers do not have.
  """
  from llm_jax.inference import answers

  check(source, target)
  if session.reads_source:
    _write(session, source, target, text, selection, sampling)
    return
  made_by = answers.model_key(session.origin, session.config, *session.beside)
  ask = lambda numbered: session.answers(record for _, record in numbered)
  records = read(session, source, text, pair)
  if selection is not None:
    predictor = getattr(session.program.objective, 'predictor', None)
    selection.check(predictor, session.config.objective['name'], len(records))
  # A record as it is was not looked at yet: what is wrong with it must cost that record alone.
  check_record = session.check_record if records.fields is None else None
  answers.write_answers(records, ask, target, made_by, check_record, choose=selection)


def _write(
  session: 'Session',
  source: pathlib.Path,
  target: pathlib.Path,
  text: str | None,
  selection: 'Selection | None',
  sampling: 'Sampling | None',
) -> None:
  """Answers in new text, as `prediction`; where several are asked for, all as `predictions`."""
  from llm_jax.generation.sampling import GREEDY
  from llm_jax.inference import answers
  from llm_jax.inference.records import Records

  if selection is not None:
    raise ValueError('--select chooses by how sure an answer is, and new text does not say it.')
  how = sampling or GREEDY
  own = {key: value for key, value in session.config.data.items() if key != 'pair'}

  def ask(numbered: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    prompts = ((number, record['text']) for number, record in numbered)
    written = session.completions(prompts, how)
    each = how.num_return_sequences
    while texts := list(itertools.islice(written, each)):
      yield {'prediction': texts[0]} | ({'predictions': texts} if each > 1 else {})

  made_by = answers.model_key(session.origin, session.config, *session.beside, how)
  check_record = lambda record: session.check_prompt(record['text'], how)
  answers.write_answers(Records(source, own, text), ask, target, made_by, check_record)


def _selection() -> 'Selection | None':
  from llm_jax.inference.selection import Selection

  if SELECT.value is None:
    if BY.value is not None:
      raise ValueError(f'--by={BY.value} says by what --select chooses; give --select=COUNT too.')
    return None
  return Selection(SELECT.value, BY.value or 'entropy')


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
