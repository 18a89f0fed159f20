"""What the tokenizers ask of text: its bytes, and where words begin (in scripts with spaces at the space, else at each sign)."""

import unicodedata
from collections.abc import Sequence

import numpy as np

_SIGN_BY_SIGN = ('CJK', 'HIRAGANA', 'KATAKANA', 'THAI', 'LAO', 'KHMER', 'MYANMAR')  # scripts written without spaces


def utf8(text: str) -> bytes:
  """The text's bytes; ValueError for half of a surrogate pair, which UTF-8 cannot hold."""
  try:
    return text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise ValueError(f'the text has half of a surrogate pair at character {error.start}, which UTF-8 cannot hold: '
                     'repair it, say with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").') from error


def checked(ids: Sequence[int], vocab_size: int) -> np.ndarray:
  """The ids as an array [n] int64; ValueError if one is out of the vocabulary."""
  ids = np.asarray(ids, np.int64).reshape(-1)
  if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
    raise ValueError(f'ids from {ids.min()} to {ids.max()} are not all in the vocabulary: allowed are 0 to {vocab_size - 1}.')
  return ids


def begins_word(character: str) -> bool:
  """Whether a piece that starts so begins a word: with white space, punctuation, a sign of a script without spaces."""
  if not character.isalnum():
    return not unicodedata.category(character).startswith(('M', 'Cf'))  # marks and joiners belong to what is before
  return unicodedata.name(character, '').startswith(_SIGN_BY_SIGN)


def byte_begins_word(byte: int) -> bool:
  """The same for a single byte: an ASCII one by its character, else the first of a character of three bytes or more."""
  return begins_word(chr(byte)) if byte < 0x80 else byte >= 0xE0
