"""Attention against a brute-force float64 loop, for every option."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.attention import attention

B, T, N, H = 2, 7, 4, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3]], np.int32)


def inputs(kv_heads: int = N, seed: int = 0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(B, T, heads, H)).astype(dtype) for heads in (N, kv_heads, kv_heads)]


def brute_force(q, k, v, segments, causal, window):
  """One query at a time, in float64; a list of visible places stands for the mask."""
  out = np.zeros(q.shape)
  for b, i, n in np.ndindex(B, T, N):
    seen = [j for j in range(T)
            if (segments is None or segments[b, i] == segments[b, j])
            and (not causal or j <= i)
            and (window is None or (i - j < window if causal else 2 * abs(i - j) <= window))]
    group = n // (N // k.shape[2])
    scores = np.array([q[b, i, n].astype(np.float64) @ k[b, j, group] for j in seen]) / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    out[b, i, n] = (weights / weights.sum()) @ v[b, seen, group]
  return out


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(kv_heads=st.sampled_from([1, 2, 4]), segmented=st.booleans(), causal=st.booleans(),
                  window=st.sampled_from([None, 1, 2, 4, 6]), seed=st.integers(0, 1000))
def test_matches_brute_force(kv_heads, segmented, causal, window, seed):
  q, k, v = inputs(kv_heads, seed)
  segments = np.random.default_rng(seed).integers(0, 3, (B, T)).astype(np.int32) if segmented else None
  with jax.numpy_rank_promotion('raise'):
    out = attention(q, k, v, segments_BT=segments, causal=causal, window=window)
  np.testing.assert_allclose(out, brute_force(q, k, v, segments, causal, window), atol=2e-6)


def test_each_mask_matters():
  q, k, v = inputs()
  plain = attention(q, k, v)
  for option in (dict(causal=True), dict(window=2), dict(segments_BT=SEGMENTS)):
    assert np.abs(attention(q, k, v, **option) - plain).max() > 0.1, option


def test_float64_stays_float64():
  q, k, v = inputs(2, dtype=np.float64)
  with jax.enable_x64(True):
    out = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), segments_BT=SEGMENTS, window=4)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, brute_force(q, k, v, SEGMENTS, False, 4), atol=1e-14)


def test_bfloat16_has_a_float32_softmax():
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
  out = attention(q, k, v, causal=True)
  assert out.dtype == jnp.bfloat16
  exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), causal=True)
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)
  text = jax.jit(attention).lower(q, k, v).as_text()
  assert 'stablehlo.exponential' in text
  assert all('f32' in line for line in text.splitlines() if 'stablehlo.exponential' in line)


def test_grouped_heads_equal_repeated_ones():
  q, k, v = inputs(2)
  repeated = attention(q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2), causal=True)
  np.testing.assert_allclose(attention(q, k, v, causal=True), repeated, atol=1e-6)
  wrong = attention(q, np.tile(k, (1, 1, 2, 1)), np.tile(v, (1, 1, 2, 1)), causal=True)
  assert np.abs(repeated - wrong).max() > 0.1


def test_another_document_changes_nothing():
  q, k, v = inputs()
  other = SEGMENTS != 1
  changed = [np.where(other[:, :, None, None], 1e4 * x, x) for x in (q, k, v)]
  before, after = attention(q, k, v, segments_BT=SEGMENTS), attention(*changed, segments_BT=SEGMENTS)
  np.testing.assert_array_equal(np.asarray(before)[~other], np.asarray(after)[~other])
  assert np.abs(np.asarray(before - after)[other]).max() > 1.0


def test_padding_is_finite_forth_and_back():
  q, k, v = inputs()
  segments = np.zeros((B, T), np.int32)
  segments[0, :3] = 1

  def total(q, k, v):
    return attention(q, k, v, segments_BT=segments, causal=True, window=2).sum()

  value, grads = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_dropout_drops_and_rescales():
  q, k = (np.zeros((B, T, N, T), np.float32) for _ in range(2))
  v = np.broadcast_to(np.eye(T, dtype=np.float32)[None, :, None], (B, T, N, T))  # reads the probabilities out
  key = jax.random.key(0)
  kept = np.concatenate([np.ravel(attention(q, k, v, dropout_rate=0.25, dropout_rng=k_)) for k_ in jax.random.split(key, 20)])
  np.testing.assert_allclose(np.unique(kept), [0.0, 1 / T / 0.75], atol=1e-6)
  share = np.mean(kept == 0.0)
  assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / kept.size)
  np.testing.assert_allclose(attention(q, k, v, dropout_rate=0.25), 1 / T, atol=1e-6)


def test_wrong_arguments():
  q, k, v = inputs()
  with pytest.raises(ValueError, match="attention='flash' is not known; known: xla"):
    attention(q, k, v, implementation='flash')
  with pytest.raises(ValueError, match='heads=4 must be a multiple of kv_heads=3'):
    attention(q, k[:, :, :3], v[:, :, :3])
  with pytest.raises(ValueError, match='7 queries and 5 keys'):
    attention(q, k[:, :5], v[:, :5])
