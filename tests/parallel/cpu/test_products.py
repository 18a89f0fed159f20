"""Products on a CPU: nothing is transposed, and transposed kernels are the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.params import EMBEDDINGS, LAYERS, Info
from llm_jax.parallel import sharding
from llm_jax.parallel.cpu import products


@pytest.mark.parametrize(
  ('spec', 'x', 'kernel'),
  [
    ('...D,DNH->...NH', (4, 16, 32), (32, 4, 8)),
    ('...NH,NHD->...D', (4, 16, 4, 8), (4, 8, 32)),
    ('...D,DF->...F', (4, 16, 32), (32, 64)),
  ],
)
def test_on_one_cpu_nothing_is_transposed(spec, x, kernel):
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=shape).astype(np.float32) for shape in (x, kernel)]

  def run(layout):
    def loss(x, w):
      if products.alone():
        y = products.product(spec, jnp.sin(x), w, jnp.float32)
      else:
        y = jnp.einsum(spec, jnp.sin(x), w)
      return jnp.sum(jnp.sin(y)), y

    def on(*arrays):
      with sharding.use(layout):
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arrays)

    compiled = jax.jit(on).lower(*arrays).compile()
    return jax.tree.leaves(compiled(*arrays)), compiled.as_text().count(' transpose(')

  values, transposed = run(sharding.create_layout(1, devices=jax.devices()[:1]))
  plain, often = run(None)
  assert transposed == 0 and often > 0
  y = np.einsum(spec, np.sin(arrays[0].astype(np.float64)), arrays[1])
  np.testing.assert_allclose(values[1], y, rtol=1e-5, atol=1e-5)
  for got, want in zip(values, plain, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_transposed_kernels_are_the_kernels():
  rng = np.random.default_rng(0)
  shapes = {
    'token': (Info(('vocab', 'embed'), inputs=(1,), decayed=True, layer=EMBEDDINGS), (9, 6)),
    'output': (Info(('embed', 'vocab'), inputs=(0,), decayed=True), (6, 9)),
    'first': (Info(('embed', 'heads', 'head_dim'), inputs=(0,), layer=0), (6, 2, 5)),
    'out': (Info((LAYERS, 'heads', 'head_dim', 'embed'), inputs=(0, 1), layer=1), (3, 2, 5, 6)),
    'scale': (Info((LAYERS, 'norm'), layer=1), (3, 6)),
  }
  infos = {name: info for name, (info, _) in shapes.items()}
  params = {name: rng.normal(size=shape).astype(np.float32) for name, (_, shape) in shapes.items()}
  found = products.transposed(params, infos)
  for name in ('token', 'output', 'scale'):
    assert found[name] is params[name]
  x_D, x_NH = rng.normal(size=(4, 6)), rng.normal(size=(4, 2, 5))
  y = found['first'].product('...D,DNH->...NH', jnp.asarray(x_D), jnp.float32, jnp.float32)
  np.testing.assert_allclose(y, np.einsum('rd,dnh->rnh', x_D, params['first']), atol=1e-5)
  assert found['out'].weight_OI.shape == (3, 6, 10)
  one = jax.tree.map(lambda x: x[2], found['out'])  # as a loop over layers takes it
  y = one.product('...NH,NHD->...D', jnp.asarray(x_NH), jnp.float32, jnp.float32)
  np.testing.assert_allclose(y, np.einsum('rnh,nhd->rd', x_NH, params['out'][2]), atol=1e-5)


def test_weights_go_first():
  rng = np.random.default_rng(0)
  x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 6), (9, 6)))
  run = jax.jit(products.matrix_first, static_argnums=2)
  np.testing.assert_allclose(run(x, w, jnp.float32), x @ w.T, atol=1e-5)
  assert run(jnp.bfloat16(x), w, jnp.float32).dtype == jnp.float32
