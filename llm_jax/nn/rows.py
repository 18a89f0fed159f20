"""Reading rows at some of their indices."""

import jax
import jax.numpy as jnp


def at(x_BT: jax.Array, indices_BP: jax.Array | None) -> jax.Array:
  """`x` at some indices of each row, [B, P, ...]; None for all of it.

  Example:
    >>> at(jnp.array([[5, 6, 7]]), jnp.array([[2, 0]]))
    Array([[7, 5]], dtype=int32)
  """
  if indices_BP is None:
    return x_BT
  trailing = (1,) * (x_BT.ndim - 2)
  return jnp.take_along_axis(x_BT, indices_BP.reshape(*indices_BP.shape, *trailing), 1)
