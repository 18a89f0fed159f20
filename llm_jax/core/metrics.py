"""Weighted means: (sum, weight) is kept on the device until the end, then divided once by the
global weight.

The metrics of parts of a batch (micro-batches, hosts, evaluation batches) add up to those of the
whole. Means do not: a mean of means weighs a nearly empty part like a full one.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from llm_jax.core.contracts import Metrics, Number


def divide(metrics: Metrics) -> dict[str, float]:
  """The means by name, of metrics that have been fetched to the host; NaN where the weight is 0.

  Example:
    >>> divide({'loss': (6.0, 4.0), 'accuracy': (0.0, 0.0)})
    {'loss': 1.5, 'accuracy': nan}
  """
  means = {}
  for name, (value, weight) in metrics.items():
    means[name] = float(value) / float(weight) if weight else math.nan
  return means


def shown(values: Mapping[str, object], form: str = '.4f') -> dict[str, str]:
  """Numbers as people read them; strings as they are.

  Example:
    >>> shown({'loss': 2 / 3, 'signature': 'x:1'})
    {'loss': '0.6667', 'signature': 'x:1'}
  """
  return {
    name: value if isinstance(value, str) else format(value, form) for name, value in values.items()
  }


def total(metrics: Metrics, terms: Mapping[str, Number]) -> jax.Array:
  """The loss: coefficient * sum / weight, summed over `terms`.

  A term of weight 0 counts 0, and so does its gradient.

  Args:
    metrics: (sum, weight) by name; for a part of a batch, the part's sum with the weight of the
      whole batch.
    terms: the coefficient of each metric that is a loss.

  Example:
    >>> float(total({'mlm': (6.0, 4.0), 'nsp': (1.0, 2.0)}, {'mlm': 1.0, 'nsp': 2.0}))
    2.5
  """
  parts = [coefficient * _mean(*metrics[name]) for name, coefficient in terms.items()]
  return jnp.asarray(sum(parts))


def of_whole(metrics: Metrics, weights: Mapping[str, Number] | None) -> Metrics:
  """The metrics of a part of a batch, with the weights of the whole batch.

  Args:
    metrics: (sum, weight) by name.
    weights: of the whole batch by name, of these metrics and maybe of others; None where the part
      is all of it.
  """
  if weights is None:
    return metrics
  return {name: (value, weights[name]) for name, (value, _) in metrics.items()}


def _mean(value: ArrayLike, weight: ArrayLike) -> jax.Array:
  """0 where there is no weight; the inner `where` keeps a division by 0 out of the gradient."""
  return jnp.where(weight == 0, 0.0, value / jnp.where(weight == 0, 1, weight))
