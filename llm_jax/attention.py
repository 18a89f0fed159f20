"""Scaled dot-product attention (arXiv:1706.03762, eq. 1) with grouped heads (arXiv:2305.13245), as one pure function.

Letters are those of `llm_jax.layers`; G is the number of query heads that share a key head, N = K G.
"""

import functools

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ('auto', 'xla')


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, segments_BT: jax.Array | None = None,
              causal: bool = False, window: int | None = None, dropout_rate: float = 0.0,
              dropout_rng: jax.Array | None = None, implementation: str = 'xla') -> jax.Array:
  """Mixes values by the softmax of scaled scores; query head n reads key head n // G, and nothing is repeated in memory.

  Scores and softmax are at least float32, whatever the inputs are. A token always sees itself, so no softmax is over nothing:
  padding (segment 0) sees padding, and comes out meaningless and finite.

  Args:
    q_BTNH: queries.
    k_BSKH: keys of the same row, S = T.
    v_BSKH: values.
    segments_BT: one number a document; a token sees only its own number. None: the row is one document.
    causal: a token sees no later place of the row.
    window: None for no limit. Causal: the last `window` places, its own among them (Mistral, arXiv:2310.06825). Otherwise
      `window // 2` places to either side (ModernBERT, arXiv:2412.13663).
    dropout_rate: share of the probabilities that is dropped.
    dropout_rng: key for the dropout; None for no dropout.
    implementation: one of `IMPLEMENTATIONS`.

  Returns:
    [B, T, N, H] in the type of `q_BTNH`.

  Raises:
    ValueError: key heads that do not divide the query heads, another implementation, queries and keys of unequal length.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'attention={implementation!r} is not known; known: {", ".join(IMPLEMENTATIONS)}.')
  if N % K:
    raise ValueError(f'heads={N} must be a multiple of kv_heads={K}.')
  if S != T:
    raise ValueError(f'{T} queries and {S} keys: both must be the places of one row.')
  wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=wide) * H**-0.5
  mask = visible(T, segments_BT=segments_BT, causal=causal, window=window)
  if mask is not None:
    # Finite, so that no gradient is NaN; low enough for an exact zero after the softmax.
    scores_BKGTS = jnp.where(mask, scores_BKGTS, jnp.finfo(wide).min / 2)
  weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
  if dropout_rng is not None and dropout_rate > 0.0:
    keep = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, weights_BKGTS.shape)
    weights_BKGTS = jnp.where(keep, weights_BKGTS / (1.0 - dropout_rate), 0).astype(v_BSKH.dtype)
  return jnp.einsum('BKGTS,BSKH->BTKGH', weights_BKGTS, v_BSKH).reshape(B, T, N, H)


def visible(length: int, *, segments_BT: jax.Array | None, causal: bool, window: int | None) -> jax.Array | None:
  """Which key each query may see: bool, [B or 1, 1, 1, T, S]; None where every query sees every key."""
  masks = []
  distance = (jnp.arange(length)[:, None] - jnp.arange(length)[None, :])[None, None, None]
  if causal:
    masks.append(distance >= 0)
  if window is not None:
    masks.append(distance < window if causal else jnp.abs(distance) <= window // 2)
  if segments_BT is not None:
    masks.append((segments_BT[:, :, None] == segments_BT[:, None, :])[:, None, None])
  return functools.reduce(jnp.logical_and, masks) if masks else None
