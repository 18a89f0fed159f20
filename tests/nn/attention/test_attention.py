"""Attention against brute force in float64, for every implementation and option.

The ring of several devices runs in a process of its own (this file as a script), for which the
number of devices is set.
"""

import functools
import os
import pathlib
import subprocess
import sys
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.attention import cudnn as cudnn_attention
from llm_jax.nn.attention import dispatch as module
from llm_jax.nn.attention import ring as ring_attention
from llm_jax.nn.attention import splash as splash_attention
from llm_jax.nn.attention.dispatch import attention, attention_at
from llm_jax.parallel import sharding

B, T, N, H = 2, 7, 4, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3]], np.int32)


def inputs(kv_heads: int = N, seed: int = 0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(B, T, heads, H)).astype(dtype) for heads in (N, kv_heads, kv_heads)]


def brute_force(q, k, v, segments, causal, window):
  """One query at a time, in float64; a list of visible places stands for the mask."""
  out = np.zeros(q.shape)
  for b, i, n in np.ndindex(B, T, N):
    seen = [
      j
      for j in range(T)
      if (segments is None or segments[b, i] == segments[b, j])
      and (not causal or j <= i)
      and (window is None or (i - j < window if causal else 2 * abs(i - j) <= window))
    ]
    group = n // (N // k.shape[2])
    scores = np.array([q[b, i, n].astype(np.float64) @ k[b, j, group] for j in seen]) / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    out[b, i, n] = (weights / weights.sum()) @ v[b, seen, group]
  return out


def exact(q, k, v, g, segments, causal, window):
  """The output in float64, and the gradients of its sum weighted by `g`, as the equation and the
  chain rule say.
  """
  q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
  groups, places = q.shape[2] // k.shape[2], np.arange(q.shape[1])
  distance = places[:, None] - places[None]
  seen = (
    np.ones((len(q), *distance.shape), bool)
    if segments is None
    else segments[:, :, None] == segments[:, None]
  )
  if causal:
    seen &= distance >= 0
  if window is not None:
    seen &= distance < window if causal else 2 * abs(distance) <= window
  k_, v_ = (np.repeat(x, groups, axis=2) for x in (k, v))
  scores = np.where(
    seen[:, None], np.einsum('btnh,bsnh->bnts', q, k_) / np.sqrt(q.shape[-1]), -np.inf
  )
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = np.einsum('btnh,bsnh->bnts', g, v_)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
  dk, dv = np.einsum('bnts,btnh->bsnh', ds, q), np.einsum('bnts,btnh->bsnh', p, g)
  per_key = lambda x: x.reshape(*k.shape[:3], groups, -1).sum(3)
  return np.einsum('bnts,bsnh->btnh', p, v_), (
    np.einsum('bnts,bsnh->btnh', ds, k_),
    per_key(dk),
    per_key(dv),
  )


def check(run, arrays, segments=None, causal=False, window=None, atol=5e-6):
  """Compares `run(q, k, v)` and its gradients with `exact`."""
  g = np.random.default_rng(9).normal(size=arrays[0].shape).astype(np.float32)
  out, gradients = exact(*arrays, g, segments, causal, window)
  found, back = jax.vjp(run, *map(jnp.asarray, arrays))
  np.testing.assert_allclose(found, out, atol=atol)
  for ours, theirs in zip(back(jnp.asarray(g)), gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=4 * atol)


@pytest.mark.parametrize('implementation', ['xla', 'blockwise', 'ring'])
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
  kv_heads=st.sampled_from([1, 2, 4]),
  segmented=st.booleans(),
  causal=st.booleans(),
  window=st.sampled_from([None, 1, 2, 4, 6]),
  seed=st.integers(0, 1000),
)
def test_gradients_match_the_chain_rule(implementation, kv_heads, segmented, causal, window, seed):
  segments = (
    np.random.default_rng(seed).integers(0, 3, (B, T)).astype(np.int32) if segmented else None
  )
  masks = dict(causal=causal, window=window)
  with mock.patch.multiple(ring_attention, TILE=3, BLOCK=2):  # several tiles of queries
    check(
      functools.partial(attention, segments_BT=segments, implementation=implementation, **masks),
      inputs(kv_heads, seed),
      segments,
      **masks,
    )


@pytest.mark.parametrize(
  ('causal', 'window', 'segments'),
  [(False, None, None), (True, None, SEGMENTS), (True, 2, None), (False, 4, SEGMENTS)],
)
def test_a_few_places_see_what_they_see_in_the_whole_row(causal, window, segments):
  q, k, v = inputs(kv_heads=2)
  places = np.array([[6, 2, 2], [0, 5, 1]])  # in any order, one of them twice
  rows = np.arange(B)[:, None]
  out = attention_at(
    *map(jnp.asarray, (q[rows, places], k, v, places)),
    segments_BT=segments,
    causal=causal,
    window=window,
  )
  np.testing.assert_allclose(
    out, brute_force(q, k, v, segments, causal, window)[rows, places], atol=2e-6
  )


