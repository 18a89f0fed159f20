"""Loss and the numbers that go with it over a validation set, and two baselines: unigram entropy
and `xz -9`.
"""

import lzma
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from llm_jax.core import metrics
from llm_jax.core.contracts import Batch, Metrics, Objective, Validation


class Evaluator:
  """The loss, and the means of all metrics of the objective."""

  def evaluate(self, validation: Validation) -> tuple[dict[str, float], str]:
    """'loss', the mean of each metric, and the objective's summary; no report."""
    means = evaluate(validation.losses, validation.batches(), validation.terms)
    return means | validation.objective.summary(means), ''


def evaluate(
  losses: Callable[[Batch], Metrics], batches: Iterable[Batch], terms: Mapping[str, float]
) -> dict[str, float]:
  """Means over all batches: sums and weights are added in float64 on the host and divided once.

  Args:
    losses: batch -> metrics; fetched one batch late, so that the device does not wait.
    batches: the validation set; rows of zeros count for nothing.
    terms: the coefficient of each metric that is a loss.

  Returns:
    'loss', and the mean of each metric by its name: NaN where nothing counted; such a term adds 0
    to the loss.

  Raises:
    ValueError: there is no batch.
  """
  totals: dict[str, np.ndarray] = {}
  waiting = None
  for batch in batches:
    dispatched = losses(batch)
    if waiting is not None:
      _add(totals, waiting)
    waiting = dispatched
  if waiting is None:
    raise ValueError(
      'the validation set has no batch; raise config.data.validation or config.evaluation.rows.'
    )
  _add(totals, waiting)
  means = metrics.divide(totals)
  loss = 0.0
  for name, coefficient in terms.items():
    if totals[name][1]:
      loss += coefficient * means[name]
  return {'loss': float(loss)} | means


def unigram_loss(batches: Iterable[Batch], objective: Objective) -> float | None:
  """Entropy in nats of the distribution of the counted targets: the loss of the best guess that
  does not look at the text.

  Returns:
    The entropy, or None where the objective predicts no tokens.

  Raises:
    ValueError: no target counts.
  """
  counts = np.zeros(0)
  for batch in batches:
    found = objective.targets(batch)
    if found is None:
      return None
    ids, weights = found
    new = np.bincount(np.asarray(ids)[np.asarray(weights) > 0])
    size = max(len(counts), len(new))
    counts = _padded(counts, size) + _padded(new, size)
  if not counts.sum():
    raise ValueError(
      'no target of the validation set counts; raise config.data.validation or '
      'config.evaluation.rows.'
    )
  p = counts[counts > 0] / counts.sum()
  return float(-np.sum(p * np.log(p)))


def xz_bits_per_byte(text: bytes) -> float:
  """Bits that `xz -9` needs for each byte of `text`, container included; ValueError for an empty
  text.
  """
  if not text:
    raise ValueError('an empty text has no bits per byte.')
  return 8 * len(lzma.compress(text, preset=9)) / len(text)


def _add(totals: dict[str, np.ndarray], new: Metrics) -> None:
  for name, sum_and_weight in jax.device_get(dict(new)).items():
    totals[name] = totals.get(name, 0) + np.asarray(sum_and_weight, np.float64)


def _padded(counts: np.ndarray, size: int) -> np.ndarray:
  return np.pad(counts, (0, size - len(counts)))
