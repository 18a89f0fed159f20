"""Attention against brute force in float64, whatever implementation is chosen, and the choice."""

import functools
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.attention import dispatch, ring
from llm_jax.nn.attention.dispatch import attention


@pytest.mark.slow
@pytest.mark.parametrize('implementation', ['xla', 'blockwise', 'ring'])
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
  kv_heads=st.sampled_from([1, 2, 4]),
  segmented=st.booleans(),
  causal=st.booleans(),
  window=st.sampled_from([None, 1, 2, 4, 6]),
  seed=st.integers(0, 1000),
)
def test_gradients_match_the_chain_rule(
  reference, implementation, kv_heads, segmented, causal, window, seed
):
  segments = (
    np.random.default_rng(seed).integers(0, 3, (reference.B, reference.T)).astype(np.int32)
    if segmented
    else None
  )
  masks = dict(causal=causal, window=window)
  with mock.patch.multiple(ring, TILE=3, BLOCK=2):  # several tiles of queries
    reference.check(
      functools.partial(attention, segments_BT=segments, implementation=implementation, **masks),
      reference.inputs(kv_heads, seed),
      segments,
      **masks,
    )


@pytest.mark.parametrize('implementation', ['xla', 'blockwise', 'ring'])
@pytest.mark.parametrize('causal', [True, False])
def test_a_bias_by_distance_and_its_gradient(reference, implementation, causal):
  arrays, T = reference.inputs(kv_heads=2), reference.T
  bias = np.random.default_rng(3).normal(size=(reference.N, 2 * T - 1)).astype(np.float32)
  given = dict(segments_BT=reference.segments, causal=causal, implementation=implementation)
  with mock.patch.multiple(ring, TILE=3, BLOCK=2):
    run = lambda q, k, v, bias_ND: attention(q, k, v, bias_ND=bias_ND, **given)
    reference.check(run, arrays, reference.segments, causal, bias=bias)
    turned = lambda q, k, v, bias_ND: run(q, k, v, bias_ND[:, ::-1])
    with pytest.raises(AssertionError):  # from query to key
      reference.check(turned, arrays, reference.segments, causal, bias=bias)


@pytest.mark.parametrize('implementation', ['xla', 'blockwise', 'ring'])
@pytest.mark.parametrize('length', [5, 7, 12])
def test_keys_of_another_row_are_seen_by_their_segment(reference, implementation, length):
  rng = np.random.default_rng(length)
  q, k, v = reference.inputs(kv_heads=2)
  k, v = (rng.normal(size=(reference.B, length, 2, reference.H)).astype(np.float32) for _ in 'kv')
  keys = np.concatenate([np.tile(np.arange(4), (2, 1)), rng.integers(0, 4, (2, length - 4))], 1)
  keys = np.int32(keys)
  given = dict(segments_BT=reference.segments, key_segments_BS=keys, implementation=implementation)
  with mock.patch.multiple(ring, TILE=3, BLOCK=2):
    run = functools.partial(attention, **given)
    reference.check(run, [q, k, v], reference.segments, key_segments=keys)
  for name, value in dict(causal=True, window=2, bias_ND=jnp.zeros((4, 13))).items():
    with pytest.raises(ValueError, match='another row are all seen'):
      attention(q, k, v, **given, **{name: value})
  with pytest.raises(ValueError, match='queries need theirs'):
    attention(q, k, v, key_segments_BS=keys, implementation='xla')


@pytest.mark.parametrize('name', ['splash', 'cudnn'])
def test_kernels_say_what_they_do_not_take(reference, name):
  q, k, v = reference.inputs()
  bias, keys = jnp.zeros((reference.N, 2 * reference.T - 1)), reference.segments
  for given, what in (
    (dict(bias_ND=bias), 'bias of scores'),
    (dict(segments_BT=keys, key_segments_BS=keys), 'keys of another row'),
  ):
    message = f"'{name}' cannot do this: it takes no {what}.*'blockwise', 'xla'"
    with pytest.raises(ValueError, match=message):
      attention(q, k, v, implementation=name, **given)


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


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
  kv_heads=st.sampled_from([1, 2, 4]),
  segmented=st.booleans(),
  causal=st.booleans(),
  window=st.sampled_from([None, 1, 2, 4, 6]),
  seed=st.integers(0, 1000),
)
def test_matches_brute_force(reference, kv_heads, segmented, causal, window, seed):
  q, k, v = reference.inputs(kv_heads, seed)
  segments = (
    np.random.default_rng(seed).integers(0, 3, (reference.B, reference.T)).astype(np.int32)
    if segmented
    else None
  )
  with jax.numpy_rank_promotion('raise'):
    out = attention(q, k, v, segments_BT=segments, causal=causal, window=window)
  np.testing.assert_allclose(
    out, reference.brute_force(q, k, v, segments, causal, window), atol=2e-6
  )


