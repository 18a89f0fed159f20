"""Dropout (Srivastava et al. 2014, jmlr.org/papers/v15/srivastava14a.html), the inverted form: what is kept grows."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
  """Zero with probability `rate`, else x / (1 - rate), in the type of `x`.

  The places depend on `rng` and the shape alone, not on the mesh. The barrier keeps the compiler from drawing the same numbers
  anew in each of the products that read the result: one draw, one byte a place.
  """
  keep = jax.lax.optimization_barrier(jax.random.bernoulli(rng, 1.0 - rate, x.shape))
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