@pytest.mark.parametrize(
  ('causal', 'window', 'segmented'), [(True, None, True), (False, 64, True), (True, 100, False)]
)
def test_splash_matches_the_chain_rule(causal, window, segmented):
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(1, 256, heads, 8)).astype(np.float32) for heads in (2, 1, 1)]
  segments = np.sort(rng.integers(1, 4, (1, 256))).astype(np.int32) if segmented else None
  run = functools.partial(
    splash_attention.attention, segments_BT=segments, causal=causal, window=window, interpret=True
  )
  check(run, arrays, segments, causal, window, atol=2e-5)
  with pytest.raises(AssertionError):
    check(run, arrays, segments, not causal, window, atol=2e-5)


@pytest.mark.parametrize(
  ('causal', 'window', 'segmented'), [(True, None, True), (False, 4, True), (True, 3, False)]
)
def test_cudnn_matches_the_chain_rule(causal, window, segmented):
  # What the kernel is asked for, by XLA in its place: there is no GPU here.
  segments = (
    np.sort(np.random.default_rng(0).integers(1, 4, (B, T)), axis=1).astype(np.int32)
    if segmented
    else None
  )
  run = functools.partial(
    cudnn_attention.attention,
    segments_BT=segments,
    causal=causal,
    window=window,
    implementation='xla',
  )
  check(run, inputs(2), segments, causal, window)
  with pytest.raises(AssertionError):
    check(run, inputs(2), segments, not causal, window)


def test_a_program_for_gpus_holds_the_kernel(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn  # it asks the GPU that is not here

  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91200)
  monkeypatch.setattr(cudnn, 'check_compute_capability', lambda version: True)
  monkeypatch.setattr(cudnn, 'is_cuda_compute_capability_equal', lambda version: False)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(module.sharding, 'platform', lambda: 'gpu')
  shape = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
  segments = np.ones((2, 128), np.int32)

  def text(**options):
    run = lambda *arrays: attention(*arrays, segments_BT=segments, **options).sum()
    traced = jax.jit(jax.grad(run, (0, 1, 2))).trace(shape, shape, shape)
    return traced.lower(lowering_platforms=('cuda',)).as_text()

  assert (
    text().count('__cudnn$fmha')
    == text(implementation='cudnn', causal=True).count('__cudnn$fmha')
    == 2
  )  # and back
  assert '__cudnn' not in text(
    dropout_rate=0.1, dropout_rng=jax.random.key(0)
  )  # what it cannot do is done without it
  with pytest.raises(
    ValueError, match=r"'cudnn' cannot do this: it drops no .* What can: 'ring', 'blockwise', 'xla'"
  ):
    text(implementation='cudnn', dropout_rate=0.1, dropout_rng=jax.random.key(0))


