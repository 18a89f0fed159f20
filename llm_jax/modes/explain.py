"""`--mode=explain`: which tokens of each text of a file the answer rests on."""

import json
import pathlib
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from llm_jax.modes import _command
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
  source, target = _command.input_file(), _command.output_path()
  _check(source, target)  # before a model is opened
  explain(command.session(), source, target, options)


def explain(
  session: 'Session', source: pathlib.Path, target: pathlib.Path, options: 'Options'
) -> None:
  """Writes an explanation per line of a file, whole or not at all, and logs what they are worth.

  Args:
    session: a classifier or regressor.
    source: .jsonl, texts and pairs in the fields that the run was trained on.
    target: .jsonl, what `Session.explain` says of each line.
    options: how texts are explained.

  Raises:
    ValueError: files that are not possible, a line that cannot be read, a model that gives no
      labels.
  """
  from llm_jax.core import files
  from llm_jax.parallel import hosts

  _check(source, target)
  explanations = session.explanations(_records(session, source), options)
  if not hosts.primary():
    for _ in explanations:  # the devices of all processes are needed for each
      pass
    return
  kept = []
  with files.whole_file(target) as file:
    for explained in explanations:
      file.write(json.dumps(explained, ensure_ascii=False) + '\n')
      kept.append({key: explained[key] for key in ('score', 'baseline', 'sum', 'deletion')})
  logging.info('%d explanations in %s.', len(kept), target)
  _log_worth(kept, options.method)


def _records(session: 'Session', source: pathlib.Path) -> Iterator[dict[str, Any]]:
  from llm_jax.data import encoding
  from llm_jax.data.sources import jsonl
  from llm_jax.programs import assemble

  data = session.config.data
  lines = jsonl.Source(str(source), data.get('text') or 'text', data.get('pair'))
  as_it_is = assemble.encoder(session.config).identity != (encoding.TEXT,)
  read = lines.values if as_it_is else lines.__getitem__
  return (read(index) for index in range(len(lines)))


def _check(source: pathlib.Path, target: pathlib.Path) -> None:
  if source.suffix != '.jsonl' or not source.is_file():
    raise ValueError(f'--input={source} must be one .jsonl file that exists.')
  _command.check_output(target, ('.jsonl',))


def _log_worth(explained: list[dict[str, Any]], method: str) -> None:
  """How much faster the answers fall than in random orders, and how complete gradients are."""
  by_score, random = (
    statistics.fmean(answer for e in explained for answer in e['deletion'][name])
    for name in ('by_score', 'random')
  )
  logging.info(
    'Deletion curve, mean answer: %.4f with the highest scores masked first, %.4f in random '
    'orders; the lower, the more the scores say.',
    by_score,
    random,
  )
  if method == 'integrated_gradients':
    errors = [abs(e['sum'] - (e['score'] - e['baseline'])) for e in explained]
    logging.info(
      'Completeness: the sum of scores is off by %.1e at most; more --ig_steps bring it nearer.',
      max(errors),
    )
