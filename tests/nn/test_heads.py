"""Heads: their formulas, their shapes and types, and when their dropout acts."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models import encoder
from llm_jax.nn import heads
from llm_jax.nn.rows import at

MODEL = encoder.Model(vocab_size=11, dim=8, layers=1, heads=2, mlp_dim=4, dtype='bfloat16')
EXACT = MODEL.clone(dtype='float32').options


def random_params(module, *args):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), *args)))
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def test_mlm_head_is_berts():
  x = np.random.default_rng(2).normal(size=(2, 3, 8)).astype(np.float32)
  head = heads.MLMHead(EXACT, 11)
  params = jax.eval_shape(lambda: head.init(jax.random.key(0), x))['params']
  assert params['bias'].names == ('vocab',) and params['dense']['kernel'].value.shape == (8, 8)
  params = random_params(head, x)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params['params'])
  h = x @ p['dense']['kernel'] + p['dense']['bias']
  h = h * 0.5 * (1 + np.vectorize(math.erf)(h / np.sqrt(2)))
  h = (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True) * p['norm']['scale'] + p['norm'][
    'bias'
  ]
  with jax.numpy_rank_promotion('raise'):
    y, bias = head.apply(params, x)
    np.testing.assert_allclose(y, h, atol=1e-4)
    np.testing.assert_array_equal(bias, params['params']['bias'])


def test_pooler_is_berts():
  x = np.random.default_rng(2).normal(size=(2, 3, 8)).astype(np.float32)
  head = heads.Pooler(EXACT)
  params = random_params(head, x)
  dense = params['params']['dense']
  formula = np.tanh(x @ np.asarray(dense['kernel']) + np.asarray(dense['bias']))
  np.testing.assert_allclose(head.apply(params, x), formula, atol=1e-5)


def test_pool_reads_each_text_and_nothing_else():
  x = np.random.default_rng(2).normal(size=(2, 6, 8)).astype(np.float32)
  batch = {
    'segments': np.array([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]]),
    'text_firsts': np.array([[0, 3, 0], [0, 0, 0]]),
    'text_lasts': np.array([[2, 4, 0], [0, 0, 0]]),
  }
  wanted = {
    'cls': (x[0, 0], x[0, 3], x[1, 0]),
    'last': (x[0, 2], x[0, 4], x[1, 0]),
    'mean': (x[0, :3].mean(0), x[0, 3:5].mean(0), x[1, 0]),
  }

  def pool(x, how):
    return np.asarray(heads.pool(at(jnp.asarray(x), heads.pool_positions(batch, how)), batch, how))

  for how in heads.POOLS:
    y = pool(x, how)
    assert y.shape == (2, 3, 8) and np.isfinite(y).all()
    np.testing.assert_allclose(y[[0, 0, 1], [0, 1, 0]], wanted[how], atol=1e-6)
    changed = pool(np.where(batch['segments'][..., None] == 2, np.float32(1e6), x), how)
    np.testing.assert_array_equal(changed[[0, 1], [0, 0]], y[[0, 1], [0, 0]])  # to the last bit
    assert np.abs(changed[0, 1] - y[0, 1]).max() > 1
  wide = heads.pool(jnp.asarray(x, jnp.bfloat16), batch, 'mean')
  assert wide.dtype == jnp.float32


def test_classifier_drops_only_with_the_stream():
  x = np.ones((4, 8), np.float32)
  head = heads.ClassifierHead(MODEL.options, classes=3, dropout=0.5)
  boxed = jax.eval_shape(lambda: head.init(jax.random.key(0), x))['params']['dense']['kernel']
  assert boxed.names == ('embed', 'classes') and boxed.value.shape == (8, 3)
  params = random_params(head, x)
  quiet = head.apply(params, x)
  assert quiet.shape == (4, 3) and quiet.dtype == jnp.float32
  np.testing.assert_array_equal(
    quiet, heads.ClassifierHead(MODEL.options, classes=3, dropout=0.0).apply(params, x)
  )
  dropped = head.apply(params, x, rngs={'dropout': jax.random.key(0)})
  assert np.abs(dropped - quiet).max() > 0.1


def test_a_classifier_without_bias():
  x = np.random.default_rng(2).normal(size=(4, 8)).astype(np.float32)
  head = heads.ClassifierHead(EXACT, classes=3, bias=False)
  params = random_params(head, x)
  assert set(params['params']['dense']) == {'kernel'}
  np.testing.assert_allclose(
    head.apply(params, x), x @ np.asarray(params['params']['dense']['kernel']), atol=1e-5
  )


def test_pair_head_has_two_float32_logits():
  x = jnp.ones((4, 8), jnp.bfloat16)
  head = heads.PairHead(MODEL.options)
  out = head.apply(random_params(head, x), x)
  assert out.shape == (4, 2) and out.dtype == jnp.float32
