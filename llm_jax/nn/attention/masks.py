"""What all implementations of attention share: which scores count, what is added to them, and the
name of what their backward passes read.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Output, and log of the sum of exponentials, for remat policies (`checkpoint_name` of
# `jax.ad_checkpoint`).
RESIDUALS = 'attention'


class Prefix(NamedTuple):
  """Keys and values before those of a row, [P, K, H] each, which all of its tokens see, whatever
  their document."""

  keys: jax.Array
  values: jax.Array


def pairs(
  segments_BT: jax.Array | None, key_segments_BS: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
  """The segments of queries and keys, which are those of the same row where keys have none of their
  own; None where there is one document per row.
  """
  if key_segments_BS is None:
    return None if segments_BT is None else (segments_BT, segments_BT)
  if segments_BT is None:
    raise ValueError('keys of another row have segments, so that queries need theirs.')
  return segments_BT, key_segments_BS


def by_distance(bias_ND: jax.Array, indices_T: jax.Array, indices_S: jax.Array) -> jax.Array:
  """What is added to the score of each query and key, [B or 1, N, T, S].

  Args:
    bias_ND: for each head and each distance, query less key; distance 0 stands in the middle.
    indices_T: of the queries in their row, [T], or [B, T] where each row has its own.
    indices_S: of the keys in it.
  """
  middle = bias_ND.shape[1] // 2
  distance_BTS = jnp.atleast_2d(indices_T)[:, :, None] - indices_S
  return jnp.moveaxis(bias_ND[:, distance_BTS + middle], 0, 1)


def visible(
  indices_T: jax.Array,
  indices_S: jax.Array,
  segments: tuple[jax.Array, jax.Array] | None,
  causal: bool,
  window: int | None,
  open_BS: jax.Array | None = None,
) -> jax.Array | None:
  """Which key each query may see: bool, [B or 1, 1, 1, T, S]; None where every query sees every
  key.

  Args:
    indices_T: of the queries in their row, [T], or [B, T] where each row has its own.
    indices_S: of the keys in it.
    segments: document numbers of queries [B, T] and keys [B, S]; None for one document.
    causal: as in `llm_jax.nn.attention.dispatch.attention`.
    window: as there.
    open_BS: not 0 for keys that are seen from before them too; None for none.
  """
  masks = []
  queries = jnp.atleast_2d(indices_T)[:, None, None, :, None]
  distance = queries - indices_S[None, None, None, None]
  if causal:
    seen = distance >= 0
    masks.append(seen if open_BS is None else seen | (open_BS[:, None, None, None, :] > 0))
  if window is not None:
    masks.append(distance < window if causal else jnp.abs(distance) <= window // 2)
  if segments is not None:
    masks.append((segments[0][:, :, None] == segments[1][:, None, :])[:, None, None])
  return functools.reduce(jnp.logical_and, masks) if masks else None
