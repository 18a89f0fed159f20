"""Linear maps and norms against NumPy in float64; weight forms; what each parameter is."""

import dataclasses

import flax
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.core.params import Info
from llm_jax.nn.linear import Embedding, Linear, Norm, Output
from llm_jax.nn.options import Options

BASE = Options(dim=12, layers=2, heads=2, mlp_dim=8, norm_order='post', norm_eps=1e-12)
pytestmark = pytest.mark.usefixtures('stated_broadcasting')


def infos(module, *args, **kwargs):
  return params_lib.infos(
    jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))['params']
  )


def test_linear_is_its_einsum(random_params):
  x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  module = Linear('...D,DNH->...NH', (4, 2, 5), BASE, bias=True)
  params = random_params(module, x)
  kernel, bias = (np.asarray(params['params'][name], np.float64) for name in ('kernel', 'bias'))
  expected = (x.reshape(6, 4) @ kernel.reshape(4, 10)).reshape(2, 3, 2, 5) + bias
  np.testing.assert_allclose(module.apply(params, x), expected, atol=1e-6)


def test_parameters_say_what_they_are():
  x = jnp.ones((2, 3, 4))
  heads = Linear('...D,DNH->...NH', (4, 2, 5), BASE, bias=True)
  assert infos(heads, x) == {
    'kernel': Info(('embed', 'heads', 'head_dim'), inputs=(0,), decayed=True, formable=True),
    'bias': Info(('heads', 'head_dim')),
  }
  out = Linear('...NH,NHD->...D', (2, 5, 4), BASE, bias=True)
  assert infos(out, jnp.ones((2, 3, 2, 5))) == {
    'kernel': Info(('heads', 'head_dim', 'embed'), inputs=(0, 1), decayed=True, formable=True),
    'bias': Info(('norm',)),
  }
  assert infos(Norm(BASE), x) == {'scale': Info(('norm',)), 'bias': Info(('norm',))}
  ids, embeddings = jnp.ones((1, 2), jnp.int32), params_lib.EMBEDDINGS
  assert infos(Embedding(9, 'vocab', BASE), ids) == {
    'embedding': Info(('vocab', 'embed'), (1,), decayed=True, layer=embeddings, formable=True)
  }
  assert infos(Embedding(9, 'positions', BASE), ids) == {
    'embedding': Info(('positions', 'norm'), decayed=True, layer=embeddings)
  }
  kernel = infos(Output(9, BASE), method=lambda module: module.kernel)
  assert kernel == {'kernel': Info(('embed', 'vocab'), (0,), decayed=True, formable=True)}


@flax.struct.dataclass
class Doubled:
  """A weight form from outside: twice a matrix."""

  half: jax.Array

  def product(self, spec, x, dtype, result):
    return 2 * jnp.einsum(spec, x.astype(dtype), self.half.astype(dtype)).astype(result)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_weight_form_stands_in_for_a_kernel(random_params, dtype):
  options = dataclasses.replace(BASE, dtype=dtype)
  module = Linear('...D,DF->...F', (4, 6), options, bias=True, accumulated=True)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
  params = random_params(module, x)['params']
  y = module.apply({'params': params}, x)
  form = params | {'kernel': Doubled(params['kernel'] / 2)}
  found = module.apply({'params': form}, x)
  assert found.dtype == y.dtype == jnp.float32
  np.testing.assert_allclose(found, y, atol=1e-6 if dtype == 'float32' else 0.05)
  wrong = params | {'kernel': Doubled(params['kernel'])}
  assert np.abs(module.apply({'params': wrong}, x) - y).max() > 0.1


def test_accumulated_linear_of_bfloat16_gives_float32(random_params):
  options = dataclasses.replace(BASE, dtype='bfloat16')
  module = Linear('...D,DV->...V', (4, 9), options, bias=True, accumulated=True)
  x = jnp.ones((2, 4), jnp.bfloat16)
  params = random_params(module, x)
  assert module.apply(params, x).dtype == jnp.float32
  assert params['params']['kernel'].dtype == jnp.float32
  gradient = jax.grad(lambda p: module.apply(p, x).sum())(params)
  assert gradient['params']['kernel'].dtype == jnp.float32


@pytest.mark.parametrize(
  'kind, bias', [('layernorm', True), ('layernorm', False), ('rmsnorm', False)]
)
def test_norm(random_params, kind, bias):
  x = 3 + 2 * np.random.default_rng(0).normal(size=(2, 5, 12))
  module = Norm(dataclasses.replace(BASE, norm=kind, norm_bias=bias, norm_eps=0.1))
  params = random_params(module, x)
  centred = x - x.mean(-1, keepdims=True) if kind == 'layernorm' else x
  expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1)
  expected *= np.asarray(params['params']['scale'])
  if bias:
    expected += np.asarray(params['params']['bias'])
  np.testing.assert_allclose(module.apply(params, x.astype(np.float32)), expected, atol=2e-6)
  assert set(params['params']) == ({'scale', 'bias'} if bias else {'scale'})


def test_norm_of_bfloat16_is_computed_in_float32():
  x = jnp.asarray(1000 + np.random.default_rng(0).normal(size=(1, 12)) * 8, jnp.bfloat16)
  module = Norm(dataclasses.replace(BASE, dtype='bfloat16'))
  params = {'params': {'scale': jnp.ones(12), 'bias': jnp.zeros(12)}}
  exact = np.asarray(x, np.float64)
  expected = (exact - exact.mean()) / exact.std()
  out = module.apply(params, x)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.01)


def test_a_shape_that_does_not_fit_is_refused():
  module = Linear('...D,DF->...F', (4, 6), BASE, bias=False)
  with pytest.raises(flax.errors.ScopeParamShapeError):
    module.apply({'params': {'kernel': jnp.ones((4, 5))}}, jnp.ones((1, 4)))
