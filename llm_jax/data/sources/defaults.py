"""A corpus of questions on every machine: what a parameter of a function of the Python standard
library is by default, by the lines that define the function and its neighbours.
"""

import ast
import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llm_jax.data.sources import stdlib

_LINES = 3  # of a context
_LINE = re.compile(r'^[ \t]*def \w+\(.*\)(?: *->.*)?:[ \t]*$', re.MULTILINE)
_MOST_CHARACTERS = 160  # of a line


class Parameter(NamedTuple):
  """A parameter in a line; its default and the first character of that, or None."""

  function: str
  name: str
  default: str | None
  start: int | None


class Source:
  """A question per default as records with `question`, `context` and `answers`, and one per
  function about a parameter without a default, whose `answers` are none.

  Reading takes a few seconds, when the records are first asked for.
  """

  def __init__(self):
    self.library = stdlib.Source()
    known = repr((self.library.fingerprint, _LINES, _MOST_CHARACTERS))
    self.fingerprint = hashlib.sha256(known.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._records[index]

  @functools.cached_property
  def _records(self) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for file in self.library.files:
      text = self.library.read(file).decode('utf-8', 'replace')
      lines = [match[0].strip() for match in _LINE.finditer(text)]
      lines = [line for line in lines if line.isascii() and len(line) <= _MOST_CHARACTERS]
      for first in range(0, len(lines), _LINES):
        for record in questions(lines[first : first + _LINES]):
          found.setdefault(record['question'] + record['context'], record)
    return list(found.values())


def questions(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
  """The records of a few lines that define functions; of two functions of one name, none.

  Example:
    >>> [record] = questions(['def get(key, default=None):', 'def close():'])
    >>> record['question'], record['answers']
    ('What is default in get by default?', [{'text': 'None', 'answer_start': 21}])
  """
  context, start = '\n'.join(lines), 0
  for line in lines:
    found = list(parameters(line))
    given = [parameter for parameter in found if parameter.default is not None]
    without = [parameter for parameter in found if parameter.default is None][1:2]
    # Two functions of one name cannot be told apart.
    asked = bool(given) and context.count(f'def {found[0].function}(') == 1
    for parameter in given + without if asked else []:
      answers = []
      if parameter.default is not None:
        answers = [{'text': parameter.default, 'answer_start': start + parameter.start}]
      question = f'What is {parameter.name} in {parameter.function} by default?'
      yield {'question': question, 'context': context, 'answers': answers}
    start += len(line) + 1


def parameters(line: str) -> Iterator[Parameter]:
  """The parameters of the function that a line of ASCII defines; none where it is no Python."""
  try:
    (function,) = ast.parse(f'{line} pass').body
  except (SyntaxError, ValueError):
    return
  given = function.args
  named = [*given.posonlyargs, *given.args]
  values = [None] * (len(named) - len(given.defaults)) + given.defaults + given.kw_defaults
  for name, value in zip([*named, *given.kwonlyargs], values, strict=True):
    text = None if value is None else ast.get_source_segment(line, value)
    start = None if value is None else value.col_offset
    yield Parameter(function.name, name.arg, text, start)
