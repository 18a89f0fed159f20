"""(sum, weight) pairs: kept apart on the device until the end, then divided once by the global
weight.

Pairs of parts of a batch (micro-batches, hosts, evaluation batches) add up to the pair of the
whole, which means of parts
do not: a mean of means weighs a nearly empty part like a full one.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.contracts import Pairs


def divide(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
  """The means by name, of pairs that have been fetched to the host; NaN where the weight is 0, for
  then there is none.
  """
  return {
    name: float(value) / float(weight) if weight else math.nan
    for name, (value, weight) in pairs.items()
  }


def total(pairs: Pairs, terms: Mapping[str, float]) -> jax.Array:
  """The loss: the sum over `terms` of coefficient * sum / weight, a term of weight 0 counting 0
  (its gradient too).

  Args: pairs: (sum, weight) by name; for a part of a batch, the part's sum with the weight of the
    whole. terms: coefficients by name of the pair.
  """
  return sum(coefficient * _mean(*pairs[name], empty=0.0) for name, coefficient in terms.items())


def _mean(value: jax.Array, weight: jax.Array, empty: float) -> jax.Array:
  # The inner `where` keeps a division by 0 out of the gradient.
  return jnp.where(weight == 0, empty, value / jnp.where(weight == 0, 1, weight))
