"""`--mode=predict`: labels the texts of a file, each line again with the answer in it."""

import json
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
  predict(command.session(), _command.input_file(), _command.output_path())


def predict(session: 'Session', source: pathlib.Path, target: pathlib.Path) -> None:
  """Labels the texts of a jsonl file: each line again, with the prediction in it.

  The text stands in the field that the run was trained on (`text` by default), the second of a pair
  likewise; an objective with an `encode` of its own gets each line as it is. A field that the
  prediction brings too (`label`, say) is kept as `input_label`.

  Args:
    session: a model whose objective gives answers.
    source: the lines.
    target: written whole or not at all.

  Raises:
    ValueError: an objective that predicts no labels, a line that is not as it should be.
  """
  from llm_jax.core import files
  from llm_jax.parallel import hosts

  if source.suffix != '.jsonl' or not source.is_file():
    raise ValueError(f'--input={source} must be one .jsonl file that exists.')
  _command.check_output(target)
  answers = session.answers(_records(session, source))
  if not hosts.primary():
    for _ in answers:  # the devices of all processes are needed for each
      pass
    return
  count = 0
  with files.whole_file(target) as file:
    for answer, line in zip(answers, _lines(source), strict=True):
      file.write(json.dumps(_merged(line, answer), ensure_ascii=False) + '\n')
      count += 1
  logging.info('%d predictions in %s.', count, target)


def _records(session: 'Session', source: pathlib.Path) -> Iterator[dict[str, Any]]:
  from llm_jax.data import encoding
  from llm_jax.data.sources import jsonl
  from llm_jax.programs import assemble

  if assemble.encoder(session.config).identity != (encoding.TEXT,):
    yield from _lines(source)
    return
  data = session.config.data
  lines = jsonl.Source(str(source), data.get('text') or 'text', data.get('pair'))
  yield from (lines[index] for index in range(len(lines)))


def _lines(source: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The JSON objects of a file; ValueError, with the line's number, for what is none."""
  with open(source, encoding='utf-8-sig', newline='\n') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        yield json.loads(line)
      except ValueError as error:
        raise ValueError(f'{source}:{number}: not a JSON object ({error}).') from error


def _merged(line: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
  kept = {f'input_{key}' if key in answer else key: value for key, value in line.items()}
  return kept | answer
