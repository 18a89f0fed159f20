"""Attention and mlp of one layer: their initialisation, and queries that are normalised."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.block import MLP, Attention, LayerContext
from llm_jax.nn.options import Options

BASE = Options(dim=12, layers=2, heads=2, mlp_dim=8, norm_order='post', norm_eps=1e-12)
pytestmark = pytest.mark.usefixtures('stated_broadcasting')


def options(**changes):
  return dataclasses.replace(BASE, **{'head_dim': None} | changes)


def test_initialisation_is_the_papers():
  wide = options(dim=64, heads=4, mlp_dim=256, layers=8)
  x = jnp.ones((1, 2, 64))

  def init(o):
    return nn.unbox(jax.jit(lambda key: MLP(o).init(key, x))(jax.random.key(0)))['params']

  bert = init(wide)
  gpt = init(dataclasses.replace(wide, init_distribution='normal', depth_scaled_init=True))
  kernel = np.asarray(bert['up']['kernel'])
  assert np.abs(kernel).max() <= 0.04 and kernel.std() == pytest.approx(0.02 * 0.8796, rel=0.02)
  assert np.abs(gpt['up']['kernel']).max() > 0.06
  assert np.std(gpt['up']['kernel']) == pytest.approx(0.02, rel=0.02)
  assert np.std(gpt['down']['kernel']) == pytest.approx(0.02 / 4, rel=0.02)  # sqrt(2 * 8 layers)
  assert np.std(bert['down']['kernel']) == pytest.approx(0.02 * 0.8796, rel=0.02)
  assert not np.any(bert['up']['bias'])


def test_a_head_dimension_of_its_own_and_normalised_queries(random_params):
  attention = Attention(options(head_dim=10, qk_norm=True, qkv_bias=False, bias=True))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 12)), jnp.float32)
  params = random_params(attention, x, LayerContext())['params']
  assert params['query']['kernel'].shape == (12, 2, 10)
  assert params['query_norm']['scale'].shape == (10,)
  assert 'bias' not in params['key'] and 'bias' in params['out']
  grown = params | {name: {'kernel': 7 * params[name]['kernel']} for name in ('query', 'key')}
  before, after = (
    attention.apply({'params': tree}, x, LayerContext())[0] for tree in (params, grown)
  )
  # A normalised query does not tell how long it was.
  np.testing.assert_allclose(before, after, atol=1e-5)
