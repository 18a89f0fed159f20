"""What all implementations of attention share: which scores count, and the name of what their
backward passes read.
"""

import functools

import jax
import jax.numpy as jnp

# for remat policies (`jax.ad_checkpoint.checkpoint_name`): output, and log of the sum of
# exponentials
RESIDUALS = 'attention'


def visible(
  places_T: jax.Array,
  places_S: jax.Array,
  segments: tuple[jax.Array, jax.Array] | None,
  causal: bool,
  window: int | None,
) -> jax.Array | None:
  """Which key each query may see: bool, [B or 1, 1, 1, T, S]; None where every query sees every
  key.

  Args:
    places_T: places of the queries in their row, [T], or [B, T] where each row has its own.
    places_S: places of the keys in it.
    segments: document numbers of queries [B, T] and keys [B, S]; None for one document.
    causal: as in `llm_jax.nn.attention.dispatch.attention`.
    window: as there.
  """
  masks = []
  distance = jnp.atleast_2d(places_T)[:, None, None, :, None] - places_S[None, None, None, None]
  if causal:
    masks.append(distance >= 0)
  if window is not None:
    masks.append(distance < window if causal else jnp.abs(distance) <= window // 2)
  if segments is not None:
    masks.append((segments[0][:, :, None] == segments[1][:, None, :])[:, None, None])
  return functools.reduce(jnp.logical_and, masks) if masks else None
