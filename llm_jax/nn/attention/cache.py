"""Attention of rows that grow token by token: the keys and values that a layer keeps of them.

Letters are those of `llm_jax.nn.options`; S is the number of slots. The token at position p stands
in slot p mod S, so that a layer with a window needs no more slots than its window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.nn.attention.masks import Prefix, by_distance
from llm_jax.parallel import sharding


class KeyValues(NamedTuple):
  """Keys and values of the tokens so far, [B, K, S, H] each."""

  keys: jax.Array
  values: jax.Array


class Crossing(NamedTuple):
  """What a layer that reads a memory keeps: of its own tokens, and of the memory, which is read
  once.
  """

  own: KeyValues
  memory: KeyValues


def extended(
  cache: KeyValues, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_B: jax.Array
) -> KeyValues:
  """A cache with new tokens in it.

  Args:
    cache: of one layer.
    k_BTKH: keys: of the newest token where T = 1; otherwise of the first tokens, in place of all
      that the cache held.
    v_BTKH: their values.
    lengths_B: tokens of each row so far, these included; positions from there on are padding, and
      stay out.
  """
  S = cache.keys.shape[2]
  if k_BTKH.shape[1] == 1:
    slots_B = (lengths_B - 1) % S
    new = [_with_newest(old, x, slots_B) for old, x in zip(cache, (k_BTKH, v_BTKH), strict=True)]
  else:
    indices_BS = jnp.clip(_positions(lengths_B, S), 0, k_BTKH.shape[1] - 1)
    new = [_of_first(old, x, indices_BS) for old, x in zip(cache, (k_BTKH, v_BTKH), strict=True)]
  return KeyValues(*(sharding.constrain(x, 'batch', 'kv_heads', None, None) for x in new))


def remembered(k_BSKH: jax.Array, v_BSKH: jax.Array, slots: int) -> KeyValues:
  """Keys and values of a memory, in `slots` slots."""
  room = [(0, 0), (0, 0), (0, slots - k_BSKH.shape[1]), (0, 0)]
  new = (jnp.pad(x.swapaxes(1, 2), room) for x in (k_BSKH, v_BSKH))
  return KeyValues(*(sharding.constrain(x, 'batch', 'kv_heads', None, None) for x in new))


def recall(
  q_B1NH: jax.Array,
  cache: KeyValues,
  lengths_B: jax.Array,
  prefix: Prefix | None = None,
  bias_ND: jax.Array | None = None,
) -> jax.Array:
  """Mixes the values of a cache by the softmax of scaled scores, at least float32, for the newest
  token of each row.

  Args:
    q_B1NH: its queries.
    cache: has the newest token in it. All that is in it is seen.
    lengths_B: tokens of each row so far, at least 1.
    prefix: keys and values before those of the cache; None for none.
    bias_ND: what is added to scores by distance, as `masks.by_distance` has it; each token stands
      in the slot of its position.

  Returns:
    [B, 1, N, H] in the type of `q_B1NH`.
  """
  S = cache.keys.shape[2]
  full_BS, bias_BNS = _positions(lengths_B, S) >= 0, None
  if bias_ND is not None:
    bias_BNS = by_distance(bias_ND, lengths_B[:, None] - 1, jnp.arange(S))[:, :, 0]
  if prefix is not None:
    cache = KeyValues(*(_after(x, old) for x, old in zip(prefix, cache, strict=True)))
    before = len(prefix.keys), 0
    full_BS = jnp.pad(full_BS, [(0, 0), before], constant_values=True)
    bias_BNS = None if bias_BNS is None else jnp.pad(bias_BNS, [(0, 0), (0, 0), before])
  return mixed(q_B1NH, cache, full_BS, bias_BNS)


def mixed(
  q_B1NH: jax.Array, cache: KeyValues, seen_BS: jax.Array, bias_BNS: jax.Array | None = None
) -> jax.Array:
  """As `recall`, of the slots that are seen."""
  (B, _, N, H), (K, S) = q_B1NH.shape, cache.keys.shape[1:3]
  dtype = jnp.promote_types(q_B1NH.dtype, jnp.float32)
  q_BKGH = q_B1NH.reshape(B, K, N // K, H)
  scores_BKGS = jnp.einsum('BKGH,BKSH->BKGS', q_BKGH, cache.keys, preferred_element_type=dtype)
  scores_BKGS = scores_BKGS * H**-0.5
  if bias_BNS is not None:
    scores_BKGS += bias_BNS.astype(dtype).reshape(B, K, N // K, S)
  scores_BKGS = jnp.where(seen_BS[:, None, None], scores_BKGS, jnp.finfo(dtype).min / 2)
  weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(cache.values.dtype)
  return jnp.einsum('BKGS,BKSH->BKGH', weights_BKGS, cache.values).reshape(B, 1, N, H)


def _after(x_PKH: jax.Array, old_BKSH: jax.Array) -> jax.Array:
  """The slots of a cache, behind those of a prefix."""
  x_KPH = x_PKH.swapaxes(0, 1).astype(old_BKSH.dtype)
  x_BKPH = jnp.broadcast_to(x_KPH, (len(old_BKSH), *x_KPH.shape))
  return jnp.concatenate([x_BKPH, old_BKSH], axis=2)


def _with_newest(old_BKSH: jax.Array, x_B1KH: jax.Array, slots_B: jax.Array) -> jax.Array:
  """What a cache held, with one token more in the slot of each row."""

  def write(old_KSH, new_1KH, slot):
    return jax.lax.dynamic_update_slice_in_dim(old_KSH, new_1KH.swapaxes(0, 1), slot, 1)

  return jax.vmap(write)(old_BKSH, x_B1KH.astype(old_BKSH.dtype), slots_B)


def _of_first(old_BKSH: jax.Array, x_BTKH: jax.Array, indices_BS: jax.Array) -> jax.Array:
  """The tokens that stand in each slot, of the first ones of the row."""
  x_BSKH = jnp.take_along_axis(x_BTKH, indices_BS[..., None, None], axis=1)
  return x_BSKH.swapaxes(1, 2).astype(old_BKSH.dtype)


def _positions(lengths_B: jax.Array, slots: int) -> jax.Array:
  """The position of the token in each slot, [B, S]; negative where there is none yet."""
  last_B1 = lengths_B[:, None] - 1
  return last_B1 - (last_B1 - jnp.arange(slots)[None]) % slots
