"""Kernels in 8 bits: how far they are from what they stand for, and what they multiply to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.params import LAYERS, Info
from llm_jax.nn.forms import int8
from llm_jax.parallel import sharding
from llm_jax.parallel.cpu import products

KERNELS = {
  '...D,DNH->...NH': ((12, 2, 5), Info(('embed', 'heads', 'head_dim'), inputs=(0,))),
  '...NH,NHD->...D': ((2, 6, 12), Info(('heads', 'head_dim', 'embed'), inputs=(0, 1))),
  '...D,VD->...V': ((9, 12), Info(('vocab', 'embed'), inputs=(1,))),
}


def kernel(shape, layers=()):
  drawn = np.random.default_rng(0).normal(size=(*layers, *shape)).astype(np.float32)
  return drawn * np.linspace(0.1, 3, shape[-1], dtype=np.float32)


def spread(form):
  """The scale of each value."""
  return np.asarray(form.replace(values=jnp.ones_like(form.values)).dense(jnp.float32))


@pytest.mark.parametrize('group', [None, 3])
@pytest.mark.parametrize('spec', KERNELS)
def test_a_kernel_is_within_half_a_step_and_multiplies_like_the_array_it_stands_for(spec, group):
  shape, info = KERNELS[spec]
  w = kernel(shape)
  form = int8.Scheme(group).form(jnp.asarray(w), info)
  back = np.asarray(form.dense(jnp.float32))
  assert form.values.dtype == jnp.int8 and form.values.shape == shape
  assert np.abs(w - back).max() > 0 and np.all(np.abs(w - back) <= spread(form) / 2 * (1 + 1e-5))
  if group is None:  # each channel uses all of its range
    assert np.all(np.abs(np.asarray(form.values)).max(info.inputs) == int8.LARGEST)
  sizes = [shape[axis] for axis in info.inputs]
  x = np.random.default_rng(1).normal(size=(3, 4, *sizes))
  wanted = np.einsum(spec, x, back.astype(np.float64))
  product = lambda: form.product(spec, jnp.asarray(x, jnp.float32), jnp.float32, jnp.float32)
  np.testing.assert_allclose(product(), wanted, atol=1e-5)
  with sharding.use(sharding.create_layout(devices=jax.devices()[:1])):  # as one CPU does it
    np.testing.assert_allclose(product(), wanted, atol=1e-5)
  low = form.product(spec, jnp.asarray(x), jnp.bfloat16, jnp.bfloat16)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), wanted, atol=0.5)


def test_layers_have_scales_of_their_own_and_zeros_stay_zeros():
  shape, one = KERNELS['...NH,NHD->...D']
  info = Info((LAYERS, *one.names), one.inputs)
  w = kernel(shape, (3,))
  w[1] = 0
  form = int8.Scheme().form(jnp.asarray(w), info)
  assert form.scale.shape == (3, 1, 1, 12) and np.all(np.isfinite(form.scale))
  back = form.dense(jnp.bfloat16)
  assert back.dtype == jnp.bfloat16 and not np.any(back[1])
  for layer in (0, 2):
    alone = int8.Scheme().form(jnp.asarray(w[layer]), one)
    same = jax.tree.map(np.array_equal, alone, jax.tree.map(lambda x, i=layer: x[i], form))
    assert all(jax.tree.leaves(same))
  parts = int8.Scheme().parts(info)
  assert parts['scale'].names == (LAYERS, None, None, 'embed') and parts['values'] is info


def test_rows_of_a_table_are_those_of_the_array():
  _, info = KERNELS['...D,VD->...V']
  w = jnp.asarray(kernel((9, 12)))
  ids = jnp.array([[0, 8], [3, 3]])
  for group in (None, 4):
    form = int8.Scheme(group, 'none' if group else 'token').form(w, info)
    assert form.activations == 'none'  # what a table multiplies is not rounded
    np.testing.assert_array_equal(form.rows(ids, jnp.float32), form.dense(jnp.float32)[ids])


@pytest.mark.parametrize('spec', [spec for spec in KERNELS if 'V' not in spec])
def test_products_of_whole_numbers_are_exact(spec):
  """Against NumPy's in int32: the same sums, to the bit, before the scales."""
  shape, info = KERNELS[spec]
  form = int8.Scheme(None, 'token').form(jnp.asarray(kernel(shape)), info)
  sizes = [shape[axis] for axis in info.inputs]
  x = np.random.default_rng(1).normal(size=(3, 4, *sizes)).astype(np.float32)
  axes = tuple(range(2, x.ndim))
  step = np.maximum(np.abs(x).max(axes, keepdims=True), 0) / np.float32(127)
  rounded = np.clip(np.round(x / step), -127, 127).astype(np.int8)
  sums = np.einsum(spec, rounded.astype(np.int32), np.asarray(form.values, np.int32))
  outputs = sums.ndim - 2
  scale = np.squeeze(np.asarray(form.scale), info.inputs)
  wanted = sums.astype(np.float32) * step.reshape(3, 4, *[1] * outputs) * scale
  found = form.product(spec, jnp.asarray(x), jnp.float32, jnp.float32)
  np.testing.assert_array_equal(found, wanted)


def test_one_channel_times_100_ruins_the_scale_of_all_tokens_and_not_that_of_each_weight():
  """The outliers of LLM.int8(): with one scale for the tensor all other channels vanish."""
  shape, info = (64, 32), Info(('embed', 'mlp'), inputs=(0,))
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=shape), jnp.float32)
  x = rng.normal(size=(50, 64)).astype(np.float32)
  x[:, 7] *= 100
  w = w.at[7].set(0)  # the model has learned not to read it
  exact = x @ np.asarray(w)
  seen = {int8.MOST: jnp.max(jnp.abs(x))}
  lost = {}
  for activations in int8.ACTIVATIONS:
    form = int8.Scheme(None, activations).form(w, info, seen)
    found = form.product('...D,DF->...F', jnp.asarray(x), jnp.float32, jnp.float32)
    lost[activations] = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
  assert lost['none'] < 0.01 < 0.1 < lost['tensor'], lost


@pytest.mark.parametrize('activations, group', [('none', None), ('none', 3), ('token', None)])
@pytest.mark.parametrize('spec', KERNELS)
def test_for_few_rows_it_is_turned_and_multiplies_the_same(spec, activations, group, monkeypatch):
  monkeypatch.setattr(products, 'BLOCK', 40)  # several blocks, the last of them not full
  shape, one = KERNELS[spec]
  info = Info((LAYERS, *one.names), one.inputs)
  form = int8.Scheme(group, activations).form(jnp.asarray(kernel(shape, (2,))), info)
  form, turned = (jax.tree.map(lambda x: x[1], each) for each in (form, form.few_rows()))
  assert turned.values_NoI.shape[0] > 1
  x = np.random.default_rng(1).normal(size=(3, 4, *[shape[axis] for axis in one.inputs]))
  x = jnp.asarray(x, jnp.float32)
  wanted = form.product(spec, x, jnp.float32, jnp.float32)
  found = turned.product(spec.replace('VD', 'DV'), x, jnp.float32, jnp.float32)
  np.testing.assert_allclose(found, wanted, atol=1e-4)
