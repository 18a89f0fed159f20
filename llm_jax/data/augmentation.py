"""Further training records that say the same in other words: EDA (Wei and Zou 2019, "Easy Data
Augmentation", arXiv:1901.11196, section 2), with synonyms of the user's own.

A copy of a record is another text with the same label: some of its words replaced by synonyms,
synonyms inserted, words swapped, or words left out, one of these at a time. What a copy says
depends on the seed, the index of its record and its number alone.

Or a masked language model replaces words (`Blanks`): Kumar et al. 2020, "Data Augmentation using
Pre-trained Transformer Models", arXiv:2003.02245, section 3, without their fine-tuning.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from llm_jax.core import files
from llm_jax.core.contracts import Record, Source
from llm_jax.data import cache

BY_SYNONYMS = ('replace', 'insert')
OPERATIONS = (*BY_SYNONYMS, 'swap', 'delete')
WORD = re.compile(r"\w+(?:['’-]\w+)*")
SIGNS = '.,;:!?"\'()[]{}<>«»„“”‚‘’…'  # around a word, no part of it


@dataclasses.dataclass(frozen=True)
class Rules:
  """How copies are made.

  Attributes:
    synonyms: a file, `word<TAB>synonym,synonym` per line, or .json, an object of lists. None: words
      are swapped and left out only.
    rate: the share of the words of a text that one copy changes, at least one (alpha in the paper).
    copies: of each training record.
    operations: some of `OPERATIONS`; None for all that are possible.
    seed: of what is drawn.

  Raises:
    ValueError: a value that is not possible, a file that cannot be read.
  """

  synonyms: str | None = None
  rate: float = 0.1
  copies: int = 2
  operations: tuple[str, ...] | None = None
  seed: int = 0

  def __post_init__(self) -> None:
    if not 0 < self.rate < 1:
      raise ValueError(
        f'config.data.augment.rate={self.rate} must be a share of the words, above 0 and below 1.'
      )
    if self.copies < 1:
      raise ValueError(
        f'config.data.augment.copies={self.copies} must be at least 1; leave the section out for '
        'none.'
      )
    if self.seed < 0:
      raise ValueError(f'config.data.augment.seed={self.seed} must not be negative.')
    for name in self.operations or ():
      if name not in OPERATIONS:
        raise ValueError(
          f'config.data.augment.operations: {name!r} must be one of {", ".join(OPERATIONS)}.'
        )
      if name in BY_SYNONYMS and not self.synonyms:
        raise ValueError(
          f'config.data.augment.operations: {name!r} needs config.data.augment.synonyms=FILE.'
        )
    _ = self.known  # a file that cannot be read is said at once

  @functools.cached_property
  def known(self) -> dict[str, tuple[str, ...]]:
    """Synonyms by word, in small letters."""
    return read_synonyms(files.local('config.data.augment.synonyms', self.synonyms))

  @property
  def chosen(self) -> tuple[str, ...]:
    """The operations of which each copy is made by one."""
    every = OPERATIONS if self.synonyms else OPERATIONS[len(BY_SYNONYMS) :]
    return self.operations or every

  @property
  def fingerprint(self) -> str:
    """Changes whenever a copy could."""
    known = json.dumps([self.known, self.rate, self.copies, self.chosen, self.seed])
    return hashlib.blake2b(known.encode(), digest_size=16).hexdigest()

  def __call__(self, text: str, rng: np.random.Generator) -> str:
    """Another text, in which the words stand with single spaces between; the same where nothing can
    be changed.
    """
    words = text.split()
    possible = [name for name in self.chosen if self._possible(name, words)]
    if not possible:
      return text
    operation = _BY_NAME[possible[rng.integers(len(possible))]]
    return ' '.join(operation(words, self, rng))

  def _possible(self, name: str, words: Sequence[str]) -> bool:
    if name in BY_SYNONYMS:
      return any(_core(word).lower() in self.known for word in words)
    return len(words) > 1


class Augmented:
  """The records of a source, and after them the copies of each, as a source.

  Args:
    source: gives the records.
    rules: how copies are made.

  Attributes:
    fingerprint: changes whenever the records could.
    originals: [records] int64, the record that each of them is or is a copy of.
  """

  def __init__(self, source: Source, rules: Rules):
    self.source, self.rules = source, rules
    self.fingerprint = f'{source.fingerprint} {rules.fingerprint}'
    first = np.arange(len(source))
    self.originals = np.concatenate([first, np.repeat(first, rules.copies)])

  def __len__(self) -> int:
    return len(self.originals)

  def __getitem__(self, index: int) -> dict[str, Any]:
    original = int(self.originals[index])
    record = self.source[original]
    number = index - len(self.source) - original * self.rules.copies
    return record if number < 0 else self._copy(record, original, number)

  def where(self, index: int) -> str:
    """Where a record stands, or the one that it is a copy of."""
    original = int(self.originals[index])
    where = getattr(self.source, 'where', 'document {}'.format)(original)
    return where if index < len(self.source) else f'a copy of {where}'

  def _copy(self, record: Record, original: int, number: int) -> dict[str, Any]:
    rng = np.random.default_rng([self.rules.seed, original, number])
    changed = {
      name: self.rules(record[name], rng)
      for name in ('text', 'pair')
      if isinstance(record.get(name), str)
    }
    return dict(record) | changed


class Blanks(NamedTuple):
  """A text with some words to be replaced.

  Attributes:
    parts: of the text, one after another; every second one is a word that is to be replaced.
  """

  parts: tuple[str, ...]

  def masked(self, mask: str) -> str:
    """The text with a mask in place of each of these words."""
    return ''.join(mask if index % 2 else part for index, part in enumerate(self.parts))

  def filled(
    self, candidates: Sequence[Sequence[tuple[str, float]]], rng: np.random.Generator
  ) -> str:
    """The text with other words; a word stays where no other one is among its candidates.

    Args:
      candidates: for each mask, words and their probabilities, by which one is drawn.
      rng: where the randomness comes from.
    """
    parts = list(self.parts)
    for index, found in zip(range(1, len(parts), 2), candidates, strict=True):
      word = parts[index]
      others = [x for x in found if WORD.fullmatch(x[0]) and x[0].lower() != word.lower()]
      if others:
        p = np.array([probability for _, probability in others], np.float64)
        new = others[rng.choice(len(others), p=p / p.sum())][0]
        parts[index] = _spelled_as(new, word)
    return ''.join(parts)


def blanks(text: str, rate: float, rng: np.random.Generator) -> Blanks:
  """A text with a share of its words to be replaced, at least one, chosen evenly.

  Raises:
    ValueError: there is no word in it.
  """
  spans = [match.span() for match in WORD.finditer(text)]
  if not spans:
    raise ValueError(f'{text[:40]!r} has no word that could be replaced.')
  chosen = rng.choice(len(spans), max(1, int(rate * len(spans))), replace=False)
  parts, end = [], 0
  for start, stop in (spans[index] for index in sorted(chosen.tolist())):
    parts += [text[end:start], text[start:stop]]
    end = stop
  return Blanks((*parts, text[end:]))


def split(corpus: cache.Corpus, source: Augmented, share: float) -> tuple[cache.Split, cache.Split]:
  """Training and validation documents, as `Corpus.split` has them without copies, and in training
  the copies of training documents. A copy that says the same as its original, or as what is held
  out, is left out.

  Args:
    corpus: of the source.
    source: the records and their copies.
    share: of the documents, for validation.
  """
  count, (_, held) = len(source.source), corpus.split(share)
  validation = held.ids[held.ids < count]
  trained = ~np.isin(source.originals, validation)
  is_copy = np.arange(len(corpus)) >= count
  known = corpus.hashes == corpus.hashes[source.originals]
  known |= np.isin(corpus.hashes, corpus.hashes[validation])
  train = np.flatnonzero(trained & ~(is_copy & known))
  logging.info(
    'config.data.augment: %d copies of %d training documents; %d more say nothing new and are left '
    'out.',
    np.sum(train >= count),
    np.sum(train < count),
    np.sum(trained & is_copy & known),
  )
  return cache.Split(corpus, train), cache.Split(corpus, validation)


def read_synonyms(path: pathlib.Path | None) -> dict[str, tuple[str, ...]]:
  """Synonyms by word, in small letters; none where there is no file.

  Raises:
    ValueError: no such file, a line that cannot be read, or no synonym in it.
  """
  if path is None:
    return {}
  try:
    text = path.read_text(encoding='utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'not UTF-8'
    raise ValueError(f'config.data.augment.synonyms={path} cannot be read ({reason}).') from error
  found = _from_json(path, text) if path.suffix == '.json' else _from_lines(path, text)
  if not found:
    raise ValueError(
      f'config.data.augment.synonyms={path} holds no synonyms; it must have lines of a word, a tab '
      'and its synonyms with commas between, or be .json, an object of lists.'
    )
  return found


def _from_lines(path: pathlib.Path, text: str) -> dict[str, tuple[str, ...]]:
  found: dict[str, tuple[str, ...]] = {}
  for number, line in enumerate(text.splitlines(), start=1):
    if not line.strip():
      continue
    word, tab, others = line.partition('\t')
    synonyms = tuple(part.strip() for part in others.split(',') if part.strip())
    if not tab or not synonyms or len(word.split()) != 1:
      raise ValueError(
        f'{path}:{number}: {line!r} must be one word, a tab, and its synonyms with commas between.'
      )
    _add(found, word, synonyms)
  return found


def _from_json(path: pathlib.Path, text: str) -> dict[str, tuple[str, ...]]:
  wanted = 'it must be an object from words to lists of their synonyms'
  try:
    read = json.loads(text or '{}')
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}:{error.lineno}: {error.msg}; {wanted}.') from error
  if not isinstance(read, Mapping):
    raise ValueError(f'{path} holds {type(read).__name__}; {wanted}.')
  found: dict[str, tuple[str, ...]] = {}
  for word, synonyms in read.items():
    words = isinstance(synonyms, list) and all(isinstance(x, str) and x.strip() for x in synonyms)
    if not words or not synonyms or len(word.split()) != 1:
      raise ValueError(f'{path}: {word!r} has {synonyms!r}; {wanted}.')
    _add(found, word, synonyms)
  return found


def _add(found: dict[str, tuple[str, ...]], word: str, synonyms: Sequence[str]) -> None:
  key = word.strip().lower()
  found[key] = tuple(dict.fromkeys((*found.get(key, ()), *(x.strip() for x in synonyms))))


def _core(word: str) -> str:
  """A word without the signs around it."""
  return word.strip(SIGNS)


def _count(words: Sequence[str], rules: Rules) -> int:
  return max(1, int(rules.rate * len(words)))


def _synonym(word: str, rules: Rules, rng: np.random.Generator) -> str:
  """One of the synonyms of a word, which begins as the word does; small or capital."""
  core = _core(word)
  synonyms = rules.known[core.lower()]
  return _spelled_as(synonyms[rng.integers(len(synonyms))], core)


def _spelled_as(new: str, old: str) -> str:
  """A word that begins with a capital letter where the old one does."""
  return new[:1].upper() + new[1:] if old[:1].isupper() else new


def _with_synonyms(words: Sequence[str], rules: Rules) -> list[int]:
  return [index for index, word in enumerate(words) if _core(word).lower() in rules.known]


def _replace(words: Sequence[str], rules: Rules, rng: np.random.Generator) -> list[str]:
  """Some words by synonyms; the signs around them stay."""
  known, new = _with_synonyms(words, rules), list(words)
  for index in rng.permutation(known)[: _count(words, rules)].tolist():
    new[index] = new[index].replace(_core(new[index]), _synonym(new[index], rules, rng), 1)
  return new


def _insert(words: Sequence[str], rules: Rules, rng: np.random.Generator) -> list[str]:
  """Synonyms of some words, anywhere."""
  known, new = _with_synonyms(words, rules), list(words)
  for _ in range(_count(words, rules)):
    synonym = _synonym(words[known[rng.integers(len(known))]], rules, rng)
    new.insert(int(rng.integers(len(new) + 1)), synonym)
  return new


def _swap(words: Sequence[str], rules: Rules, rng: np.random.Generator) -> list[str]:
  """Two words change their positions, a few times."""
  new = list(words)
  for _ in range(_count(words, rules)):
    i, j = rng.choice(len(new), 2, replace=False).tolist()
    new[i], new[j] = new[j], new[i]
  return new


def _delete(words: Sequence[str], rules: Rules, rng: np.random.Generator) -> list[str]:
  """Each word is left out at the rate, one at least and never all."""
  out = rng.random(len(words)) < rules.rate
  out[rng.integers(len(words))] = True
  if out.all():
    out[rng.integers(len(words))] = False
  return [word for word, gone in zip(words, out.tolist(), strict=True) if not gone]


_BY_NAME = {'replace': _replace, 'insert': _insert, 'swap': _swap, 'delete': _delete}
