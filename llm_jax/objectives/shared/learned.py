"""Which tokens of a row are learned, for people: as text with signs, or as HTML in colours."""

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.core.contracts import Tokenizer

BEGIN, END = '\u27e6', '\u27e7'  # around what is learned
_STYLE = 'background: #d7f0dd; border-radius: 3px'
_CONTROLS = {'\n': '\\n\n', '\r': '\\r', '\x1b': '\\x1b'}


class Piece(NamedTuple):
  """Tokens next to each other that are all learned, or none of which is."""

  text: str
  learned: bool


def pieces(example: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> list[list[Piece]]:
  """The documents of a row, each in pieces.

  Args:
    example: has `tokens`, `segments`, and `targets` and `weights` one token ahead.
    tokenizer: spells them; special tokens by name.
  """
  found = []
  for segment in range(1, int(example['segments'].max(initial=0)) + 1):
    inside = np.flatnonzero(example['segments'] == segment)
    ids = [*example['tokens'][inside].tolist(), int(example['targets'][inside[-1]])]
    learned = [False, *(example['weights'][inside] > 0).tolist()]
    if not learned[-1]:  # the last target counts for nothing, and may be none
      ids, learned = ids[:-1], learned[:-1]
    found.append(list(_pieces(ids, learned, tokenizer)))
  return found


def as_text(documents: Sequence[Sequence[Piece]]) -> str:
  """One document after another, what is learned between signs."""
  lines = []
  for document in documents:
    lines.append(
      ''.join(f'{BEGIN}{p.text}{END}' if p.learned else p.text for p in map(_escaped, document))
    )
  return '\n'.join(lines)


def as_html(documents: Sequence[Sequence[Piece]]) -> str:
  """The same in colours."""
  parts = []
  for document in documents:
    spans = (
      f'<span style="{_STYLE}">{html.escape(p.text)}</span>' if p.learned else html.escape(p.text)
      for p in document
    )
    parts.append(f'<pre>{"".join(spans)}</pre>')
  return '\n'.join(parts)


def _pieces(ids: Sequence[int], learned: Sequence[bool], tokenizer: Tokenizer) -> Iterator[Piece]:
  pairs = zip(ids, learned, strict=True)
  for is_learned, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
    text = ''
    numbers = [number for number, _ in group]
    for special, run in itertools.groupby(numbers, key=lambda n: bool(tokenizer.special[n])):
      found = list(run)
      names = map(tokenizer.special_text, found)
      text += ''.join(names) if special else tokenizer.decode(found)
    yield Piece(text, is_learned)


def _escaped(piece: Piece) -> Piece:
  return piece._replace(text=''.join(_CONTROLS.get(c, c) for c in piece.text))
