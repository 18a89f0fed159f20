"""`--mode=predict`: labels the records of a file, each again with the answer in it."""

import hashlib
import pathlib
from typing import TYPE_CHECKING

from absl import logging

from llm_jax.modes import _command
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.inference.answers import Records
  from llm_jax.inference.session import Session


def run(command: Command) -> None:
  """Reads --input, writes --output."""
  command.require('input=x.jsonl', 'output=y.jsonl')
  target = _command.output_path()
  with _command.input_file() as source:
    _check(source, target)  # before a model is opened
    predict(command.session(), source, target, _command.TEXT.value, _command.PAIR.value)


def predict(
  session: 'Session',
  source: pathlib.Path,
  target: pathlib.Path,
  text: str | None = None,
  pair: str | None = None,
) -> None:
  """Labels the records of a file: each again, with the prediction in it.

  An objective with an `encode` of its own gets each record as it is. A field that the prediction
  brings too (`label`, say) is kept as `input_label`. A record that cannot be read has `error` in
  place of a prediction.

  Answers are written as they come, to a file of JSON lines beside `target` that ends in `.partial`.
  A call that is interrupted leaves it; the next one with the same input and the same model goes on
  from there.

  Args:
    session: a model whose objective gives answers.
    source: one of `answers.SUFFIXES`.
    target: has all answers or is not there; one of `answers.OUTPUTS`.
    text, pair: the fields with the texts, as `answers.Records` has them.

  Raises:
    ValueError: an objective that predicts no labels, files that are not possible.
  """
  from llm_jax.data import encoding
  from llm_jax.inference import answers
  from llm_jax.parallel import hosts
  from llm_jax.programs import assemble

  _check(source, target)
  whole = assemble.encoder(session.config).identity != (encoding.TEXT,)
  records = answers.Records(source, session.config.data, text, pair, whole)
  partial = target.with_name(f'{target.name}.{_key(session, records)}.partial')
  done = hosts.agree(lambda: _answered(partial))
  lines = records.answered(session.answers, done)
  if not hosts.primary():
    for _ in lines:  # the devices of all processes are needed for each
      pass
    return
  if done:
    logging.info('%d answers are in %s; going on after them.', done, partial)
  try:
    with open(partial, 'ab') as file:
      for line in answers.progress(lines, len(records), done):
        file.write(answers.encoded(line))
  except BaseException:
    if partial.stat().st_size:
      logging.error('Interrupted: the answers so far are in %s; the same call goes on.', partial)
    else:
      partial.unlink()
    raise
  if target.suffix == '.jsonl':
    partial.replace(target)
  else:
    with open(partial, 'rb') as file:
      answers.convert(file, target)
    partial.unlink()
  logging.info('%d predictions in %s.', len(records) - records.faults, target)
  records.log_faults()


def _check(source: pathlib.Path, target: pathlib.Path) -> None:
  from llm_jax.inference import answers

  _command.check_input(source)
  _command.check_output(target, answers.OUTPUTS, source)


def _key(session: 'Session', records: 'Records') -> str:
  """Changes whenever the input or the model could."""
  digest = hashlib.sha256(repr((session.config, records.fields)).encode())
  weights = [*session.origin.glob('checkpoints/*/seal.json'), *session.origin.glob('*.safetensors')]
  for path in [records.path, *sorted(weights)]:
    stat = path.stat()
    digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
  return digest.hexdigest()[:8]


def _answered(partial: pathlib.Path) -> int:
  """How many answers an interrupted call has left; half a line is cut off."""
  if not partial.is_file():
    return 0
  whole = end = 0
  with open(partial, 'rb+') as file:
    for line in file:
      if line.endswith(b'\n'):
        whole, end = whole + 1, end + len(line)
    file.truncate(end)
  return whole
