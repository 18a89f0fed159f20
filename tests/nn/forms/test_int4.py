"""Kernels in 4 bits: two values in a byte, and what they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.params import LAYERS, Info
from llm_jax.nn.forms import int4
from llm_jax.parallel.cpu import products

KERNELS = {
  '...D,DNH->...NH': ((12, 2, 5), Info(('embed', 'heads', 'head_dim'), inputs=(0,))),
  '...NH,NHD->...D': ((3, 4, 12), Info(('heads', 'head_dim', 'embed'), inputs=(0, 1))),
  '...D,VD->...V': ((9, 12), Info(('vocab', 'embed'), inputs=(1,))),
}


@pytest.mark.parametrize('group', [None, 2])
@pytest.mark.parametrize('spec', KERNELS)
def test_values_are_the_nearest_and_multiply_as_the_array_does(spec, group, monkeypatch):
  monkeypatch.setattr(products, 'BLOCK', 40)  # several blocks, the last of them not full
  shape, info = KERNELS[spec]
  w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  form = int4.Scheme(group).form(jnp.asarray(w), info)
  back = np.asarray(form.dense(jnp.float32))
  assert form.packed.dtype == jnp.uint8 and form.packed.size * 2 == w.size
  # By hand, group by group of the last axis that is summed over.
  last = info.inputs[-1]
  moved = np.moveaxis(w, last, -1)
  if group is None:
    others = tuple(axis for axis in info.inputs)
    most = np.abs(w).max(others, keepdims=True)
    wanted = np.clip(np.round(w / (most / np.float32(7))), -7, 7) * (most / np.float32(7))
  else:
    split = moved.reshape(*moved.shape[:-1], -1, group)
    step = np.abs(split).max(-1, keepdims=True) / np.float32(7)
    wanted = (np.clip(np.round(split / step), -7, 7) * step).reshape(moved.shape)
    wanted = np.moveaxis(wanted, -1, last)
  np.testing.assert_allclose(back, wanted, rtol=1e-6)
  assert np.abs(w - back).max() > 0
  x = np.random.default_rng(1).normal(size=(3, *(shape[axis] for axis in info.inputs)))
  other = form.unpacked()
  assert other.values.dtype == jnp.int4 and other.values.size == w.size
  for rows in (x, np.tile(x, (20, *[1] * (x.ndim - 1)))):
    for each in (form, other, form.few_rows()):
      found = each.product(spec, jnp.asarray(rows, jnp.float32), jnp.float32, jnp.float32)
      np.testing.assert_allclose(found, np.einsum(spec, rows, back), atol=1e-4)


def test_rows_of_a_table_and_layers_of_a_stack():
  w = jnp.asarray(np.random.default_rng(0).normal(size=(9, 12)), jnp.float32)
  form = int4.Scheme(4).form(w, KERNELS['...D,VD->...V'][1])
  ids = jnp.array([[0, 8], [3, 3]])
  np.testing.assert_array_equal(form.rows(ids, jnp.float32), form.dense(jnp.float32)[ids])
  np.testing.assert_array_equal(form.unpacked().rows(ids, jnp.float32), form.rows(ids, jnp.float32))
  stack, one = Info((LAYERS, 'embed', 'mlp'), inputs=(0,)), Info(('embed', 'mlp'), inputs=(0,))
  many = int4.Scheme(2).form(jnp.stack([w.T, 2 * w.T]), stack)
  for layer in range(2):
    alone = int4.Scheme(2).form((1 + layer) * w.T, one)
    np.testing.assert_array_equal(many.packed[layer], alone.packed)
    np.testing.assert_array_equal(many.dense(jnp.float32)[layer], alone.dense(jnp.float32))


def test_what_does_not_fit_says_why():
  info = Info(('embed', 'mlp'), inputs=(0,))
  assert 'odd' in int4.Scheme(None).fits((3, 4), info)
  assert 'groups of 4' in int4.Scheme(4).fits((6, 4), info)
  assert int4.Scheme(3).fits((6, 4), info) is None