def test_each_mask_matters(reference):
  q, k, v = reference.inputs()
  plain = attention(q, k, v)
  for option in (dict(causal=True), dict(window=2), dict(segments_BT=reference.segments)):
    assert np.abs(attention(q, k, v, **option) - plain).max() > 0.1, option


def test_float64_stays_float64(reference):
  q, k, v = reference.inputs(2, dtype=np.float64)
  with jax.enable_x64(True):
    out = attention(
      jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), segments_BT=reference.segments, window=4
    )
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(
      out, reference.brute_force(q, k, v, reference.segments, False, 4), atol=1e-14
    )


def test_bfloat16_has_a_float32_softmax(reference):
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in reference.inputs())
  out = attention(q, k, v, causal=True)
  assert out.dtype == jnp.bfloat16
  exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), causal=True)
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)
  text = jax.jit(attention).lower(q, k, v).as_text()
  assert 'stablehlo.exponential' in text
  assert all('f32' in line for line in text.splitlines() if 'stablehlo.exponential' in line)


def test_grouped_heads_equal_repeated_ones(reference):
  q, k, v = reference.inputs(2)
  repeated = attention(q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2), causal=True)
  np.testing.assert_allclose(attention(q, k, v, causal=True), repeated, atol=1e-6)
  wrong = attention(q, np.tile(k, (1, 1, 2, 1)), np.tile(v, (1, 1, 2, 1)), causal=True)
  assert np.abs(repeated - wrong).max() > 0.1


def test_another_document_changes_nothing(reference):
  q, k, v = reference.inputs()
  other = reference.segments != 1
  changed = [np.where(other[:, :, None, None], 1e4 * x, x) for x in (q, k, v)]
  before, after = (
    attention(q, k, v, segments_BT=reference.segments),
    attention(*changed, segments_BT=reference.segments),
  )
  np.testing.assert_array_equal(np.asarray(before)[~other], np.asarray(after)[~other])
  assert np.abs(np.asarray(before - after)[other]).max() > 1.0


def test_padding_is_finite_forth_and_back(reference):
  q, k, v = reference.inputs()
  segments = np.zeros((reference.B, reference.T), np.int32)
  segments[0, :3] = 1

  def total(q, k, v):
    return attention(q, k, v, segments_BT=segments, causal=True, window=2).sum()

  value, grads = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_dropout_drops_and_rescales(reference):
  shape = reference.B, reference.T, reference.N, reference.T
  q, k = (np.zeros(shape, np.float32) for _ in range(2))
  v = np.broadcast_to(
    np.eye(reference.T, dtype=np.float32)[None, :, None], shape
  )  # reads the probabilities out
  key = jax.random.key(0)
  kept = np.concatenate(
    [
      np.ravel(attention(q, k, v, dropout_rate=0.25, dropout_rng=k_))
      for k_ in jax.random.split(key, 20)
    ]
  )
  np.testing.assert_allclose(np.unique(kept), [0.0, 1 / reference.T / 0.75], atol=1e-6)
  share = np.mean(kept == 0.0)
  assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / kept.size)
  np.testing.assert_allclose(attention(q, k, v, dropout_rate=0.25), 1 / reference.T, atol=1e-6)


def test_wrong_arguments(reference):
  q, k, v = reference.inputs()
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
    match="'splash' cannot do this: rows of 7 tokens .*What can: 'ring', 'blockwise', 'xla'",
  ):
    attention(q, k, v, implementation='splash')
  with pytest.raises(ValueError, match='splash.*drops no probabilities'):
    attention(q, k, v, implementation='splash', dropout_rate=0.1, dropout_rng=jax.random.key(0))


def test_auto_takes_what_can(reference):
  chosen = lambda q, drops=False: dispatch._chosen('auto', q, q, drops, ())
  long, odd = jnp.zeros((1, 256, 2, 64)), jnp.zeros((1, 100, 2, 64))
  assert chosen(long) == 'xla'
  with mock.patch.object(dispatch.sharding, 'platform', lambda: 'tpu'):
    assert chosen(long) == 'splash' and chosen(odd) == chosen(long, True) == 'xla'
