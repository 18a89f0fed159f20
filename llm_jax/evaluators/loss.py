"""Loss and the numbers that go with it over a validation set, and two baselines: unigram entropy
and `xz -9`.
"""

import lzma
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from llm_jax.core import metrics
from llm_jax.core.contracts import Batch, Objective, Pairs


def evaluate(
  eval_step: Callable[[Batch], Pairs], batches: Iterable[Batch], objective: Objective
) -> dict[str, float]:
  """Means over all batches: sums and weights are added in float64 on the host and divided once.

  Args:
    eval_step: batch -> (sum, weight) pairs; fetched one batch late, so that the device does not
      wait.
    batches: the validation set; rows of zeros count for nothing.
    objective: names the losses, and gives further numbers.

  Returns:
    'loss', the mean by each pair's name (NaN where nothing counted; such a term adds 0 to the
    loss), and the objective's summary.

  Raises:
    ValueError: there is no batch.
  """
  totals: dict[str, np.ndarray] = {}
  waiting = None
  for batch in batches:
    dispatched = eval_step(batch)
    if waiting is not None:
      _add(totals, waiting)
    waiting = dispatched
  if waiting is None:
    raise ValueError(
      'the validation set has no batch; raise config.data.validation or config.evaluation.rows.'
    )
  _add(totals, waiting)
  means = metrics.divide(totals)
  loss = sum(
    coefficient * means[name] for name, coefficient in objective.terms.items() if totals[name][1]
  )
  return {'loss': float(loss)} | means | objective.summary(means)


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
    counts = np.pad(counts, (0, size - len(counts))) + np.pad(new, (0, size - len(new)))
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


def _add(totals: dict[str, np.ndarray], pairs: Mapping[str, tuple]) -> None:
  for name, pair in jax.device_get(dict(pairs)).items():
    totals[name] = totals.get(name, 0) + np.asarray(pair, np.float64)
