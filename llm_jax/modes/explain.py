"""`--mode=explain`: which tokens of each text of a file the answer rests on."""

import pathlib
import statistics
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from llm_jax.modes import _command, predict
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.inference.explanation import Options
  from llm_jax.inference.session import Session

METHOD = flags.DEFINE_enum(
  'method',
  'integrated_gradients',
  ['integrated_gradients', 'occlusion'],
  'explain: how tokens get their scores.',
)
UNIT = flags.DEFINE_enum('unit', 'token', ['token', 'word'], 'explain: what gets a score.')
IG_STEPS = flags.DEFINE_integer(
  'ig_steps', 32, 'explain: points at which integrated gradients are taken.'
)


def run(command: Command) -> None:
  """Reads --input, writes --output."""
  command.require('input=x.jsonl', 'output=y.jsonl')
  from llm_jax.inference.explanation import Options

  options = Options(METHOD.value, UNIT.value, IG_STEPS.value)
  target = _command.output_path()
  with _command.input_file() as source:
    predict.check(source, target)  # before a model is opened
    explain(command.session(), source, target, options, _command.TEXT.value, _command.PAIR.value)


def explain(
  session: 'Session',
  source: pathlib.Path,
  target: pathlib.Path,
  options: 'Options',
  text: str | None = None,
  pair: str | None = None,
) -> None:
  """Writes an explanation per record of a file, and logs what they are worth; a call that is
  interrupted is gone on with by the same call (`answers.write_answers`).

  Args:
    session: a classifier or regressor.
    source: one of `records.SUFFIXES`.
    target: one of `answers.OUTPUTS`: each record with what `Session.explain` says of it.
    options: how texts are explained.
    text, pair: the fields with the texts, as `records.Records` has them.

  Raises:
    ValueError: files that are not possible, a model that gives no labels.
  """
  from llm_jax.inference import answers

  predict.check(source, target)
  worth: list[dict[str, Any]] = []

  def ask(numbered: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    for explained in session.explanations((record for _, record in numbered), options):
      worth.append({key: explained[key] for key in ('score', 'baseline', 'sum', 'deletion')})
      yield explained

  made_by = answers.model_key(session.origin, session.config, *session.beside, options)
  answers.write_answers(predict.read(session, source, text, pair), ask, target, made_by)
  if worth:  # there is nothing to say of those that an interrupted call wrote
    _log_worth(worth, options.method)


def _log_worth(explained: list[dict[str, Any]], method: str) -> None:
  """How much faster the answers fall than in random orders, and how complete gradients are."""
  by_score, random = (
    statistics.fmean(answer for e in explained for answer in e['deletion'][name])
    for name in ('by_score', 'random')
  )
  logging.info(
    'Deletion curve of %d texts, mean answer: %.4f with the highest scores masked first, %.4f in '
    'random orders; the lower, the more the scores say.',
    len(explained),
    by_score,
    random,
  )
  if method == 'integrated_gradients':
    errors = [abs(e['sum'] - (e['score'] - e['baseline'])) for e in explained]
    logging.info(
      'Completeness: the sum of scores is off by %.1e at most; more --ig_steps bring it nearer.',
      max(errors),
    )
