"""Attention by the equation, at all positions and at a few; scores are kept on a CPU alone."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.attention import dispatch, xla
from llm_jax.nn.attention.masks import Prefix
from llm_jax.nn.attention.xla import attention, attention_at


@pytest.mark.parametrize(
  ('causal', 'window', 'segmented'),
  [(False, None, False), (True, None, True), (True, 2, False), (False, 4, True)],
)
def test_a_few_positions_see_what_they_see_in_the_whole_row(reference, causal, window, segmented):
  q, k, v = reference.inputs(kv_heads=2)
  segments = reference.segments if segmented else None
  indices = np.array([[6, 2, 2], [0, 5, 1]])  # in any order, one of them twice
  rows = np.arange(reference.B)[:, None]
  out = attention_at(
    *map(jnp.asarray, (q[rows, indices], k, v, indices)),
    segments_BT=segments,
    causal=causal,
    window=window,
  )
  expected = reference.brute_force(q, k, v, segments, causal, window)
  np.testing.assert_allclose(out, expected[rows, indices], atol=2e-6)


@pytest.mark.parametrize(('causal', 'window'), [(False, None), (True, None), (True, 2), (False, 4)])
def test_all_tokens_see_a_prefix_whatever_their_document(reference, causal, window):
  """Brute force: each query with the prefix and its own part of the row."""
  q, k, v = reference.inputs(kv_heads=2)
  rng = np.random.default_rng(5)
  prefix = Prefix(*rng.normal(size=(2, 3, 2, reference.H)).astype(np.float32))
  masks = dict(segments_BT=reference.segments, causal=causal, window=window)
  expected = np.zeros(q.shape)
  for b, i, n in np.ndindex(q.shape[:3]):
    seen = [
      j
      for j in range(reference.T)
      if reference.segments[b, i] == reference.segments[b, j]
      and (not causal or j <= i)
      and (window is None or (i - j < window if causal else 2 * abs(i - j) <= window))
    ]
    keys = np.concatenate([prefix.keys[:, n // 2], k[b, seen, n // 2]]).astype(np.float64)
    values = np.concatenate([prefix.values[:, n // 2], v[b, seen, n // 2]])
    weights = np.exp(keys @ q[b, i, n] / np.sqrt(reference.H))
    expected[b, i, n] = weights @ values / weights.sum()
  out = dispatch.attention(q, k, v, prefix=prefix, **masks)
  np.testing.assert_allclose(out, expected, atol=2e-6)
  indices = np.array([[6, 2, 2], [0, 5, 1]])
  rows = np.arange(reference.B)[:, None]
  few = attention_at(q[rows, indices], k, v, indices, prefix=prefix, **masks)
  np.testing.assert_allclose(few, expected[rows, indices], atol=2e-6)
  maps = xla.probabilities(q, k, prefix=prefix, **masks)
  assert maps.shape[-1] == reference.T and np.all(np.sum(maps, -1) < 1)
  for name in ('splash', 'blockwise', 'ring', 'cudnn'):
    with pytest.raises(ValueError, match=f"'{name}' cannot do this: .*no keys before.*can: 'xla'"):
      dispatch.attention(q, k, v, prefix=prefix, implementation=name, **masks)


@pytest.mark.parametrize('rate', [0.0, 0.3])
def test_an_accelerator_keeps_no_scores(reference, rate):
  run = functools.partial(
    attention,
    segments_BT=reference.segments,
    causal=True,
    dropout_rate=rate,
    dropout_rng=jax.random.key(0),
  )

  def square(back):
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.dtype == jnp.float32]
    return any(leaf.shape[-2:] == (reference.T, reference.T) for leaf in kept)

  out, back = jax.vjp(run, *reference.inputs())
  with mock.patch.object(xla.sharding, 'platform', lambda: 'gpu'):
    again, lean = jax.vjp(run, *reference.inputs())
  assert square(back) and not square(lean)
  np.testing.assert_allclose(out, again, atol=1e-6)
  for ours, theirs in zip(back(out), lean(out), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
