"""Templates: a text, or a pair of texts, as a phrase with a gap in it.

Schick and Schütze 2021, "PET", arXiv:2001.07676, section 3.1 (patterns). Ids are those of the
phrase as it runs: a word or a text that stands behind a space is tokenized with it.
"""

import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.core import contracts, plugins
from llm_jax.core.contracts import Encoded, Record, Tokenizer

ARRAYS = {'text': 'tokens', 'pair': 'pair_tokens'}  # field -> the array of `encode` with its ids
MASK = 'mask'
FIELDS = (*ARRAYS, MASK)
DEFAULT = '{text} It was {mask}.'  # LM-BFF, table 1


class Piece(NamedTuple):
  """A part of a template.

  Attributes:
    literal: what stands before the field.
    field: one of `FIELDS`; '' at the end of the template.
    spaced: whether a space stands between the two; it belongs to the tokens of the field.
  """

  literal: str
  field: str = ''
  spaced: bool = False


def parse(template: str) -> tuple[Piece, ...]:
  """The parts of a template.

  Raises:
    ValueError: it is no template, has another field, or not each of {text} and {mask} once.

  Example:
    >>> parse('{text} Good? {mask}.')
    (Piece(literal='', field='text', spaced=False), \
Piece(literal=' Good?', field='mask', spaced=True), Piece(literal='.', field='', spaced=False))
  """
  where = f'objective.template={template!r}'
  pieces, literal = [], ''
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise ValueError(f'{where}: {error}; a brace that is no field is written twice.') from None
  for text, field, form, conversion in parts:
    literal += text
    if field is None:
      continue
    if field not in FIELDS or form or conversion:
      wrong = field + (f'!{conversion}' if conversion else '') + (f':{form}' if form else '')
      known = ', '.join(f'{{{name}}}' for name in FIELDS)
      near = plugins.nearest(field, FIELDS)
      raise ValueError(f'{where} has the field {{{wrong}}}{near}; it may have {known}.')
    spaced = literal.endswith(' ')
    pieces.append(Piece(literal[:-1] if spaced else literal, field, spaced))
    literal = ''
  _check_fields(where, [piece.field for piece in pieces])
  return (*pieces, Piece(literal))


def _check_fields(where: str, fields: Sequence[str]) -> None:
  for name in FIELDS:
    count = fields.count(name)
    if count == 0 and name != 'pair':
      raise ValueError(f'{where} has no {{{name}}}; it is needed, as in {DEFAULT!r}.')
    if count > 1:
      raise ValueError(f'{where} has {{{name}}} {count} times; leave it in once.')


def continued(tokenizer: Tokenizer, text: str, before: str = '') -> np.ndarray:
  """The ids of a text that continues another, without the sign that some tokenizers put where a
  text begins.

  Args:
    tokenizer: makes the ids.
    text: any text.
    before: what it continues; any text by default.
  """
  any_text = '.' if text[:1].isalnum() else 'a'  # what the text is not one word with
  for head in dict.fromkeys([before or any_text, any_text]):
    known, whole = tokenizer.encode(head), tokenizer.encode(head + text)
    if np.array_equal(whole[: len(known)], known):
      return whole[len(known) :]
  return tokenizer.encode(text)  # its first letters are a token with the last ones before them


def encode_spaced_text(record: Record, tokenizer: Tokenizer) -> Encoded:
  """As any objective's `encode`, the text as it stands behind a space."""
  return _encode_spaced(record, tokenizer, 'text')


def encode_spaced_pair(record: Record, tokenizer: Tokenizer) -> Encoded:
  """As any objective's `encode`, the second text as it stands behind a space."""
  return _encode_spaced(record, tokenizer, 'pair')


def encode_spaced_texts(record: Record, tokenizer: Tokenizer) -> Encoded:
  """As any objective's `encode`, both texts as they stand behind a space."""
  return _encode_spaced(record, tokenizer, 'text', 'pair')


def _encode_spaced(record: Record, tokenizer: Tokenizer, *fields: str) -> Encoded:
  there = [field for field in fields if record.get(field) is not None]
  encoded = contracts.Objective.encode(dict(record) | dict.fromkeys(there, ''), tokenizer)
  for field in there:
    encoded[ARRAYS[field]] = continued(tokenizer, f' {record[field]}')
  return encoded


_ENCODINGS = {
  (): contracts.Objective.encode,
  ('text',): encode_spaced_text,
  ('pair',): encode_spaced_pair,
  ('pair', 'text'): encode_spaced_texts,
}


def encoding(template: str) -> Callable[[Record, Tokenizer], Encoded]:
  """The `encode` of records that are read through a template."""
  spaced = (piece.field for piece in parse(template) if piece.spaced and piece.field != MASK)
  return _ENCODINGS[tuple(sorted(spaced))]


class Template:
  """A template, and how a tokenizer reads it.

  Args:
    template: text with {text}, {mask} and, for pairs, {pair}.
    tokenizer: makes the ids.

  Attributes:
    paired: whether it has a {pair}.
    last: whether nothing stands after the {mask}.
    size: how many ids it has beside those of its fields.
  """

  def __init__(self, template: str, tokenizer: Tokenizer):
    self.template, self._tokenizer, self._pieces = template, tokenizer, parse(template)
    fields = [piece.field for piece in self._pieces]
    self._gap = fields.index(MASK)
    self.paired = 'pair' in fields
    self.last = fields[self._gap + 1 :] == [''] and not self._pieces[-1].literal
    first, *rest = (piece.literal for piece in self._pieces)
    self._literals = [tokenizer.encode(first), *(continued(tokenizer, text) for text in rest)]
    self.size = sum(map(len, self._literals))

  def check(self, causal: bool) -> None:
    """Raises ValueError where a model of this kind cannot fill the gap."""
    where = f'objective.template={self.template!r}'
    if causal and not self.last:
      raise ValueError(
        f'{where}: a causal model reads {{mask}} as what comes next, so it must stand at the end, '
        "as in '{text} It was {mask}'."
      )
    if not causal and self._tokenizer.mask_id is None:
      raise ValueError(
        f'{where}: {{mask}} needs a mask token, which this tokenizer lacks; take the folder of an '
        'encoder that was trained by masking, or a causal model.'
      )

  def word(self, word: str) -> np.ndarray:
    """The ids of a word where the mask is."""
    piece = self._pieces[self._gap]
    if self._gap == 0 and not piece.literal:
      return self._tokenizer.encode(word)
    text = f' {word.lstrip()}' if piece.spaced else word
    return continued(self._tokenizer, text, piece.literal)

  def text(self, field: str, text: str) -> np.ndarray:
    """The ids of a text where a field is, as `encoding` gives them."""
    spaced = any(piece.spaced for piece in self._pieces if piece.field == field)
    return continued(self._tokenizer, f' {text}') if spaced else self._tokenizer.encode(text)

  def filled(
    self, text: np.ndarray, pair: np.ndarray | None, gap: Sequence[int]
  ) -> tuple[np.ndarray, int]:
    """The ids of the template with texts and gap filled in, and the index at which the gap begins.

    Args:
      text, pair: ids; None where the template has no {pair}.
      gap: ids of a word, or masks.
    """
    fields = {'text': text, 'pair': pair, MASK: gap, '': ()}
    parts, start = [np.zeros(0, np.int32)], 0
    for piece, literal in zip(self._pieces, self._literals, strict=True):
      parts.append(literal)
      if piece.field == MASK:
        start = sum(map(len, parts))
      parts.append(np.asarray(fields[piece.field], np.int32))
    return np.concatenate(parts), start
