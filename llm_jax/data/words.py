"""The words of a record, and which token is whose: text is tokenized as it runs, and a token is
that of the word whose characters it spells.

A record has `words`, which are joined to a text, or a `text`, which is split. How, `WORDS` says.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_jax.core.contracts import Encoded, Record, Tokenizer
from llm_jax.data import marks, segmenters

Spans = list[tuple[int, int]]  # where the characters of each word begin and end
NO_WORD = -1  # the word of a token that spells none: white space, what a normaliser adds

# An `encode` is cached by its own source. Rule 1 of this module, to be raised in each of them with
# any change to what they call.


def encode_by_spaces(record: Record, tokenizer: Tokenizer) -> Encoded:
  """Words that are joined by, and split at, white space."""
  return _encoded(record, tokenizer, ' ', lambda text: _matches(r'\S+', text))  # rule 1


def encode_by_punctuation(record: Record, tokenizer: Tokenizer) -> Encoded:
  """Words that are joined by spaces; a text is split at white space and around punctuation."""
  return _encoded(record, tokenizer, ' ', lambda text: _matches(r'\w+|[^\w\s]', text))  # rule 1


def encode_by_character(record: Record, tokenizer: Tokenizer) -> Encoded:
  """Words that are joined by nothing; each character of a text that is no white space is one."""
  return _encoded(record, tokenizer, '', lambda text: _matches(r'\S', text))  # rule 1


def encode_by_jieba(record: Record, tokenizer: Tokenizer) -> Encoded:
  """Words that are joined by nothing; a text is split by jieba 0.42.1."""
  return _encoded(record, tokenizer, '', segmenters.jieba_words)  # rule 1


def mark_by_spaces(record: Record, tokenizer: Tokenizer) -> Encoded:
  """`encode_by_spaces`, with signs around the predicate."""
  split = lambda text: _matches(r'\S+', text)
  return _encoded(record, tokenizer, ' ', split, marked=True)  # rule 1, rule 1 of `marks`


def mark_by_punctuation(record: Record, tokenizer: Tokenizer) -> Encoded:
  """`encode_by_punctuation`, with signs around the predicate."""
  split = lambda text: _matches(r'\w+|[^\w\s]', text)
  return _encoded(record, tokenizer, ' ', split, marked=True)  # rule 1, rule 1 of `marks`


def mark_by_character(record: Record, tokenizer: Tokenizer) -> Encoded:
  """`encode_by_character`, with signs around the predicate."""
  split = lambda text: _matches(r'\S', text)
  return _encoded(record, tokenizer, '', split, marked=True)  # rule 1, rule 1 of `marks`


def mark_by_jieba(record: Record, tokenizer: Tokenizer) -> Encoded:
  """`encode_by_jieba`, with signs around the predicate."""
  return _encoded(
    record, tokenizer, '', segmenters.jieba_words, marked=True
  )  # rule 1, rule 1 of `marks`


WORDS: dict[str, Callable[[Record, Tokenizer], Encoded]] = {
  'space': encode_by_spaces,
  'punctuation': encode_by_punctuation,
  'character': encode_by_character,
  'jieba': encode_by_jieba,
}
"""Name -> the `encode` that takes words so: see each of them."""
MARKED: dict[str, Callable[[Record, Tokenizer], Encoded]] = {
  'space': mark_by_spaces,
  'punctuation': mark_by_punctuation,
  'character': mark_by_character,
  'jieba': mark_by_jieba,
}
"""Name -> the same with the predicate marked."""


def joined(words: Sequence[str], separator: str) -> tuple[str, Spans]:
  """The text that words make, and where each stands in it.

  Example:
    >>> joined(['Bonn', '.'], ' ')
    ('Bonn .', [(0, 4), (5, 6)])
  """
  spans, start = [], 0
  for word in words:
    spans.append((start, start + len(word)))
    start += len(word) + len(separator)
  return separator.join(words), spans


def token_words(token_spans: np.ndarray, word_spans: Spans) -> np.ndarray:
  """[n] int32, the number of the first word that has characters in common with each token, or
  `NO_WORD`.

  Args:
    token_spans: [n, 2], where the characters of each token begin and end.
    word_spans: in order, without overlap.
  """
  spans = np.asarray(token_spans, np.int64).reshape(-1, 2)
  words = np.asarray(word_spans, np.int64).reshape(-1, 2)
  real = np.flatnonzero(words[:, 1] > words[:, 0])  # a word without characters has no token
  if not len(real):
    return np.full(len(spans), NO_WORD, np.int32)
  # The first word that ends after the token begins, if it begins before the token ends.
  nearest = np.searchsorted(words[real, 1], spans[:, 0], side='right')
  word = real[np.minimum(nearest, len(real) - 1)]
  inside = (nearest < len(real)) & (words[word, 0] < spans[:, 1]) & (spans[:, 0] < spans[:, 1])
  word = np.where(inside, word, NO_WORD)
  in_order = word >= np.maximum.accumulate(word)
  return np.where(in_order, word, NO_WORD).astype(np.int32)


def check(name: str) -> None:
  """Raises ValueError for a name that is not in `WORDS`, ImportError where jieba is missing."""
  if name not in WORDS:
    raise ValueError(f'objective.words={name!r} must be one of {", ".join(WORDS)}.')
  if name == 'jieba':
    segmenters.check('jieba')


def _encoded(
  record: Record,
  tokenizer: Tokenizer,
  separator: str,
  split: Callable[[str], Spans],
  marked: bool = False,
) -> Encoded:
  """`tokens` and `token_words` [n], `word_begins` and `word_ends` [words], `words`, how many
  `characters` the text has, and as they are given `tags` and `spans`; with marks, whose tokens are
  of no word, `mark` [2], the tokens at which they open and close.
  """
  if record.get('words') is not None:
    words = _strings(record['words'])
    text, word_spans = joined(words, separator)
  elif record.get('text') is not None:
    text = record['text']
    if not isinstance(text, str):
      raise ValueError(f"field 'text' is {text!r}; it must be a string.")
    word_spans = split(text)
    words = [text[begin:end] for begin, end in word_spans]
  else:
    raise ValueError(
      f'a record has no words and no text, only {", ".join(record) or "nothing"}; '
      "config.data.fields=('words','tags') names fields of a source, config.data.text the text."
    )
  shown, shown_spans, signs = text, word_spans, None
  if marked:
    signs = marks.insert(text, [marks.Mark(*_predicate(record, text, word_spans), '@ ', ' @')])
    shown, shown_spans = signs.text, [_moved(span, signs.moved) for span in word_spans]
  tokens, token_spans = tokenizer.offsets(shown)
  bounds = np.asarray(word_spans, np.int32).reshape(-1, 2)
  encoded: Encoded = {
    'tokens': tokens,
    'token_words': token_words(token_spans, shown_spans),
    'word_begins': bounds[:, 0],
    'word_ends': bounds[:, 1],
    'words': words,
    'characters': len(text),
  }
  if signs is not None:
    opens = marks.token_of(token_spans, signs.opens[0])
    closes = marks.token_of(token_spans, signs.closes[0], last=True)
    encoded['mark'] = np.array([opens, closes], np.int32)
  return encoded | {name: record[name] for name in ('tags', 'spans') if name in record}


def _strings(words: Any) -> list[str]:
  if not isinstance(words, list | tuple):
    raise ValueError(f"field 'words' is {words!r}; it must be a list of strings.")
  for number, word in enumerate(words):
    if not isinstance(word, str):
      raise ValueError(f"field 'words': word {number} is {word!r}; each must be a string.")
  return list(words)


def _predicate(record: Record, text: str, word_spans: Spans) -> tuple[int, int]:
  """The characters of the predicate.

  Raises:
    ValueError: none, or words or characters that are not there.
  """
  given = record.get('predicate')
  if record.get('words') is None and not _is_index(given):
    start, end = marks.span(given, 'predicate', text)
    for begin, stop in word_spans:
      if begin < start < stop or begin < end < stop:
        raise ValueError(
          f"field 'predicate' is {given!r}, which cuts the word {text[begin:stop]!r} (characters "
          f'{begin} to {stop}) in two.'
        )
    return start, end
  first, stop = (given, given + 1) if _is_index(given) else _pair(given)
  if 0 <= first < stop <= len(word_spans):
    start, end = word_spans[first][0], word_spans[stop - 1][1]
    if text[start:end].strip():
      return start, end
  raise ValueError(
    f"field 'predicate' is {given!r}; it must be the number of a word that has characters, from 0 "
    f'to {len(word_spans) - 1}, or [first, stop] of several '
    "(config.data.fields=('words','tags','predicate') names the fields of a source)."
  )


def _is_index(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _pair(given: Any) -> tuple[int, int]:
  """[first, stop]; an empty one for anything else."""
  if isinstance(given, list | tuple) and len(given) == 2 and all(map(_is_index, given)):
    return given[0], given[1]
  return 0, 0


def _moved(span: tuple[int, int], moved: np.ndarray) -> tuple[int, int]:
  """Where the characters of a word stand in a text with marks; a word without any stays empty."""
  begin, end = span
  return (int(moved[begin]), int(moved[end - 1]) + 1) if begin < end else (0, 0)


def _matches(pattern: str, text: str) -> Spans:
  return [match.span() for match in re.finditer(pattern, text)]
