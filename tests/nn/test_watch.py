"""What layers pass on, by the model itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models.encoder import Model
from llm_jax.nn import watch

SHAPE = dict(vocab_size=40, dim=8, heads=2, mlp_dim=16, max_len=16)
SHAPE |= dict(dropout=0.0, attention_dropout=0.0)


@pytest.mark.parametrize('options', [dict(layers=3), dict(layers=3, unroll=0)])
def test_layers_come_in_their_order(options):
  model = Model(**SHAPE, **options)
  batch = {
    'tokens': jnp.arange(10).reshape(2, 5),
    'segments': jnp.ones((2, 5), jnp.int32),
    'positions': jnp.tile(jnp.arange(5), (2, 1)),
  }
  params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), batch))

  def run(count):
    """Hidden states of the model with its first layers alone."""
    less = Model(**SHAPE | options | dict(layers=count))
    cut = jax.tree.map(lambda x: x, params)
    stack = cut['params']['stack']
    stack['layers'] = jax.tree.map(lambda x: x[:count], stack['layers'])
    return jax.jit(less.apply)(cut, batch).hidden

  with nn.intercept_methods(watch.watching):
    outputs, collected = jax.jit(
      lambda params: model.apply(params, batch, mutable=[watch.WATCHED])
    )(params)
  seen = watch.layers(collected[watch.WATCHED])
  assert seen['hidden'].shape == (3, 2, 5, 8) and seen['query'].shape == (3, 2, 5, 2, 4)
  for count in (1, 2, 3):
    np.testing.assert_allclose(seen['hidden'][count - 1], run(count), atol=1e-5)
  np.testing.assert_allclose(seen['hidden'][-1], outputs.hidden, atol=1e-6)


def test_patterns_of_layers_are_interleaved():
  sown = {
    'stack': {
      'first': {'hidden': jnp.zeros(1)},
      'layers': {'block_0': {'hidden': jnp.array([[1.0], [3.0]])}},
    }
  }
  sown['stack']['layers']['block_1'] = {'hidden': jnp.array([[2.0], [4.0]])}
  assert watch.layers(sown)['hidden'].ravel().tolist() == [0, 1, 2, 3, 4]
