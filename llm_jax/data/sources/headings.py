"""A corpus with entities on every machine: the lines of the Python standard library that define or
import something, and what the names in them are.
"""

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from llm_jax.data.sources import stdlib

_MOST_WORDS = 40
_LINE = re.compile(
  r'^[ \t]*(?:(?:async )?def \w+\(.*:|class \w.*:|import [\w., ]+|from [\w.]+ import .*)$',
  re.MULTILINE,
)
_WORDS = re.compile(r'\w+|[^\w\s]')


class Source:
  """Each line once, as `words` and `tags` in IOB2: functions and their parameters, classes, modules
  and the names that come from them.

  Reading takes a few seconds, when the records are first asked for.
  """

  def __init__(self):
    self.library = stdlib.Source()
    known = repr((self.library.fingerprint, _MOST_WORDS))
    self.fingerprint = hashlib.sha256(known.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._lines)

  def __getitem__(self, index: int) -> dict[str, Any]:
    words = _WORDS.findall(self._lines[index])
    return {'words': words, 'tags': tags(words)}

  @functools.cached_property
  def _lines(self) -> list[str]:
    found: dict[str, None] = {}
    for file in self.library.files:
      text = self.library.read(file).decode('utf-8', 'replace')
      found.update(dict.fromkeys(match[0].strip() for match in _LINE.finditer(text)))
    return [line for line in found if 1 < len(_WORDS.findall(line)) <= _MOST_WORDS]


def tags(words: Sequence[str]) -> list[str]:
  """The tag of each word of a line.

  Example:
    >>> tags(['import', 'os', '.', 'path'])
    ['O', 'B-module', 'I-module', 'I-module']
  """
  first = 1 if words[0] == 'async' else 0
  kinds = {'def': _function, 'class': _class, 'import': _imported, 'from': _imported}
  return ['O'] * first + list(kinds[words[first]](words[first:]))


def _function(words: Sequence[str]) -> Iterator[str]:
  depth, before = 0, ''
  for number, word in enumerate(words):
    named = depth == 1 and before in ('(', ',', '*') and word.isidentifier()
    yield 'B-function' if number == 1 else 'B-parameter' if named else 'O'
    depth += (word in '([{') - (word in ')]}')
    before = word


def _class(words: Sequence[str]) -> Iterator[str]:
  found = _dotted(words, dict.fromkeys(('class', '(', ','), 'class'))
  for tag, after in zip(found, [*words[1:], ''], strict=True):
    yield 'O' if after == '=' else tag  # metaclass=...


def _imported(words: Sequence[str]) -> Iterator[str]:
  kind = 'module'
  for number, word in enumerate(words):
    if number and word == 'import':  # of `from ... import`
      yield from _dotted(words[:number], {'from': 'module'})
      yield from _dotted(words[number:], dict.fromkeys(('import', ',', '('), 'name'))
      return
  yield from _dotted(words, dict.fromkeys(('import', ','), kind))


def _dotted(words: Sequence[str], opening: dict[str, str]) -> Iterator[str]:
  """Names with dots in them, each after one of the words that open it."""
  kind, before = '', ''
  for word in words:
    if before in opening and (word.isidentifier() or word == '.'):
      kind = opening[before]
      yield f'B-{kind}'
    elif kind and (word == '.' or before == '.'):
      yield f'I-{kind}'
    else:
      kind = ''
      yield 'O'
    before = word
