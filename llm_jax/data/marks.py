"""Marks around spans of a text's characters, by signs that every tokenizer spells, so that no
vocabulary has to grow (Zhou and Chen 2022, arXiv:2102.01373, section 3.1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# An `encode` is cached by its own source. Rule 1 of this module, to be raised in each that calls it
# with any change to what it gives.


class Mark(NamedTuple):
  """A span that is marked.

  Attributes:
    start, stop: its characters.
    before: what is put before them; its first character is no white space.
    after: what is put after them; its last character is no white space.
  """

  start: int
  stop: int
  before: str
  after: str


class Marked(NamedTuple):
  """A text with marks in it.

  Attributes:
    text: the text.
    opens: of each mark, where the first character of its `before` stands.
    closes: of each mark, where the last character of its `after` stands.
    moved: [characters] where each character of the text without marks stands.
  """

  text: str
  opens: list[int]
  closes: list[int]
  moved: np.ndarray


def insert(text: str, marks: Sequence[Mark]) -> Marked:
  """The text with its marks. Of spans that begin together the longer is opened first, of those that
  end together the shorter is closed first; one that ends is closed before the next is opened.

  Args:
    text: any text.
    marks: around spans of it, no two of them equal.

  Example:
    >>> insert('Bonn, Rhein', [Mark(0, 4, '@ ', ' @'), Mark(6, 11, '# ', ' #')]).text
    '@ Bonn @, # Rhein #'
  """
  signs = []
  for number, mark in enumerate(marks):
    signs.append((mark.stop, 0, -mark.start, number))
    signs.append((mark.start, 1, -mark.stop, number))
  pieces: list[str] = []
  opens, closes = [0] * len(marks), [0] * len(marks)
  moved, done, length = np.arange(len(text)), 0, 0
  for position, opening, _, number in sorted(signs):
    sign = marks[number].before if opening else marks[number].after
    pieces += [text[done:position], sign]
    length += position - done
    if opening:
      opens[number] = length
    else:
      closes[number] = length + len(sign) - 1
    moved[position:] += len(sign)
    done, length = position, length + len(sign)
  return Marked(''.join([*pieces, text[done:]]), opens, closes, moved)


def token_of(token_spans: np.ndarray, character: int, last: bool = False) -> int:
  """The number of the first token, or the last one, that spells a character.

  Args:
    token_spans: [n, 2], where the characters of each token begin and end.
    character: of the text.
    last: the last one.

  Raises:
    ValueError: no token spells it.
  """
  spans = np.asarray(token_spans, np.int64).reshape(-1, 2)
  found = np.flatnonzero((spans[:, 0] <= character) & (character < spans[:, 1]))
  if not len(found):
    raise ValueError(
      'the tokenizer has no token for a sign that marks a span, such as @; its normalisation takes '
      'signs away, so use another tokenizer.'
    )
  return int(found[-1 if last else 0])


def span(given: Any, field: str, text: str) -> tuple[int, int]:
  """The characters that a field of a record names: [start, end).

  Raises:
    ValueError: another form, characters that the text does not have, none, or white space alone.
  """
  pair = list(given) if isinstance(given, list | tuple) else []
  whole = all(isinstance(x, int) and not isinstance(x, bool) for x in pair)
  if len(pair) != 2 or not whole or not 0 <= pair[0] < pair[1] <= len(text):
    raise ValueError(
      f'field {field!r} is {given!r}; it must be [start, end], characters of the text, with '
      f'0 <= start < end <= {len(text)} (config.data.fields=({field!r}, ...) names fields of a '
      'source).'
    )
  start, stop = pair
  if not text[start:stop].strip():
    raise ValueError(f'field {field!r} is {given!r}, which holds nothing but white space.')
  return start, stop
