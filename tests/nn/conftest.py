"""Parameters without a compile, and broadcasting that must be stated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope='session')
def random_params():
  """Parameters of the right shapes from NumPy: nothing is compiled to make them."""

  def make(module, *args, seed=0, std=0.3, **kwargs):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), *args, **kwargs)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * std, x.dtype), shapes)

  return make


@pytest.fixture
def stated_broadcasting():
  with jax.numpy_rank_promotion('raise'):
    yield
