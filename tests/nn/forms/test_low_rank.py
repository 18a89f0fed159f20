"""Kernels as two thin ones, against NumPy's singular values."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.params import LAYERS, Info
from llm_jax.nn.forms import low_rank

KERNELS = {
  '...D,DNH->...NH': ((12, 2, 5), Info(('embed', 'heads', 'head_dim'), inputs=(0,))),
  '...NH,NHD->...D': ((2, 5, 12), Info(('heads', 'head_dim', 'embed'), inputs=(0, 1))),
}


def drawn(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('spec', KERNELS)
def test_it_is_the_nearest_kernel_of_its_rank_and_at_full_rank_the_kernel_itself(spec):
  shape, info = KERNELS[spec]
  w = drawn(shape)
  inputs = int(np.prod([shape[axis] for axis in info.inputs]))
  matrix = w.reshape(inputs, -1)
  u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
  form = low_rank.Scheme(3).form(jnp.asarray(w), info)
  assert form.down.shape == (*[shape[axis] for axis in info.inputs], 3)
  nearest = (u[:, :3] * s[:3]) @ v[:3]
  np.testing.assert_allclose(form.dense(jnp.float32).reshape(inputs, -1), nearest, atol=1e-5)
  whole = low_rank.Scheme(min(matrix.shape)).form(jnp.asarray(w), info)
  np.testing.assert_allclose(whole.dense(jnp.float32), w, atol=1e-5)
  x = drawn((3, 4, *[shape[axis] for axis in info.inputs]), 1)
  found = form.product(spec, jnp.asarray(x), jnp.float32, jnp.float32)
  np.testing.assert_allclose(found, np.einsum(spec, x, form.dense(jnp.float32)), atol=1e-4)


def test_inputs_that_are_large_on_texts_count_for_more():
  info = Info((LAYERS, 'embed', 'mlp'), inputs=(0,))
  w, x = drawn((2, 16, 12)), drawn((200, 16), 1) * np.geomspace(0.01, 10, 16, dtype=np.float32)
  seen = {low_rank.SQUARE: jnp.stack([jnp.mean(x**2, 0)] * 2)}
  blind, seeing = (
    low_rank.Scheme(4).form(jnp.asarray(w), info, given).dense(jnp.float32)
    for given in (None, seen)
  )
  for layer in range(2):
    wrong = [np.linalg.norm(x @ (np.asarray(v[layer]) - w[layer])) for v in (blind, seeing)]
    assert wrong[1] < 0.7 * wrong[0], wrong
  # By hand: the rows weighted, the nearest matrix, the weights taken out again.
  root = np.sqrt(np.mean(x.astype(np.float64) ** 2, 0))[:, None]
  u, s, v = np.linalg.svd(w[0] * root, full_matrices=False)
  np.testing.assert_allclose(seeing[0], ((u[:, :4] * s[:4]) @ v[:4]) / root, atol=1e-3)


def test_what_would_be_no_smaller_is_refused():
  info = Info(('embed', 'mlp'), inputs=(0,))
  assert low_rank.Scheme(2).fits((6, 4), info) is None
  assert 'no smaller' in low_rank.Scheme(3).fits((6, 4), info)
  assert 'table' in low_rank.Scheme(1).fits((6, 4), Info(('vocab', 'embed'), inputs=(1,)))
