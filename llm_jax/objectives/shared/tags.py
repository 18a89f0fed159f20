"""Tags of words: the schemes in which tags spell entities, and what is wrong with given tags.

Ramshaw and Marcus 1995 (IOB1); Sang and Veenstra 1999 (IOB2); Ratinov and Roth 2009 (BILOU, of
which IOBES is another spelling).
"""

import collections
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from llm_jax.core.contracts import Documents

SCHEMES = {'IOB1': 'BI', 'IOB2': 'BI', 'IOBES': 'BIES', 'BILOU': 'BILU'}
"""Name -> the letters that tags begin with, beside O."""
NO_SCHEME = 'none'
OUTSIDE = 'O'
_TYPED = re.compile(r'([BIESLU])-(.+)', re.DOTALL)
_INSIDE, _SINGLE = 'IEL', 'BSUO'  # goes on with an entity; begins one, or is outside
_OPEN = 'BI'


class Entity(NamedTuple):
  """Words `first` to `stop - 1` of a text."""

  label: str
  first: int
  stop: int


def parts(tag: str) -> tuple[str, str]:
  """The letter and the type of a tag: ('B', 'PER') of 'B-PER', ('B', '') of 'B'."""
  return (tag[0], tag[2:]) if tag[1:2] in ('', '-') else (tag, '')


def scheme_of(tags: Sequence[str]) -> str:
  """The scheme that the names of tags show: each but O is a letter, a hyphen and a type."""
  matches = [_TYPED.fullmatch(tag) for tag in tags if tag != OUTSIDE]
  letters = {match[1] for match in matches if match}
  if not letters or not all(matches):
    return NO_SCHEME
  if letters == {'I'}:
    return 'IOB1'
  fitting = [name for name in ('IOB2', 'IOBES', 'BILOU') if letters <= set(SCHEMES[name])]
  return fitting[0] if fitting else NO_SCHEME


def check_scheme(scheme: str, tags: Sequence[str]) -> None:
  """Raises ValueError for a scheme that is not known, or tags that are none of it."""
  if scheme == NO_SCHEME:
    return
  if scheme not in SCHEMES:
    raise ValueError(
      f'objective.scheme={scheme!r} must be one of {", ".join(SCHEMES)}, {NO_SCHEME}, or None for '
      'what the names of the tags show.'
    )
  for tag in tags:
    if tag != OUTSIDE and parts(tag)[0] not in set(SCHEMES[scheme]):
      raise ValueError(
        f'objective.scheme={scheme!r} has tags O and {", ".join(SCHEMES[scheme])} with a type, '
        f'such as {SCHEMES[scheme][0]}-PER, and not {tag!r}; choose another, or {NO_SCHEME!r}.'
      )


def allowed(scheme: str, before: str, after: str) -> bool:
  """Whether a tag may follow another; O stands for both ends of a text."""
  if scheme == NO_SCHEME:
    return True
  (letter, kind), (next_letter, next_kind) = parts(before), parts(after)
  goes_on = letter in _OPEN and kind == next_kind
  if scheme == 'IOB1':  # B only where it must tell two entities of a type apart
    return next_letter != 'B' or goes_on
  if next_letter in _INSIDE:
    return goes_on
  return scheme == 'IOB2' or letter not in _OPEN


class Rules(NamedTuple):
  """Which tags may follow which, and begin and end a text; bool, [C, C] and [C]."""

  first_C: np.ndarray
  next_CC: np.ndarray
  last_C: np.ndarray


def rules(scheme: str, tags: Sequence[str]) -> Rules:
  """The rules of a scheme."""
  return Rules(
    np.array([allowed(scheme, OUTSIDE, tag) for tag in tags], bool),
    np.array([[allowed(scheme, a, b) for b in tags] for a in tags], bool),
    np.array([allowed(scheme, tag, OUTSIDE) for tag in tags], bool),
  )


