"""Kernels in 8 bits: how far they are from what they stand for, and what they multiply to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.params import LAYERS, Info
from llm_jax.nn import int8

KERNELS = {
  '...D,DNH->...NH': ((12, 2, 5), Info(('embed', 'heads', 'head_dim'), inputs=(0,))),
  '...NH,NHD->...D': ((2, 5, 12), Info(('heads', 'head_dim', 'embed'), inputs=(0, 1))),
}


def kernel(shape, layers=()):
  drawn = np.random.default_rng(0).normal(size=(*layers, *shape)).astype(np.float32)
  return drawn * np.linspace(0.1, 3, shape[-1], dtype=np.float32)


@pytest.mark.parametrize('spec', KERNELS)
def test_a_kernel_is_within_half_a_step_and_multiplies_like_the_array_it_stands_for(spec):
  shape, info = KERNELS[spec]
  w = kernel(shape)
  form = int8.quantized(jnp.asarray(w), info)
  back = np.asarray(int8.dense(form, info, jnp.float32))
  step = np.expand_dims(np.asarray(form.scale), info.inputs)
  assert form.values.dtype == jnp.int8 and form.scale.shape == shape[len(info.inputs) :]
  assert np.abs(w - back).max() > 0 and np.all(np.abs(w - back) <= step / 2 * (1 + 1e-5))
  most = np.abs(np.asarray(form.values)).max(info.inputs)
  assert np.all(most == int8.LARGEST)  # each channel uses all of its range
  x = np.random.default_rng(1).normal(size=(3, 4, *shape[: len(info.inputs)]))
  wanted = np.einsum(spec, x, back.astype(np.float64))
  found = form.product(spec, jnp.asarray(x, jnp.float32), jnp.float32, jnp.float32)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  low = form.product(spec, jnp.asarray(x), jnp.bfloat16, jnp.bfloat16)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), wanted, atol=0.3)


def test_layers_have_scales_of_their_own_and_zeros_stay_zeros():
  shape, one = KERNELS['...NH,NHD->...D']
  info = Info((LAYERS, *one.names), one.inputs)
  w = kernel(shape, (3,))
  w[1] = 0
  form = int8.quantized(jnp.asarray(w), info)
  assert form.scale.shape == (3, 12) and np.all(np.isfinite(form.scale))
  back = int8.dense(form, info, jnp.bfloat16)
  assert back.dtype == jnp.bfloat16 and not np.any(back[1])
  for layer in (0, 2):
    alone = int8.quantized(jnp.asarray(w[layer]), one)
    same = jax.tree.map(np.array_equal, alone, jax.tree.map(lambda x, i=layer: x[i], form))
    assert all(jax.tree.leaves(same))
