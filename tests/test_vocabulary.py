"""Lookup and loss over the vocabulary against brute force in float64, on one device and on meshes.

The meshes run in a process of their own (this file as a script), for which the number of devices is set.
"""

import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding, vocabulary

B, T, D = 4, 6, 8
MESHES = [dict(data=4, tensor=2), dict(fsdp=4, tensor=2), dict(fsdp=2, sequence=2, tensor=2), dict(data=2, fsdp=2, sequence=2),
          dict(fsdp=2, tensor=4, rules='zero1')]


def inputs(vocab):
  rng = np.random.default_rng(vocab)
  x, table, bias = (rng.normal(size=size).astype(np.float32) for size in ((B, T, D), (vocab, D), (vocab,)))
  return x, table, bias, rng.integers(0, vocab, (B, T)), rng.integers(0, 3, (B, T)).astype(np.float32)


def exact(x, table, bias, targets, weights):
  """Sums of loss and of hits, and the gradients of the first, in float64."""
  x, table, bias = (array.astype(np.float64) for array in (x, table, bias))
  logits = x @ table.T + bias
  p = np.exp(logits)
  p /= p.sum(-1, keepdims=True)
  hot = np.eye(len(table))[targets]
  d = (p - hot) * weights[..., None]
  nll, right = -np.log((p * hot).sum(-1)), logits.argmax(-1) == targets
  return (nll * weights).sum(), (right * weights).sum(), (d @ table, np.einsum('btv,btd->vd', d, x), d.sum((0, 1)))


def check(vocab):
  x, table, bias, targets, weights = inputs(vocab)

  def loss(x, table, bias):
    nll, right = vocabulary.cross_entropy(x, table, targets, weights, bias)
    return 2 * nll, right

  (nll, right), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, table, bias)
  true_nll, true_right, true_gradients = exact(x, table, bias, targets, weights)
  np.testing.assert_allclose(nll / 2, true_nll, rtol=1e-5)
  np.testing.assert_allclose(jax.jit(loss)(x, table, bias)[0] / 2, true_nll, rtol=1e-5)  # without a gradient
  assert right == true_right
  for ours, theirs in zip(gradients, true_gradients, strict=True):
    np.testing.assert_allclose(ours / 2, theirs, atol=1e-5)
  found, back = jax.vjp(jax.jit(lambda table: vocabulary.lookup(table, targets, jnp.float32)), table)
  np.testing.assert_array_equal(found, table[targets])
  summed = np.zeros((vocab, D))
  np.add.at(summed, targets, x)
  np.testing.assert_allclose(back(jnp.asarray(x))[0], summed, atol=1e-5)


def on_meshes():
  """What the script checks."""
  for sizes in MESHES:
    for vocab in (16, 13, 7):
      with sharding.use(sharding.create_layout(**sizes)):
        check(vocab)
  with sharding.use(sharding.create_layout(**MESHES[1])), mock.patch.object(vocabulary, '_sum', lambda x, axes: x):
    with pytest.raises(AssertionError):
      check(16)  # nothing is summed over devices


@pytest.mark.parametrize('vocab', [1, 2, 13, 263])
def test_on_one_device(vocab):
  check(vocab)


def test_in_chunks(monkeypatch):
  monkeypatch.setattr(vocabulary, 'CHUNK_BYTES', 1)
  monkeypatch.setattr(sys.modules[__name__], 'T', 50)  # 200 tokens: two chunks of 128, the last not full
  assert vocabulary._chunked(jnp.zeros((B, T, D)), (B, T), 4).shape == (2, 128, D)
  check(13)


def test_on_meshes():
  root = pathlib.Path(__file__).parents[1]
  env = os.environ | {'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, cwd=root, env=env)
  assert done.returncode == 0, done.stderr[-3000:]


if __name__ == '__main__':
  on_meshes()
