"""Where words begin in text that has no spaces between them, by a segmenter.

Chinese BERT with whole-word masking (Cui et al. 2019, arXiv:1906.08101) is trained so: the tokens
stay as they are, and those of one word are masked together.
"""

import logging
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from llm_jax.core.contracts import Encoded, Record, Tokenizer

SEGMENTERS = ('jieba',)
WORD_STARTS = 'word_starts'  # the array that `encode_with_jieba` adds


def encode_with_jieba(record: Record, tokenizer: Tokenizer) -> Encoded:
  """`tokens` and `word_starts`, [n] each: 1 where a token begins a word of jieba 0.42.1."""
  # The token cache goes by this source. Rule 1 of `word_starts`, to be raised with any change.
  tokens, spans = tokenizer.offsets(record['text'])
  words = _jieba().tokenize(record['text'])
  starts = word_starts(spans, ((begin, text.isspace()) for text, begin, _ in words))
  return {'tokens': tokens, 'word_starts': starts}


def jieba_words(text: str) -> list[tuple[int, int]]:
  """Where each word of a text begins and ends, by jieba; white space is none."""
  return [(begin, end) for word, begin, end in _jieba().tokenize(text) if not word.isspace()]


def check(name: str | None) -> None:
  """Raises ValueError for a segmenter that is not known, ImportError where it is not installed."""
  if name is None:
    return
  if name not in SEGMENTERS:
    raise ValueError(
      f'objective.words={name!r} must be one of {", ".join(SEGMENTERS)}, or None for words as the '
      'tokenizer sees them.'
    )
  _jieba()


def word_starts(spans: np.ndarray, words: Iterable[tuple[int, bool]]) -> np.ndarray:
  """[n] int32, 1 where a token begins a word.

  A token that begins inside a word belongs to what is before it, and so do all but the first of
  several that spell one character. White space belongs to the word after it.

  Args:
    spans: [n, 2], where the characters of each token begin and end.
    words: where each word of the text begins, and whether it is white space.
  """
  begins, after_space = set(), False
  for begin, space in words:
    if not after_space:
      begins.add(begin)
    after_space = space
  firsts: Sequence[int] = np.asarray(spans).reshape(-1, 2)[:, 0].tolist()
  before = [-1, *firsts[:-1]]
  pairs = zip(before, firsts, strict=True) if firsts else ()
  return np.array([int(i in begins and i != last) for last, i in pairs], np.int32)


def _jieba():
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of its regular expressions, and of pkg_resources
    try:
      import jieba
    except ImportError as error:
      raise ImportError(
        "objective.words='jieba' needs the package jieba: pip install 'llm_jax[zh]', or "
        'pip install jieba==0.42.1.'
      ) from error
  jieba.setLogLevel(logging.WARNING)  # it says on stderr that it reads its dictionary
  return jieba