def entities(tags: Sequence[str]) -> list[Entity]:
  """The entities that tags spell, also where they break their scheme: then as conlleval.pl reads
  them (Sang and Buchholz 2000).

  Example:
    >>> entities(['B-PER', 'I-PER', 'O', 'I-LOC'])
    [Entity(label='PER', first=0, stop=2), Entity(label='LOC', first=3, stop=4)]
  """
  found: list[Entity] = []
  before = OUTSIDE
  for number, tag in enumerate(tags):
    (letter, kind), (last_letter, last_kind) = parts(tag), parts(before)
    before = tag
    if tag == OUTSIDE:
      continue
    if letter in _INSIDE and last_letter in _OPEN and kind == last_kind:
      found[-1] = found[-1]._replace(stop=number + 1)
    else:
      found.append(Entity(kind, number, number + 1))
  return found


def given(documents: Documents) -> Iterator[list[str] | None]:
  """The tags of each document, from its `tags`, or in IOB2 from its `spans`, or None.

  Raises:
    ValueError: what is wrong with them, naming the document and the field.
  """
  tags, spans = documents.values('tags'), documents.values('spans')
  counts = documents.lengths('word_begins')
  for index in range(len(documents)):
    try:
      if tags is not None and tags[index] is not None:
        yield _listed(tags[index], int(counts[index]))
      elif spans is not None and spans[index] is not None:
        words, length = (documents.values(name)[index] for name in ('words', 'characters'))
        yield _spelled(spans[index], _bounds(documents, index), words, length)
      else:
        yield None
    except ValueError as error:
      raise ValueError(f'{documents.where(index)}: {error}') from None


def found(documents: Sequence[Documents]) -> dict[str, int]:
  """How often each tag is given, by letter."""
  counts = collections.Counter[str]()
  for split in documents:
    for tags in given(split):
      counts.update(tags or ())
  return dict(sorted(counts.items()))


def numbered(
  documents: Documents, tags: Sequence[str], scheme: str, required: bool, strict: bool
) -> list[np.ndarray | None]:
  """The numbers of the tags of each document; None where it has none.

  Args:
    documents: with their tags.
    tags: their names in the order of their numbers.
    scheme: what they should keep to.
    required: a document without tags is an error.
    strict: so are tags that break the scheme; otherwise they are counted and logged.

  Raises:
    ValueError: what is wrong, naming the document and the word.
  """
  number = {tag: i for i, tag in enumerate(tags)}
  known = rules(scheme, tags)
  numbers: list[np.ndarray | None] = []
  broken = []
  for index, each in enumerate(given(documents)):
    if each is None:
      if required:
        raise ValueError(
          f'{documents.where(index)} has no tags; give it some '
          "(config.data.fields=('words','tags') names the fields of a source), or set "
          '--config.objective.unlabelled=ignore.'
        )
      numbers.append(None)
      continue
    for word, tag in enumerate(each):
      if tag not in number:
        raise ValueError(
          f'{documents.where(index)}: word {word} has the tag {tag!r}, which is none of the '
          f'{len(tags)} tags of the training documents ({_shortened(tags)}): name all tags in '
          'config.objective.tags, or give more documents.'
        )
    ids = np.array([number[tag] for tag in each], np.int32)
    fault = _fault(ids, known, tags, scheme)
    if fault and strict:
      raise ValueError(f'{documents.where(index)}: {fault}; {_WAY_OUT}')
    broken += [(index, fault)] if fault else []
    numbers.append(ids)
  if broken:
    index, fault = broken[0]
    logging.warning(
      'tag: the tags of %d of %d documents break their scheme, and strict scores do not count such '
      'entities; the first: %s: %s; %s',
      len(broken),
      len(documents),
      documents.where(index),
      fault,
      _WAY_OUT,
    )
  return numbers


def samples(tags: Sequence[str] | None, scheme: str | None) -> dict[str, Any]:
  """A made-up record of tags that fit what is known of them."""
  if not tags:
    unit = {'IOBES': 'S-x', 'BILOU': 'U-x', 'IOB1': 'I-x'}.get(scheme or '', 'B-x')
    return {'words': ['two', 'words'], 'tags': [unit, OUTSIDE]}
  name = scheme or scheme_of(tags)
  alone = [tag for tag in tags if allowed(name, OUTSIDE, tag) and allowed(name, tag, OUTSIDE)]
  return {'words': ['word'], 'tags': [(alone or list(tags))[0]]}


