"""`--mode=predict`: labels the texts of a file, each line again with the answer in it."""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import logging

from llm_jax.modes import _command
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.inference.session import Session


def run(command: Command) -> None:
  """Reads --input, writes --output."""
  command.require('input=x.jsonl', 'output=y.jsonl')
  source, target = _command.input_file(), _command.output_path()
  _check(source, target)  # before a model is opened
  predict(command.session(), source, target)


def predict(session: 'Session', source: pathlib.Path, target: pathlib.Path) -> None:
  """Labels the texts of a jsonl file: each line again, with the prediction in it.

  The text stands in the field that the run was trained on (`text` by default), the second of a pair
  likewise; an objective with an `encode` of its own gets each line as it is. A field that the
  prediction brings too (`label`, say) is kept as `input_label`. A line that cannot be read has
  `error` in place of a prediction.

  Answers are written as they come, to a file beside `target` that ends in `.partial`. A call that
  is interrupted leaves it; the next one with the same input and the same model goes on from there.

  Args:
    session: a model whose objective gives answers.
    source: the lines.
    target: has all answers or is not there.

  Raises:
    ValueError: an objective that predicts no labels, files that are not possible.
  """
  from llm_jax.parallel import hosts

  _check(source, target)
  partial = target.with_name(f'{target.name}.{_key(session, source)}.partial')
  done = hosts.agree(lambda: _answered(partial))
  lines = _Lines(session, source, done)
  answers = session.answers(lines)
  if not hosts.primary():
    for _ in answers:  # the devices of all processes are needed for each
      pass
    return
  if done:
    logging.info('%d answers are in %s; going on after them.', done, partial)
  try:
    with open(partial, 'ab') as file:
      for line in lines.answered(answers):
        file.write(_encoded(line))
  except BaseException:
    if partial.stat().st_size:
      logging.error('Interrupted: the answers so far are in %s; the same call goes on.', partial)
    else:
      partial.unlink()
    raise
  if lines.faults and len(lines.faults) == len(lines) - done:
    partial.unlink()
    raise ValueError(f'no line of --input={source} can be read; {lines.faults[done]}')
  partial.replace(target)
  logging.info('%d predictions in %s.', len(lines) - len(lines.faults), target)
  lines.log_faults()


class _Lines:
  """The records of a file from one line on, and where a line has none.

  Args:
    session: says what a record is.
    source: the file.
    first: how many lines are left out.

  Attributes:
    faults: what is wrong with a line, by its index.
  """

  def __init__(self, session: 'Session', source: pathlib.Path, first: int):
    from llm_jax.data import encoding
    from llm_jax.data.sources import jsonl
    from llm_jax.programs import assemble

    data = session.config.data
    self._as_it_is = assemble.encoder(session.config).identity != (encoding.TEXT,)
    self._lines = jsonl.Source(str(source), data.get('text') or 'text', data.get('pair'))
    self._first, self._count = first, len(self._lines)  # an error for an empty file
    self.faults: dict[int, str] = {}

  def __len__(self) -> int:
    return self._count

  def __iter__(self) -> Iterator[dict[str, Any]]:
    read = self._lines.values if self._as_it_is else self._lines.__getitem__
    for index in range(self._first, self._count):
      try:
        record = read(index)
      except ValueError as error:
        self.faults[index] = str(error)
      else:
        yield record

  def answered(self, answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each line with its answer, or with its fault."""
    index = self._first
    for answer in answers:
      while index in self.faults:
        yield self._faulty(index)
        index += 1
      yield _merged(self._lines.values(index), answer)
      index += 1
    for rest in range(index, self._count):
      yield self._faulty(rest)

  def log_faults(self) -> None:
    """Says how many lines could not be read, and what is wrong with the first."""
    if self.faults:
      first = self.faults[min(self.faults)]
      logging.warning('%d lines could not be read, the first: %s', len(self.faults), first)

  def _faulty(self, index: int) -> dict[str, Any]:
    try:
      line = self._lines.values(index)
    except ValueError:  # not even JSON
      line = {}
    return _merged(line, {'error': self.faults[index]})


def _check(source: pathlib.Path, target: pathlib.Path) -> None:
  if source.suffix != '.jsonl' or not source.is_file():
    raise ValueError(f'--input={source} must be one .jsonl file that exists.')
  _command.check_output(target)


def _key(session: 'Session', source: pathlib.Path) -> str:
  """Changes whenever the input or the model could."""
  digest = hashlib.sha256(repr(session.config).encode())
  weights = [*session.origin.glob('checkpoints/*/seal.json'), *session.origin.glob('*.safetensors')]
  for path in [source, *sorted(weights)]:
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


def _merged(line: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
  kept = {f'input_{key}' if key in answer else key: value for key, value in line.items()}
  return kept | answer


def _encoded(line: dict[str, Any]) -> bytes:
  """A line of JSON: a number that is not finite is null, half of a surrogate pair, which UTF-8 does
  not have, an escape.
  """
  try:
    text = json.dumps(line, ensure_ascii=False, allow_nan=False)
  except ValueError:
    text = json.dumps(_nulled(line), ensure_ascii=False)
  try:
    return text.encode() + b'\n'
  except UnicodeEncodeError:
    return json.dumps(json.loads(text)).encode() + b'\n'


def _nulled(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _nulled(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_nulled(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
