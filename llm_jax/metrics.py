"""(sum, weight) pairs: kept apart on the device until the end, then divided once by the global weight.

Pairs of parts of a batch (micro-batches, hosts, evaluation batches) add up to the pair of the whole, which means of parts
do not: a mean of means weighs a nearly empty part like a full one.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llm_jax.contracts import Pairs


def add(a: Pairs, b: Pairs) -> Pairs:
  """The pairs of two parts together; both must have the same names."""
  return jax.tree.map(jnp.add, a, b)


def divide(pairs: Pairs) -> dict[str, jax.Array]:
  """The means by name; NaN where the weight is 0, for then there is none."""
  return {name: _mean(value, weight, empty=jnp.nan) for name, (value, weight) in pairs.items()}


def total(pairs: Pairs, terms: Mapping[str, float]) -> jax.Array:
  """The loss: the sum over `terms` of coefficient * sum / weight, a term of weight 0 counting 0 (its gradient too).

  Args:
    pairs: (sum, weight) by name; for a part of a batch, the part's sum with the weight of the whole.
    terms: coefficients by name of the pair.
  """
  return sum(coefficient * _mean(*pairs[name], empty=0.0) for name, coefficient in terms.items())


def _mean(value: jax.Array, weight: jax.Array, empty: float) -> jax.Array:
  # The inner `where` keeps a division by 0 out of the gradient.
  return jnp.where(weight == 0, empty, value / jnp.where(weight == 0, 1, weight))
