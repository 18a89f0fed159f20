"""Attention by the equation, at all positions and at a few; scores are kept on a CPU alone."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.attention import xla
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
