"""Verbalizers: the words that fill the gap of a template, one or several for each class.

Schick and Schütze 2021, "PET", arXiv:2001.07676, section 3.1.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core.contracts import Documents, Tokenizer
from llm_jax.objectives.shared.templates import Template


class Words:
  """The words of all classes, one after the other.

  Args:
    classes: their names.
    verbalizers: class -> its word, or a list of its words; empty where each class's name is its
      word.
    template: in which they stand.
    tokenizer: makes the ids.

  Raises:
    ValueError: no two classes, one without a word, a word that the tokenizer cannot spell, or that
      says the same as another.

  Attributes:
    ids: [W] arrays, the ids of each word.
    firsts: per class, the number of its first word.
    targets_WM: [W, M] int32, the ids filled up by zeros to the longest.
    inside_WM: [W, M] bool, where a word has an id.
    words_CK: [C, K] int32, the numbers of each class's words, filled up.
    counted_CK: [C, K] bool, where a class has a word.
  """

  def __init__(
    self,
    classes: Sequence[str],
    verbalizers: Mapping[str, Any],
    template: Template,
    tokenizer: Tokenizer,
  ):
    words = [_listed(name, verbalizers[name] if verbalizers else name) for name in classes]
    self._names = list(itertools.chain.from_iterable(words))
    self._classes = [name for name, each in zip(classes, words, strict=True) for _ in each]
    self.ids = [template.word(word) for word in self._names]
    self._unknown = [np.count_nonzero(ids == tokenizer.unk_id) for ids in self.ids]
    self._check()
    counts = np.array([len(each) for each in words])
    self.firsts = np.cumsum(counts) - counts
    self.words_CK, self.counted_CK = _filled_up(np.split(np.arange(len(self.ids)), self.firsts[1:]))
    self.targets_WM, self.inside_WM = _filled_up(self.ids)

  @property
  def longest(self) -> int:
    """M: the ids of the longest word."""
    return self.targets_WM.shape[1]

  def described(self) -> str:
    """The classes, their words, and how many ids these have."""
    shown = []
    for name, group in itertools.groupby(range(len(self.ids)), self._classes.__getitem__):
      parts = (f'{self._names[i]!r} ({len(self.ids[i])})' for i in group)
      shown.append(f'{name}: {", ".join(parts)}')
    return '; '.join(shown)

  def partly_unknown(self) -> list[str]:
    """The words of which the tokenizer does not know a part."""
    return [word for word, count in zip(self._names, self._unknown, strict=True) if count]

  def _check(self) -> None:
    known: dict[bytes, int] = {}
    for i, (ids, unknown) in enumerate(zip(self.ids, self._unknown, strict=True)):
      name, word = self._classes[i], self._names[i]
      if not word.strip() or not len(ids):
        raise ValueError(f'objective.verbalizers: the word {word!r} of {name!r} has no token.')
      if unknown == len(ids):
        raise ValueError(
          f'objective.verbalizers: the tokenizer knows no part of the word {word!r} of {name!r}; '
          'choose another one.'
        )
      other = known.setdefault(np.asarray(ids, np.int32).tobytes(), i)
      if other != i:
        raise ValueError(
          f'objective.verbalizers: {word!r} of {name!r} has the tokens of {self._names[other]!r} '
          f'of {self._classes[other]!r}; give each class words of its own.'
        )


def _listed(name: str, words: Any) -> list[str]:
  found = [words] if isinstance(words, str) else words
  if not isinstance(found, list | tuple) or not found or not all(map(_is_text, found)):
    raise ValueError(
      f'objective.verbalizers[{name!r}]={words!r} must be a word or a list of words.'
    )
  return list(found)


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _filled_up(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Rows of one length, filled up by zeros, and where they are not; [rows, longest] both."""
  longest = max(map(len, rows))
  values = np.zeros((len(rows), longest), np.int32)
  for row, given in zip(values, rows, strict=True):
    row[: len(given)] = given
  return values, np.arange(longest) < np.array([len(row) for row in rows])[:, None]


def stems(words: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
  """The fewest continuations of a context behind which all words are read: a word's last id is
  predicted from those before it, so these must stand there, and words that begin alike share them.

  Args:
    words: the ids of each word.

  Returns:
    The continuations, and for each word the number of one that it is read behind.

  Example:
    >>> stems([[5], [7, 8], [7, 9, 4]])
    ([(7, 9)], [0, 0, 0])
  """
  needed = dict.fromkeys(tuple(map(int, word[:-1])) for word in words)
  begins = lambda stem, other: other[: len(stem)] == stem
  kept = [s for s in needed if not any(s != other and begins(s, other) for other in needed)]
  read = [next(i for i, s in enumerate(kept) if begins(tuple(word[:-1]), s)) for word in words]
  return kept, read


def classes_of(
  classes: Sequence[str] | None, verbalizers: Mapping[str, Any] | None
) -> tuple[str, ...]:
  """The classes that options name.

  Raises:
    ValueError: fewer than two, one without a word, or a word for another.
  """
  found = tuple(classes or verbalizers or ())
  if len(set(found)) < max(2, len(found)):
    raise ValueError(
      'objective.verbalizers must give words for at least two different classes, as in '
      "{'positive': 'great', 'negative': 'terrible'}; there are "
      f'{", ".join(map(repr, found)) or "none, and no labels of training documents to take"}.'
    )
  for name in verbalizers or {}:
    if name not in found:
      raise ValueError(
        f'objective.verbalizers has words for {name!r}, which objective.classes does not have.'
      )
  if verbalizers:
    _check_verbalized(found, verbalizers, 'objective.classes')
  return found


def _check_verbalized(names: Sequence[str], known: Sequence[str], where: str) -> None:
  if missing := [name for name in names if name not in known]:
    raise ValueError(
      f'{where}: no word for {", ".join(map(repr, missing))}; objective.verbalizers has '
      f'{", ".join(map(repr, known))}: give it a word or a list of words.'
    )


def check_labels(documents: Documents, classes: Sequence[str]) -> None:
  """Raises ValueError for labels that are no class, with the document where the first stands."""
  first: dict[str, int] = {}
  for index, label in enumerate(documents.values('label') or ()):
    if label is not None and not isinstance(label, list | tuple):
      first.setdefault(str(label), index)
  missing = [name for name in first if name not in classes]
  if missing:
    _check_verbalized(missing, classes, documents.where(first[missing[0]]))