def test_long_rows_never_hold_all_scores():
  def largest(length, **options):
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    run = lambda *arrays: attention(*arrays, causal=True, **options).sum()
    compiled = jax.jit(jax.grad(run, (0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (
      2 * length**2 * 4
    )  # in times of all scores

  assert (
    largest(2048)
    == largest(2048, implementation='blockwise')
    < 0.5
    < 1
    < largest(2048, implementation='xla')
  )
  assert largest(1024) == largest(1024, implementation='xla')


def ring_of_devices():
  """What the script checks."""
  rng = np.random.default_rng(0)
  segments = np.sort(rng.integers(1, 4, (2, 16))).astype(np.int32)
  for sizes in (dict(sequence=8), dict(data=2, sequence=2, tensor=2), dict(sequence=2, tensor=4)):
    layout = sharding.create_layout(**sizes)
    for kv_heads, causal, window in (
      (4, True, None),
      (2, False, None),
      (1, True, 3),
      (2, False, 4),
    ):
      arrays = [
        rng.normal(size=(2, 16, heads, 8)).astype(np.float32) for heads in (4, kv_heads, kv_heads)
      ]
      with sharding.use(layout):
        run = functools.partial(attention, segments_BT=segments, causal=causal, window=window)
        check(jax.jit(run), arrays, segments, causal, window)
    with sharding.use(layout):
      ring_dropout()


def ring_dropout():
  """One key, one mask; right on average; and the backward pass drops what the forward pass did."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, 16, 4, 8)).astype(np.float32)) for _ in range(3))
  run = jax.jit(
    lambda v, key: attention(q, k, v, dropout_rate=0.25, dropout_rng=key, implementation='ring')
  )
  once = run(v, jax.random.key(0))
  np.testing.assert_array_equal(once, run(v, jax.random.key(0)))
  assert np.abs(once - run(v, jax.random.key(1))).max() > 0.1
  mean = np.mean([run(v, key) for key in jax.random.split(jax.random.key(2), 400)], axis=0)
  plain = attention(q, k, v, implementation='xla')
  assert np.abs(mean - plain).max() < 0.25 < np.abs(once - plain).max()
  assert np.abs(mean - plain).mean() < 0.03
  # Linear in the values: their gradient is the transpose of the map forward only under the same
  # mask.
  g = jnp.asarray(rng.normal(size=once.shape).astype(np.float32))
  gradient = jax.vjp(lambda v: run(v, jax.random.key(0)), v)[1](g)[0]
  np.testing.assert_allclose(jnp.vdot(once, g), jnp.vdot(v, gradient), rtol=1e-4, atol=1e-3)


def test_a_ring_of_one_device_drops():
  ring_dropout()


def test_a_ring_of_devices():
  root = pathlib.Path(__file__).parents[3]
  env = os.environ | {
    'PYTHONPATH': str(root),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
  }
  done = subprocess.run(
    [sys.executable, __file__], capture_output=True, text=True, check=False, cwd=root, env=env
  )
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('rate', [0.0, 0.3])
def test_an_accelerator_keeps_no_scores(rate):
  run = functools.partial(
    attention,
    segments_BT=SEGMENTS,
    causal=True,
    dropout_rate=rate,
    dropout_rng=jax.random.key(0),
    implementation='xla',
  )
  square = lambda back: any(
    leaf.shape[-2:] == (T, T) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(back)
  )
  out, back = jax.vjp(run, *inputs())
  with mock.patch.object(module.sharding, 'platform', lambda: 'gpu'):
    again, lean = jax.vjp(run, *inputs())
  assert square(back) and not square(lean)
  np.testing.assert_allclose(out, again, atol=1e-6)
  for ours, theirs in zip(back(out), lean(out), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
  kv_heads=st.sampled_from([1, 2, 4]),
  segmented=st.booleans(),
  causal=st.booleans(),
  window=st.sampled_from([None, 1, 2, 4, 6]),
  seed=st.integers(0, 1000),
)
def test_matches_brute_force(kv_heads, segmented, causal, window, seed):
  q, k, v = inputs(kv_heads, seed)
  segments = (
    np.random.default_rng(seed).integers(0, 3, (B, T)).astype(np.int32) if segmented else None
  )
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
  before, after = (
    attention(q, k, v, segments_BT=SEGMENTS),
    attention(*changed, segments_BT=SEGMENTS),
  )
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
  v = np.broadcast_to(
    np.eye(T, dtype=np.float32)[None, :, None], (B, T, N, T)
  )  # reads the probabilities out
  key = jax.random.key(0)
  kept = np.concatenate(
    [
      np.ravel(attention(q, k, v, dropout_rate=0.25, dropout_rng=k_))
      for k_ in jax.random.split(key, 20)
    ]
  )
  np.testing.assert_allclose(np.unique(kept), [0.0, 1 / T / 0.75], atol=1e-6)
  share = np.mean(kept == 0.0)
  assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / kept.size)
  np.testing.assert_allclose(attention(q, k, v, dropout_rate=0.25), 1 / T, atol=1e-6)


def test_wrong_arguments():
  q, k, v = inputs()
  with pytest.raises(
    ValueError,
    match="attention='flash' is not known; known: auto, xla, blockwise, splash, cudnn, ring",
  ):
    attention(q, k, v, implementation='flash')
  with pytest.raises(ValueError, match='heads=4 must be a multiple of kv_heads=3'):
    attention(q, k[:, :, :3], v[:, :, :3])
  with pytest.raises(ValueError, match='7 queries and 5 keys'):
    attention(q, k[:, :5], v[:, :5])
  with pytest.raises(
    ValueError,
    match="'splash' cannot do this: rows of 7 places .*What can: 'ring', 'blockwise', 'xla'",
  ):
    attention(q, k, v, implementation='splash')
  with pytest.raises(ValueError, match='splash.*drops no probabilities'):
    attention(q, k, v, implementation='splash', dropout_rate=0.1, dropout_rng=jax.random.key(0))


def test_auto_takes_what_can():
  chosen = lambda q, drops=False: module._chosen('auto', q, drops)
  long, odd = jnp.zeros((1, 256, 2, 64)), jnp.zeros((1, 100, 2, 64))
  assert chosen(long) == 'xla'
  with mock.patch.object(module.sharding, 'platform', lambda: 'tpu'):
    assert chosen(long) == 'splash' and chosen(odd) == chosen(long, True) == 'xla'


if __name__ == '__main__':
  ring_of_devices()
