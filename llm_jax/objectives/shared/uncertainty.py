"""How unsure an answer is, from the probabilities of its classes: what active learning chooses
texts by (Settles 2009, "Active Learning Literature Survey", section 3.1).
"""

from collections.abc import Sequence

import numpy as np

# The fields of an answer that say how sure it is.
MEASURES = ('entropy', 'margin', 'probability')


def uncertainty(
  probabilities: Sequence[float] | np.ndarray, multilabel: bool = False
) -> dict[str, float]:
  """`entropy` in nats, high where a model is unsure, and `margin`, low there.

  Args:
    probabilities: [C], of each class.
    multilabel: each class applies or not, whatever the others do.

  Returns:
    The entropy of the classes, and by how much the best is ahead of the second; in multilabel the
    sum of the entropies of all classes, and the smallest |2p - 1|.

  Example:
    >>> uncertainty([0.5, 0.25, 0.25])['margin']
    0.25
  """
  p_C = np.clip(np.asarray(probabilities, np.float64), 0, 1)
  if multilabel:
    margin = np.min(np.abs(2 * p_C - 1))
    return {'entropy': _entropy(p_C) + _entropy(1 - p_C), 'margin': float(margin)}
  second, best = np.sort([0.0, *p_C])[-2:]
  return {'entropy': _entropy(p_C), 'margin': float(best - second)}


def _entropy(p_C: np.ndarray) -> float:
  """-sum p log p, where 0 log 0 is 0."""
  possible = p_C[p_C > 0]
  return float(-np.sum(possible * np.log(possible))) + 0.0  # not -0.0
