"""A corpus with entities on every machine: the lines of the Python standard library that define or
import something, and what the names in them are.
"""

import functools
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from llm_jax.data.sources import stdlib

VIEWS = ('tags', 'relations', 'roles')
_MOST_WORDS = 40
_LINE = re.compile(
  r'^[ \t]*(?:(?:async )?def \w+\(.*:|class \w.*:|import [\w., ]+|from [\w.]+ import .*)$',
  re.MULTILINE,
)
_WORDS = re.compile(r'\w+|[^\w\s]')
# What the first name of a line is to another one, and the other way round.
_RELATIONS = {
  ('function', 'parameter'): ('takes', 'is taken by'),
  ('class', 'class'): ('extends', 'is extended by'),
  ('module', 'name'): ('offers', 'is offered by'),
}


class Source:
  """Each line once, as `words` and `tags` in IOB2: functions and their parameters, classes, modules
  and the names that come from them.

  Reading takes a few seconds, when the records are first asked for.

  Args:
    view: what of these a record has: their 'tags'; 'roles', the words of the first as `predicate`
      and the tags of the others; 'relations', the line as `text`, the characters of two of them as
      `head` and `tail`, and as `label` what they are to each other. Lines that have one alone are
      left out but for 'tags'.
  """

  def __init__(self, view: str = 'tags'):
    if view not in VIEWS:
      raise ValueError(f'config.data.view={view!r} must be one of {", ".join(VIEWS)}.')
    self.library, self.view = stdlib.Source(), view
    known = repr((self.library.fingerprint, _MOST_WORDS, *([view] if view != 'tags' else [])))
    self.fingerprint = hashlib.sha256(known.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._lines)

  def __getitem__(self, index: int) -> dict[str, Any]:
    line = self._lines[index]
    words = _WORDS.findall(line)
    if self.view == 'tags':
      return {'words': words, 'tags': tags(words)}
    if self.view == 'roles':
      return {'words': words, **roles(words)}
    return {'text': line, **relation(line, random.Random(index))}

  @functools.cached_property
  def _lines(self) -> list[str]:
    found: dict[str, None] = {}
    for file in self.library.files:
      text = self.library.read(file).decode('utf-8', 'replace')
      found.update(dict.fromkeys(match[0].strip() for match in _LINE.finditer(text)))
    lines = [line for line in found if 1 < len(_WORDS.findall(line)) <= _MOST_WORDS]
    if self.view == 'tags':
      return lines
    return [line for line in lines if len(entities(tags(_WORDS.findall(line)))) > 1]


def tags(words: Sequence[str]) -> list[str]:
  """The tag of each word of a line.

  Example:
    >>> tags(['import', 'os', '.', 'path'])
    ['O', 'B-module', 'I-module', 'I-module']
  """
  first = 1 if words[0] == 'async' else 0
  kinds = {'def': _function, 'class': _class, 'import': _imported, 'from': _imported}
  return ['O'] * first + list(kinds[words[first]](words[first:]))


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
  """What each entity is, its first word, and one past its last.

  Example:
    >>> entities(['O', 'B-module', 'I-module'])
    [('module', 1, 3)]
  """
  found: list[tuple[str, int, int]] = []
  for number, tag in enumerate(tags):
    if tag[0] == 'B':
      found.append((tag[2:], number, number + 1))
    elif tag[0] == 'I':
      found[-1] = (*found[-1][:2], number + 1)
  return found


def roles(words: Sequence[str]) -> dict[str, Any]:
  """The `predicate` of a line, and the `tags` of what it has besides.

  Example:
    >>> roles(['def', 'f', '(', 'a', ')', ':'])
    {'predicate': [1, 2], 'tags': ['O', 'O', 'O', 'B-parameter', 'O', 'O']}
  """
  found = tags(words)
  _, first, stop = entities(found)[0]
  return {'predicate': [first, stop], 'tags': ['O'] * stop + found[stop:]}


def relation(line: str, draw: random.Random) -> dict[str, Any]:
  """Two entities of a line, `head` and `tail`, and what the head is to the tail."""
  spans = [match.span() for match in _WORDS.finditer(line)]
  found = entities(tags(_WORDS.findall(line)))
  head, tail = draw.sample(range(len(found)), 2)
  first, (other, *_) = found[0][0], found[max(head, tail)]
  label = 'beside'
  if min(head, tail) == 0 and (first, other) in _RELATIONS:
    label = _RELATIONS[first, other][head > tail]
  characters = lambda entity: [spans[entity[1]][0], spans[entity[2] - 1][1]]
  return {'head': characters(found[head]), 'tail': characters(found[tail]), 'label': label}


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
