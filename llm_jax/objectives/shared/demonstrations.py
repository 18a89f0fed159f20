"""Demonstrations: texts whose classes are known, in a filled template, that stand before a text.

Brown et al. 2020, "GPT-3", arXiv:2005.14165, section 2; Gao et al. 2021, "LM-BFF",
arXiv:2012.15723, section 6.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core.contracts import Documents
from llm_jax.objectives.shared.templates import ARRAYS, Template

Shot = Sequence[Any]  # class, text, and of pairs the second text; texts are strings or ids


def choose(
  documents: Sequence[Documents], classes: Sequence[str], count: int, seed: int
) -> tuple[Shot, ...]:
  """Documents to be shown before a text, drawn at random: of each class one more than `count`,
  which stands in where a text is one of them.

  Args:
    documents: of each corpus.
    classes: their names.
    count: how many of each class are shown.
    seed: of the choice.

  Returns:
    For each, its class, ids, and of a pair the ids of its second text.

  Raises:
    ValueError: a class with fewer different texts.
  """
  of_class: dict[str, list[tuple[Documents, int]]] = {name: [] for name in classes}
  for split in documents:
    for index, label in enumerate(split.values('label') or ()):
      if label is not None and str(label) in of_class:
        of_class[str(label)].append((split, index))
  rng, chosen = np.random.default_rng(seed), []
  for name, found in of_class.items():
    different: dict[tuple[bytes, bytes], tuple[np.ndarray, ...]] = {}
    for i in rng.permutation(len(found)):
      ids = texts(*found[i])
      if len(ids[0]):
        different.setdefault(key(*ids), ids)
      if len(different) > count:
        break
    if len(different) <= count:
      raise ValueError(
        f'objective.demonstrations={count} needs {count + 1} different training documents of each '
        f'class, since none is shown to itself, and {name!r} has {len(different)}; show fewer, or '
        'name some in objective.shown.'
      )
    for ids in different.values():
      chosen.append((name, *(x.tolist() for x in ids if x is not None)))
  return tuple(chosen)


def texts(documents: Documents, index: int) -> tuple[np.ndarray, np.ndarray | None]:
  """The ids of a document, and of its second text or None."""
  paired = 'pair_tokens' in documents.names
  second = documents.array('pair_tokens', index) if paired else None
  return documents.array('tokens', index), second


def key(text: np.ndarray, pair: np.ndarray | None) -> tuple[bytes, bytes]:
  """What two equal texts, or pairs, have in common."""
  second = () if pair is None else pair
  return np.asarray(text, np.int32).tobytes(), np.asarray(second, np.int32).tobytes()


class Demonstrations:
  """What is shown before a text: of each class `count` others in the same template, filled in with
  the first of the class's words, the classes by turns.

  Args:
    shown: at least `count` of each class; those beyond stand in where a text is one of the others.
    count: how many of each class.
    template: what they stand in.
    answers: class -> the ids of its word.
    separator: ids after each of them.

  Raises:
    ValueError: fewer, or one that is no (class, text) or (class, text, pair).
  """

  def __init__(
    self,
    shown: Sequence[Shot],
    count: int,
    template: Template,
    answers: Mapping[str, np.ndarray],
    separator: np.ndarray,
  ):
    self._count, self._separator = count, separator
    self._by_class: dict[str, dict[tuple[bytes, bytes], np.ndarray]] = {n: {} for n in answers}
    for shot in shown:
      name, *given = _checked(shot, answers, template.paired)
      ids = [_ids(template, field, x) for field, x in zip(ARRAYS, given, strict=False)]
      text, pair = ids if template.paired else (*ids, None)
      self._by_class[name][key(text, pair)] = template.filled(text, pair, answers[name])[0]
    few = [name for name, found in self._by_class.items() if len(found) < count]
    if few:
      raise ValueError(
        f'objective.demonstrations={count} of each class, and objective.shown has fewer different '
        f'ones of {", ".join(map(repr, few))}.'
      )
    self.usual = self._joined(None)
    keys = itertools.chain.from_iterable(self._by_class.values())
    self._others = {each: self._joined(each) for each in keys}
    self.lengths = frozenset(len(text) // 4 for text, _ in self._others)

  def __call__(self, text: np.ndarray, pair: np.ndarray | None) -> np.ndarray:
    """The ids of what is shown before a text, which is not among it."""
    return self._others.get(key(text, pair), self.usual)

  def _joined(self, own: tuple[bytes, bytes] | None) -> np.ndarray:
    """All but `own`, each with the separator after it."""
    by_class = [
      [ids for each, ids in found.items() if each != own][: self._count]
      for found in self._by_class.values()
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_class))
    parts = [np.append(ids, self._separator) for ids in turns if ids is not None]
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


def _checked(shot: Shot, answers: Mapping[str, Any], paired: bool) -> tuple[Any, ...]:
  size = 3 if paired else 2
  if not isinstance(shot, list | tuple) or len(shot) != size or str(shot[0]) not in answers:
    wanted = '(class, text, pair)' if paired else '(class, text)'
    raise ValueError(
      f'objective.shown has {str(shot)[:80]}; each must be {wanted}, the class one of '
      f'{", ".join(answers)}.'
    )
  return str(shot[0]), *shot[1:]


def _ids(template: Template, field: str, given: Any) -> np.ndarray:
  return template.text(field, given) if isinstance(given, str) else np.asarray(given, np.int32)
