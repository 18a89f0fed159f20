"""Scores of a classifier or a regressor per group of texts, and the gaps between groups.

A gap is the largest score of a group less the smallest. Of the share of texts that are given a
class, it is the demographic parity difference; of the true positive rates, the equal opportunity
difference (Hardt, Price and Srebro 2016, arXiv:1610.02413). Both are of the second class of a
binary task, else the largest over the classes.

Intervals are of 95 %: Wilson's (1927) for the accuracy of a group, and for a gap the percentiles of
a bootstrap (Efron 1979) that draws the texts of each group anew, 1,000 times, from a fixed seed. A
gap is never negative, so where groups are alike its interval lies above zero all the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NAMES = ('accuracy', 'macro_f1', 'selection_rate', 'true_positive_rate')
FEW = 10  # a group of fewer texts has no part in gaps
DRAWS, AT_ONCE = 1000, 100
Z = 1.959963984540054  # 97.5 % of a normal distribution lie below


def score(
  field: str,
  groups: Sequence[str],
  predicted: np.ndarray,
  labels: np.ndarray,
  task: str,
  classes: Sequence[str] | None,
) -> tuple[dict[str, float], str]:
  """The gaps between groups, and a table for people.

  Args:
    field: names the slice.
    groups: of each text.
    predicted, labels: [texts] class numbers, [texts, C] bool for multilabel, [texts] numbers for
      regression.
    task: one of 'multiclass', 'binary', 'multilabel', 'regression'.
    classes: their names; None for regression.

  Returns:
    `<field>_<name>_gap` for each name: accuracy, macro_f1, selection_rate, true_positive_rate; in
    regression mse. NaN where fewer than two groups have `FEW` texts.
  """
  names = np.array(groups)
  members = {group: np.flatnonzero(names == group) for group in sorted(set(groups))}
  tables = {
    group: _Outcomes(predicted[chosen], labels[chosen], task, len(classes or ()))
    for group, chosen in members.items()
  }
  enough = [table for table in tables.values() if table.texts >= FEW]
  gaps = _gaps(enough, task, classes or ())
  numbers = {f'{field}_{name}_gap': gap.value for name, gap in gaps.items()}
  return numbers, '\n'.join(_report(field, tables, gaps))


class _Outcomes:
  """The texts of one group: which outcomes there are, and how often.

  Args:
    predicted, labels, task: as in `score`.
    classes: C.

  Attributes:
    texts: how many.
  """

  def __init__(self, predicted: np.ndarray, labels: np.ndarray, task: str, classes: int):
    self.texts, self._task = len(labels), task
    if task == 'regression':
      self._counts = np.ones(self.texts, int)
      self._errors_K = (predicted.astype(np.float64) - labels) ** 2
      return
    if task != 'multilabel':
      predicted, labels = (np.eye(classes, dtype=bool)[x] for x in (predicted, labels))
    both = np.concatenate([predicted, labels], axis=1)
    kinds, self._counts = np.unique(both, axis=0, return_counts=True)
    self._predicted_KC, self._true_KC = np.split(kinds, 2, axis=1)

  def scores(self) -> dict[str, np.ndarray]:
    """Scores by name; rates [C], of the classes that count."""
    return {name: values[0] for name, values in self._scores(self._counts[None]).items()}

  def drawn(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The same for as many texts drawn from these, with `DRAWS` as the first axis."""
    shares, parts = self._counts / self.texts, []
    for _ in range(0, DRAWS, AT_ONCE):
      parts.append(self._scores(rng.multinomial(self.texts, shares, AT_ONCE)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def _scores(self, counts_RK: np.ndarray) -> dict[str, np.ndarray]:
    if self._task == 'regression':
      return {'mse': counts_RK @ self._errors_K / self.texts}
    right_K = np.all(self._predicted_KC == self._true_KC, axis=1)
    hits_RC = counts_RK @ (self._predicted_KC & self._true_KC)
    predicted_RC, true_RC = counts_RK @ self._predicted_KC, counts_RK @ self._true_KC
    occur_RC = (predicted_RC + true_RC > 0) | (self._task == 'multilabel')
    f1_RC = 2 * hits_RC / np.maximum(predicted_RC + true_RC, 1)
    with np.errstate(invalid='ignore'):
      rates_RC = hits_RC / true_RC  # NaN where no text is of the class
    rated = slice(1, 2) if self._task == 'binary' else slice(None)
    return {
      'accuracy': counts_RK @ right_K / self.texts,
      'macro_f1': np.sum(f1_RC * occur_RC, 1) / np.maximum(np.sum(occur_RC, 1), 1),
      'selection_rate': (predicted_RC / self.texts)[:, rated],
      'true_positive_rate': rates_RC[:, rated],
    }


class _Gap(NamedTuple):
  """The largest gap of a score, its interval, and the class that it is of, if it is of one."""

  value: float
  low: float
  high: float
  of: str


def _gaps(tables: Sequence[_Outcomes], task: str, classes: Sequence[str]) -> dict[str, _Gap]:
  if len(tables) < 2:
    names = ('mse',) if task == 'regression' else NAMES
    return dict.fromkeys(names, _Gap(math.nan, math.nan, math.nan, ''))
  rng = np.random.default_rng(0)
  scores, drawn = [table.scores() for table in tables], [table.drawn(rng) for table in tables]
  rated = classes[1:] if task == 'binary' else classes
  gaps = {}
  for name in scores[0]:
    spread_X = _spread(np.stack([group[name] for group in scores]))
    spread_RX = _spread(np.stack([group[name] for group in drawn]))
    of = ''
    if spread_X.ndim:
      of = rated[int(np.argmax(spread_X))]
      spread_X, spread_RX = spread_X.max(), spread_RX.max(axis=1)
    low, high = np.quantile(spread_RX, [0.025, 0.975])
    gaps[name] = _Gap(float(spread_X), float(low), float(high), of)
  return gaps


def _spread(scores_GX: np.ndarray) -> np.ndarray:
  """The largest less the smallest number along the first axis; 0 where there are not two."""
  known = ~np.isnan(scores_GX)
  high = np.max(np.where(known, scores_GX, -np.inf), axis=0)
  low = np.min(np.where(known, scores_GX, np.inf), axis=0)
  return np.where(np.sum(known, axis=0) > 1, high - low, 0.0)


def wilson(share: float, texts: int) -> tuple[float, float]:
  """The score interval of a share (Wilson 1927), of 95 %."""
  spread = Z * math.sqrt(share * (1 - share) / texts + Z**2 / (4 * texts**2))
  middle, scale = share + Z**2 / (2 * texts), 1 + Z**2 / texts
  return (middle - spread) / scale, (middle + spread) / scale


def _report(field: str, tables: Mapping[str, _Outcomes], gaps: Mapping[str, _Gap]) -> Iterator[str]:
  width = max(map(len, ('true_positive_rate gap', *tables)))
  yield f'by {field}, with intervals of 95 %:'
  for group, table in tables.items():
    scores, few = table.scores(), f'  (fewer than {FEW} texts: in no gap)'
    yield (
      f'{group:>{width}} {table.texts:>7} texts'
      + _spelled(scores, table.texts)
      + (few if table.texts < FEW else '')
    )
  for name, gap in gaps.items():
    of = f' of {gap.of}' if gap.of else ''
    yield f'{name + " gap":>{width}} {gap.value:.4f} [{gap.low:.4f}, {gap.high:.4f}]{of}'


def _spelled(scores: Mapping[str, Any], texts: int) -> str:
  if 'mse' in scores:
    return f'  mse {scores["mse"]:.4f}'
  low, high = wilson(float(scores['accuracy']), texts)
  return (
    f'  accuracy {scores["accuracy"]:.4f} [{low:.4f}, {high:.4f}]'
    f'  macro_f1 {scores["macro_f1"]:.4f}'
  )
