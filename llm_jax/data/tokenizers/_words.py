"""What the tokenizers ask of text: its bytes, and where words begin (in scripts with spaces at the
space, else at each sign).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

# Scripts that are written without spaces, by the beginnings of Unicode's names.
_SIGN_BY_SIGN = ('CJK', 'HIRAGANA', 'KATAKANA', 'THAI', 'LAO', 'KHMER', 'MYANMAR')


def utf8(text: str) -> bytes:
  """The text's bytes; ValueError for half of a surrogate pair, which UTF-8 cannot hold."""
  try:
    return text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise ValueError(
      f'the text has half of a surrogate pair at character {error.start}, which UTF-8 cannot hold: '
      'repair it, say with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
    ) from error


def checked(ids: Sequence[int], vocab_size: int) -> np.ndarray:
  """The ids as an array [n] int64; ValueError if one is out of the vocabulary."""
  ids = np.asarray(ids, np.int64).reshape(-1)
  if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
    raise ValueError(
      f'ids from {ids.min()} to {ids.max()} are not all in the vocabulary: allowed are 0 to '
      f'{vocab_size - 1}.'
    )
  return ids


def begins_word(character: str) -> bool:
  """Whether a piece that starts so begins a word: with white space, punctuation, a sign of a script
  without spaces.
  """
  if not character.isalnum():
    # Marks and joiners belong to what is before.
    return not unicodedata.category(character).startswith(('M', 'Cf'))
  return unicodedata.name(character, '').startswith(_SIGN_BY_SIGN)


def byte_begins_word(byte: int) -> bool:
  """The same for a single byte: an ASCII one by its character, else the first of a character of
  three bytes or more.
  """
  return begins_word(chr(byte)) if byte < 0x80 else byte >= 0xE0


def bytes_begin_word(spelled: bytes) -> bool:
  """The same for what a token spells: nothing begins no word; half a character counts as its first
  byte.
  """
  if not spelled:
    return False
  if len(spelled) == 1:
    return byte_begins_word(spelled[0])
  character = spelled[:4].decode('utf-8', 'ignore')[:1]
  return begins_word(character) if character else byte_begins_word(spelled[0])


def parts(
  text: str, known: Mapping[str, Sequence[int]]
) -> Iterator[tuple[int, str, Sequence[int] | None]]:
  """Cuts a text at the strings that have ids of their own, where several begin at the longest.

  Yields:
    Where each part begins, the part, and its ids; None for text between such strings.
  """
  names = sorted(filter(None, known), key=len, reverse=True)
  end = 0  # of what has been cut off
  for match in re.finditer('|'.join(map(re.escape, names)), text) if names else ():
    if match.start() > end:
      yield end, text[end : match.start()], None
    yield match.start(), match[0], known[match[0]]
    end = match.end()
  if end < len(text):
    yield end, text[end:], None


def joined(pieces: Iterable[tuple[Sequence[int], Sequence]]) -> tuple[np.ndarray, np.ndarray]:
  """Ids [n] int32 and begins and ends [n, 2] of the parts of a text, one after the other."""
  pieces = list(pieces)
  ids = np.array([number for part, _ in pieces for number in part], np.int32)
  return ids, np.array([span for _, part in pieces for span in part], np.int64).reshape(-1, 2)