def _listed(tags: Any, words: int) -> list[str]:
  if not isinstance(tags, list):
    raise ValueError(f"field 'tags' is {tags!r}; it must be a list with a tag for each word.")
  if len(tags) != words:
    raise ValueError(
      f"field 'tags' has {len(tags)} tags for {words} words; there must be one for each word."
    )
  for number, tag in enumerate(tags):
    if not isinstance(tag, str) or not tag:
      raise ValueError(f"field 'tags': that of word {number} is {tag!r}; it must be a name.")
  return tags


def _spelled(
  spans: Any, bounds: list[tuple[int, int]], words: Sequence[str], length: int
) -> list[str]:
  """Spans of characters as tags in IOB2."""
  tags = [OUTSIDE] * len(bounds)
  last = (0, 0)
  for begin, end, label in sorted(map(_span, _as_list(spans))):
    shown = f"field 'spans': [{begin}, {end}, {label!r}]"
    if begin < 0 or end > length:
      raise ValueError(f'{shown} is outside of the text, which has {length} characters.')
    if begin < last[1]:
      raise ValueError(f'{shown} overlaps with [{last[0]}, {last[1]}]; a word has one label.')
    last = begin, end
    inside = [i for i, (first, stop) in enumerate(bounds) if first < end and begin < stop]
    if not inside:
      raise ValueError(f'{shown} holds no word of the text, only white space.')
    for i in (inside[0], inside[-1]):
      if not begin <= bounds[i][0] < bounds[i][1] <= end:
        raise ValueError(
          f'{shown} cuts the word {words[i]!r} (characters {bounds[i][0]} to {bounds[i][1]}) in '
          "two; words that end at punctuation come by config.objective.words='punctuation'."
        )
    tags[inside[0]] = f'B-{label}'
    for i in inside[1:]:
      tags[i] = f'I-{label}'
  return tags


def _as_list(spans: Any) -> list[Any]:
  if not isinstance(spans, list):
    raise ValueError(f"field 'spans' is {spans!r}; it must be a list of [start, end, label].")
  return spans


def _span(span: Any) -> tuple[int, int, str]:
  shown = f"field 'spans': {span!r} must be [start, end, label], with start < end"
  if not isinstance(span, list) or len(span) != 3:
    raise ValueError(f'{shown}.')
  begin, end, label = span
  whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (begin, end))
  if not whole or not isinstance(label, str) or not label or not begin < end:
    raise ValueError(f'{shown}.')
  return begin, end, label


def _bounds(documents: Documents, index: int) -> list[tuple[int, int]]:
  begins = documents.array('word_begins', index).tolist()
  return list(zip(begins, documents.array('word_ends', index).tolist(), strict=True))


def _fault(ids: np.ndarray, known: Rules, tags: Sequence[str], scheme: str) -> str:
  """The first tag that its scheme does not allow where it stands; '' where there is none."""
  if not len(ids):
    return ''
  fine = np.concatenate([[known.first_C[ids[0]]], known.next_CC[ids[:-1], ids[1:]]])
  wrong = np.flatnonzero(~fine)
  if len(wrong):
    number = int(wrong[0])
    before = f'{tags[ids[number - 1]]!r}' if number else 'nothing'
    return (
      f'word {number} has the tag {tags[ids[number]]!r} after {before}, which scheme={scheme} does '
      'not allow'
    )
  if not known.last_C[ids[-1]]:
    return f'the last word has the tag {tags[ids[-1]]!r}, which scheme={scheme} does not allow'
  return ''


_WAY_OUT = (
  "set config.objective.scheme to the one that the tags are in, or to 'none' to allow any order."
)


def _shortened(names: Mapping[str, Any] | Sequence[str]) -> str:
  shown = ', '.join(list(names)[:20])
  return f'{shown}, ... ({len(names) - 20} more)' if len(names) > 20 else shown
