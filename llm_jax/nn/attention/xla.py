"""Attention by the equation as it stands (arXiv:1706.03762, eq. 1), with grouped heads
(arXiv:2305.13245): all scores of a row in memory.

Letters are those of `llm_jax.nn.options`.
"""

import functools

import jax
import jax.numpy as jnp

from llm_jax.nn.attention.masks import visible
from llm_jax.nn.dropout import dropout
from llm_jax.parallel import sharding


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  segments_BT: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
) -> jax.Array:
  """As `llm_jax.nn.attention.dispatch.attention`, for all that it may be asked for."""
  run = _mix(causal, window, dropout_rate if dropout_rng is not None else 0.0)
  indices_1T = jnp.arange(q_BTNH.shape[1])[None]
  segments = None if segments_BT is None else (segments_BT, segments_BT)
  return run(q_BTNH, k_BSKH, v_BSKH, indices_1T, segments, dropout_rng)


def attention_at(
  q_BPNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  indices_BP: jax.Array,
  *,
  segments_BT: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
) -> jax.Array:
  """What `attention` gives at some indices of each row: P x T scores in memory.

  Args:
    q_BPNH: queries of these indices.
    k_BTKH: keys of all positions of the row.
    v_BTKH: their values.
    indices_BP: the indices, in any order, any of them more than once.
    segments_BT, causal, window, dropout_rate, dropout_rng: as in `attention`.

  Returns:
    [B, P, N, H] in the type of `q_BPNH`.
  """
  drops = dropout_rng is not None and dropout_rate > 0.0
  run = _mix(causal, window, dropout_rate if drops else 0.0)
  segments = None
  if segments_BT is not None:
    segments = jnp.take_along_axis(segments_BT, indices_BP, axis=1), segments_BT
  return run(q_BPNH, k_BTKH, v_BTKH, indices_BP, segments, dropout_rng if drops else None)


def probabilities(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  *,
  segments_BT: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
) -> jax.Array:
  """How much of each value `attention` takes, [B, N, T, S], at least float32."""
  indices_1T = jnp.arange(q_BTNH.shape[1])[None]
  segments = None if segments_BT is None else (segments_BT, segments_BT)
  weights_BKGTS = _weights(q_BTNH, k_BSKH, indices_1T, segments, causal, window)
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
  q_BTNH, k_BSKH, v_BSKH, indices_BT, segments, dropout_rng, *, causal, window, dropout_rate
):
  weights_BKGTS = _weights(q_BTNH, k_BSKH, indices_BT, segments, causal, window)
  weights_BKGTS = weights_BKGTS.astype(v_BSKH.dtype)
  if dropout_rng is not None:
    weights_BKGTS = dropout(weights_BKGTS, dropout_rate, dropout_rng)
  return jnp.einsum('BKGTS,BSKH->BTKGH', weights_BKGTS, v_BSKH).reshape(q_BTNH.shape)


def _weights(q_BTNH, k_BSKH, indices_BT, segments, causal, window):
  """Query heads of one key head side by side, so that nothing is repeated in memory."""
  (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
  dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=dtype)
  scores_BKGTS = scores_BKGTS * H**-0.5
  mask = visible(indices_BT, jnp.arange(S), segments, causal, window)
  if mask is not None:
    # Finite, so that no gradient is NaN; low enough for an exact zero after the softmax.
    scores_BKGTS = jnp.where(mask, scores_BKGTS, jnp.finfo(dtype).min / 2)
  return jax.nn.softmax(scores_BKGTS, axis=-1)
