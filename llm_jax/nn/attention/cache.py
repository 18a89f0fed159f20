"""Attention of rows that grow token by token: the keys and values that a layer keeps of them.

Letters are those of `llm_jax.nn.options`; S is the number of slots. The token at position p stands
in slot p mod S, so that a layer with a window needs no more slots than its window.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.nn.attention.masks import Prefix, by_distance
from llm_jax.parallel import sharding

LARGEST = 127  # in 8 bits


class Rounded(NamedTuple):
  """Keys, or values, in 8 bits: whole numbers, and a scale for each token of each head.

  Attributes:
    values: int8 [B, K, S, H].
    scale: float32 [B, K, S, 1].
  """

  values: jax.Array
  scale: jax.Array


class KeyValues(NamedTuple):
  """Keys and values of the tokens so far, [B, K, S, H] each."""

  keys: jax.Array | Rounded
  values: jax.Array | Rounded

  @property
  def slots(self) -> int:
    """S."""
    return jax.tree.leaves(self.keys)[0].shape[-2]


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> KeyValues:
  """What a cache begins with.

  Args:
    shape: [..., K, S, H].
    dtype: int8 for numbers of 8 bits.
  """

  def zeros() -> jax.Array | Rounded:
    if jnp.dtype(dtype) != jnp.int8:
      return jnp.zeros(shape, dtype)
    return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))

  return KeyValues(zeros(), zeros())


class Crossing(NamedTuple):
  """What a layer that reads a memory keeps: of its own tokens, and of the memory, which is read
  once.
  """

  own: KeyValues
  memory: KeyValues


def extended(
  cache: KeyValues,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  lengths_B: jax.Array,
  begun_B: jax.Array | None = None,
) -> KeyValues:
  """A cache with new tokens in it.

  Args:
    cache: of one layer.
    k_BTKH: keys: of the newest token where T = 1; otherwise of the first tokens, in place of all
      that the cache held.
    v_BTKH: their values.
    lengths_B: tokens of each row so far, these included; positions from there on are padding, and
      stay out.
    begun_B: how many tokens of each row the cache holds, which these follow, however many they are;
      None as said above.
  """
  S = cache.slots
  given = KeyValues(*(_as(old, x) for old, x in zip(cache, (k_BTKH, v_BTKH), strict=True)))
  if begun_B is not None:
    write = functools.partial(_with_more, indices_BS=_positions(lengths_B, S) - begun_B[:, None])
  elif k_BTKH.shape[1] == 1:
    write = functools.partial(_with_newest, slots_B=(lengths_B - 1) % S)
  else:
    indices_BS = jnp.clip(_positions(lengths_B, S), 0, k_BTKH.shape[1] - 1)
    write = functools.partial(_of_first, indices_BS=indices_BS)
  return _laid_out(jax.tree.map(write, cache, given))


def remembered(cache: KeyValues, k_BSKH: jax.Array, v_BSKH: jax.Array) -> KeyValues:
  """Keys and values of a memory, in the slots of a cache and in its form."""
  room = [(0, 0), (0, 0), (0, cache.slots - k_BSKH.shape[1]), (0, 0)]
  given = KeyValues(*(_as(old, x) for old, x in zip(cache, (k_BSKH, v_BSKH), strict=True)))
  write = lambda old, x: jnp.pad(x.swapaxes(1, 2).astype(old.dtype), room)
  return _laid_out(jax.tree.map(write, cache, given))


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
  S = cache.slots
  full_BS, bias_BNS = _positions(lengths_B, S) >= 0, None
  if bias_ND is not None:
    bias_BNS = by_distance(bias_ND, lengths_B[:, None] - 1, jnp.arange(S))[:, :, 0]
  if prefix is not None:
    given = KeyValues(*(_as(old, x[None]) for old, x in zip(cache, prefix, strict=True)))
    cache = jax.tree.map(_after, given, cache)
    before = len(prefix.keys), 0
    full_BS = jnp.pad(full_BS, [(0, 0), before], constant_values=True)
    bias_BNS = None if bias_BNS is None else jnp.pad(bias_BNS, [(0, 0), (0, 0), before])
  return mixed(q_B1NH, cache, full_BS, bias_BNS)


def continued(
  q_BTNH: jax.Array,
  cache: KeyValues,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  begun_B: jax.Array,
  window: int | None = None,
  prefix: Prefix | None = None,
) -> jax.Array:
  """As `recall`, for several tokens that follow those in a cache: each sees itself, those before it
  among them, and those in the cache.

  Args:
    q_BTNH: their queries.
    cache: has none of them in it.
    k_BTKH: their keys.
    v_BTKH: their values.
    begun_B: how many tokens of each row the cache holds.
    window: how far a token sees; None for everywhere.
    prefix: keys and values before those of the cache, which all see; None for none.

  Returns:
    [B, T, N, H] in the type of `q_BTNH`.
  """
  (B, T, N, H), (S, K) = q_BTNH.shape, (cache.slots, k_BTKH.shape[2])
  dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
  new_BT = begun_B[:, None] + jnp.arange(T)
  seen_BTS = _seen(new_BT, jnp.concatenate([_positions(begun_B, S), new_BT], axis=1), window)
  if prefix is not None:
    given = KeyValues(*(_as(old, x[None]) for old, x in zip(cache, prefix, strict=True)))
    cache, S = jax.tree.map(_after, given, cache), S + len(prefix.keys)
    seen_BTS = jnp.pad(seen_BTS, [(0, 0), (0, 0), (len(prefix.keys), 0)], constant_values=True)
  q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  keys_BKSH, key_scale = _wide(cache.keys, q_BTNH.dtype)
  score = functools.partial(jnp.einsum, preferred_element_type=dtype)
  old_BKGTS = score('BKGTH,BKSH->BKGTS', q_BKGTH, keys_BKSH) * _over_queries(key_scale)
  scores_BKGTS = jnp.concatenate([old_BKGTS, score('BKGTH,BSKH->BKGTS', q_BKGTH, k_BTKH)], axis=-1)
  scores_BKGTS = jnp.where(
    seen_BTS[:, None, None], scores_BKGTS * H**-0.5, jnp.finfo(dtype).min / 2
  )
  weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
  values_BKSH, value_scale = _wide(cache.values, q_BTNH.dtype)
  old_BKGTS = (weights_BKGTS[..., :S] * _over_queries(value_scale)).astype(values_BKSH.dtype)
  x_BTKGH = jnp.einsum('BKGTS,BKSH->BTKGH', old_BKGTS, values_BKSH)
  x_BTKGH += jnp.einsum('BKGTS,BSKH->BTKGH', weights_BKGTS[..., S:].astype(v_BTKH.dtype), v_BTKH)
  return x_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def mixed(
  q_B1NH: jax.Array, cache: KeyValues, seen_BS: jax.Array, bias_BNS: jax.Array | None = None
) -> jax.Array:
  """As `recall`, of the slots that are seen."""
  (B, _, N, H), S = q_B1NH.shape, cache.slots
  K = jax.tree.leaves(cache.keys)[0].shape[1]
  dtype = jnp.promote_types(q_B1NH.dtype, jnp.float32)
  q_BKGH = q_B1NH.reshape(B, K, N // K, H)
  keys_BKSH, key_scale = _wide(cache.keys, q_B1NH.dtype)
  scores_BKGS = jnp.einsum('BKGH,BKSH->BKGS', q_BKGH, keys_BKSH, preferred_element_type=dtype)
  scores_BKGS = scores_BKGS * key_scale * H**-0.5
  if bias_BNS is not None:
    scores_BKGS += bias_BNS.astype(dtype).reshape(B, K, N // K, S)
  scores_BKGS = jnp.where(seen_BS[:, None, None], scores_BKGS, jnp.finfo(dtype).min / 2)
  values_BKSH, value_scale = _wide(cache.values, q_B1NH.dtype)
  weights_BKGS = (jax.nn.softmax(scores_BKGS, axis=-1) * value_scale).astype(values_BKSH.dtype)
  return jnp.einsum('BKGS,BKSH->BKGH', weights_BKGS, values_BKSH).reshape(B, 1, N, H)


def _as(old: jax.Array | Rounded, x: jax.Array) -> jax.Array | Rounded:
  """Keys or values [..., H] in the form of a cache."""
  if not isinstance(old, Rounded):
    return x
  wide = x.astype(jnp.float32)
  most = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
  scale = jnp.where(most > 0, most, 1) / LARGEST
  return Rounded(jnp.round(wide / scale).astype(jnp.int8), scale)


def _wide(held: jax.Array | Rounded, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | float]:
  """Numbers to multiply, [B, K, S, H], and what their products are multiplied by, [B, K, 1, S]."""
  if not isinstance(held, Rounded):
    return held, 1.0
  return held.values.astype(dtype), held.scale[..., 0][:, :, None]


def _over_queries(scale: jax.Array | float) -> jax.Array | float:
  """What `_wide` multiplies products by, for several queries."""
  return scale if isinstance(scale, float) else scale[:, :, :, None]


def _seen(queries_BT: jax.Array, keys_BS: jax.Array, window: int | None) -> jax.Array:
  """Which keys the queries see, [B, T, S], by the positions of both; negative for no key."""
  distance_BTS = queries_BT[:, :, None] - keys_BS[:, None]
  seen_BTS = (distance_BTS >= 0) & (keys_BS >= 0)[:, None]
  return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


def _laid_out(cache: KeyValues) -> KeyValues:
  return jax.tree.map(lambda x: sharding.constrain(x, 'batch', 'kv_heads', None, None), cache)


def _after(x_1PKH: jax.Array, old_BKSH: jax.Array) -> jax.Array:
  """The slots of a cache, behind those of a prefix."""
  x_1KPH = x_1PKH.swapaxes(1, 2).astype(old_BKSH.dtype)
  x_BKPH = jnp.broadcast_to(x_1KPH, (len(old_BKSH), *x_1KPH.shape[1:]))
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


def _with_more(old_BKSH: jax.Array, x_BTKH: jax.Array, indices_BS: jax.Array) -> jax.Array:
  """What a cache held, with some tokens more; `indices_BS`: which of them each slot gets, negative
  for none.
  """
  new_BKSH = _of_first(old_BKSH, x_BTKH, jnp.clip(indices_BS, 0, x_BTKH.shape[1] - 1))
  return jnp.where(indices_BS[:, None, :, None] >= 0, new_BKSH, old_BKSH)


def _positions(lengths_B: jax.Array, slots: int) -> jax.Array:
  """The position of the token in each slot, [B, S]; negative where there is none yet."""
  last_B1 = lengths_B[:, None] - 1
  return last_B1 - (last_B1 - jnp.arange(slots)[None]) % slots
