"""Attention by the equation as it stands (arXiv:1706.03762, eq. 1), with grouped heads
(arXiv:2305.13245): all scores of a row in memory.

Letters are those of `llm_jax.nn.options`.
"""

import functools

import jax
import jax.numpy as jnp

from llm_jax.nn.attention.masks import Prefix, by_distance, pairs, visible
from llm_jax.nn.dropout import dropout
from llm_jax.parallel import sharding


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  prefix: Prefix | None = None,
  bias_ND: jax.Array | None = None,
  segments_BT: jax.Array | None = None,
  key_segments_BS: jax.Array | None = None,
  open_BS: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
) -> jax.Array:
  """As `llm_jax.nn.attention.dispatch.attention`, for all that it may be asked for."""
  run = _mix(causal, window, dropout_rate if dropout_rng is not None else 0.0)
  indices_1T = jnp.arange(q_BTNH.shape[1])[None]
  segments = pairs(segments_BT, key_segments_BS)
  arrays = prefix, bias_ND, indices_1T, segments, open_BS
  return run(q_BTNH, k_BSKH, v_BSKH, *arrays, dropout_rng)


def attention_at(
  q_BPNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  indices_BP: jax.Array,
  *,
  prefix: Prefix | None = None,
  bias_ND: jax.Array | None = None,
  segments_BT: jax.Array | None = None,
  key_segments_BS: jax.Array | None = None,
  open_BS: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
) -> jax.Array:
  """What `attention` gives at some indices of each row: P x T scores in memory.

  Args:
    q_BPNH: queries of these indices.
    k_BTKH: all keys.
    v_BTKH: their values.
    indices_BP: the indices, in any order, any of them more than once.
    prefix, bias_ND, segments_BT, key_segments_BS, open_BS, causal, window, dropout_rate,
      dropout_rng: as in `attention`.

  Returns:
    [B, P, N, H] in the type of `q_BPNH`.
  """
  drops = dropout_rng is not None and dropout_rate > 0.0
  run = _mix(causal, window, dropout_rate if drops else 0.0)
  segments = pairs(segments_BT, key_segments_BS)
  if segments is not None:
    segments = jnp.take_along_axis(segments[0], indices_BP, axis=1), segments[1]
  rng = dropout_rng if drops else None
  return run(q_BPNH, k_BTKH, v_BTKH, prefix, bias_ND, indices_BP, segments, open_BS, rng)


def probabilities(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  *,
  prefix: Prefix | None = None,
  bias_ND: jax.Array | None = None,
  segments_BT: jax.Array | None = None,
  key_segments_BS: jax.Array | None = None,
  open_BS: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
) -> jax.Array:
  """How much of each value `attention` takes, [B, N, T, S], at least float32; what it takes of a
  prefix is not among them.
  """
  indices_1T = jnp.arange(q_BTNH.shape[1])[None]
  segments = pairs(segments_BT, key_segments_BS)
  before = 0 if prefix is None else len(prefix.keys)
  k_BSKH = extended(k_BSKH, prefix and prefix.keys)
  seen = segments, open_BS, causal, window
  weights_BKGTS = _weights(q_BTNH, k_BSKH, bias_ND, indices_1T, seen, before)
  weights_BKGTS = weights_BKGTS[..., before:]
  B, K, G, T, S = weights_BKGTS.shape
  return weights_BKGTS.reshape(B, K * G, T, S)


def _mix(causal, window, dropout_rate):
  """The equation, its scores kept for the backward pass on a CPU alone."""
  run = functools.partial(_equation, causal=causal, window=window, dropout_rate=dropout_rate)
  if sharding.platform() == 'cpu':
    return run
  # T x T scores of every layer would not fit. Where a layer is computed again as a whole, the
  # compiler may merge the two.
  return jax.checkpoint(run, prevent_cse=False)


def _equation(
  q_BTNH,
  k_BSKH,
  v_BSKH,
  prefix,
  bias_ND,
  indices_BT,
  segments,
  open_BS,
  dropout_rng,
  *,
  causal,
  window,
  dropout_rate,
):
  before = 0
  if prefix is not None:
    before, k_BSKH = len(prefix.keys), extended(k_BSKH, prefix.keys)
    v_BSKH = extended(v_BSKH, prefix.values)
  seen = segments, open_BS, causal, window
  weights_BKGTS = _weights(q_BTNH, k_BSKH, bias_ND, indices_BT, seen, before)
  weights_BKGTS = weights_BKGTS.astype(v_BSKH.dtype)
  if dropout_rng is not None:
    weights_BKGTS = dropout(weights_BKGTS, dropout_rate, dropout_rng)
  return jnp.einsum('BKGTS,BSKH->BTKGH', weights_BKGTS, v_BSKH).reshape(q_BTNH.shape)


def extended(x_BSKH: jax.Array, before_PKH: jax.Array | None) -> jax.Array:
  """What stands before each row, and the row."""
  if before_PKH is None:
    return x_BSKH
  shape = x_BSKH.shape[0], *before_PKH.shape
  before_BPKH = jnp.broadcast_to(before_PKH.astype(x_BSKH.dtype)[None], shape)
  return jnp.concatenate([before_BPKH, x_BSKH], axis=1)


def _weights(q_BTNH, k_BSKH, bias_ND, indices_BT, seen, before):
  """Query heads of one key head side by side, so that nothing is repeated in memory. The first
  `before` keys are seen by all, and nothing is added to their scores.
  """
  (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
  dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=dtype)
  scores_BKGTS = scores_BKGTS * H**-0.5
  indices_S = jnp.arange(S - before)
  if bias_ND is not None:
    bias_BNTS = by_distance(bias_ND.astype(dtype), indices_BT, indices_S)
    bias_BNTS = jnp.pad(bias_BNTS, [(0, 0)] * 3 + [(before, 0)])
    scores_BKGTS += bias_BNTS.reshape(-1, K, N // K, T, S)
  segments, open_BS, causal, window = seen
  mask = visible(indices_BT, indices_S, segments, causal, window, open_BS)
  if mask is not None:
    mask = jnp.pad(mask, [(0, 0)] * 4 + [(before, 0)], constant_values=True)
    # Finite, so that no gradient is NaN; low enough for an exact zero after the softmax.
    scores_BKGTS = jnp.where(mask, scores_BKGTS, jnp.finfo(dtype).min / 2)
  return jax.nn.softmax(scores_BKGTS, axis=-1)
