"""Lookup and loss over the vocabulary against brute force in float64, on one device and on meshes.

The meshes run in a process of their own (this file as a script), for which the number of devices is
set.
"""

import math
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bert_tiny, gpt_tiny
from llm_jax.core import config
from llm_jax.nn import vocabulary
from llm_jax.parallel import sharding
from llm_jax.training import program

B, T, D = 4, 6, 8
MESHES = [
  dict(data=4, tensor=2),
  dict(fsdp=4, tensor=2),
  dict(fsdp=2, sequence=2, tensor=2),
  dict(data=2, fsdp=2, sequence=2),
  dict(fsdp=2, tensor=4, rules='zero1'),
]


def inputs(vocab):
  rng = np.random.default_rng(vocab)
  x, table, bias = (
    rng.normal(size=size).astype(np.float32) for size in ((B, T, D), (vocab, D), (vocab,))
  )
  return (
    x,
    table,
    bias,
    rng.integers(0, vocab, (B, T)),
    rng.integers(0, 3, (B, T)).astype(np.float32),
  )


def exact(x, table, bias, targets, weights, label_smoothing, z_loss):
  """Sums of loss, cross-entropy and hits, and the gradients of the first, in float64."""
  x, table, bias = (array.astype(np.float64) for array in (x, table, bias))
  logits = x @ table.T + bias
  p = np.exp(logits)
  total = p.sum(-1, keepdims=True)
  p /= total
  hot, lse = np.eye(len(table))[targets], np.log(total[..., 0])
  wanted = (1 - label_smoothing) * hot + label_smoothing / len(table)
  d = (p - wanted + 2 * z_loss * lse[..., None] * p) * weights[..., None]
  nll, right = -np.log((p * hot).sum(-1)), logits.argmax(-1) == targets
  loss = -(np.log(p) * wanted).sum(-1) + z_loss * lse**2
  return [(value * weights).sum() for value in (loss, nll, right)], (
    d @ table,
    np.einsum('btv,btd->vd', d, x),
    d.sum((0, 1)),
  )


def check(vocab, label_smoothing=0.0, z_loss=0.0):
  x, table, bias, targets, weights = inputs(vocab)

  def loss(x, table, bias):
    sums = vocabulary.cross_entropy(x, table, targets, weights, bias, label_smoothing, z_loss)
    return 2 * sums.loss, sums

  (_, found), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, table, bias)
  true, true_gradients = exact(x, table, bias, targets, weights, label_smoothing, z_loss)
  for sums in (found, jax.jit(loss)(x, table, bias)[1]):  # without a gradient, too
    np.testing.assert_allclose(sums[:2], true[:2], rtol=1e-5)
    assert sums.right == true[2]
  for ours, theirs in zip(gradients, true_gradients, strict=True):
    np.testing.assert_allclose(ours / 2, theirs, atol=1e-5)
  found, back = jax.vjp(
    jax.jit(lambda table: vocabulary.lookup(table, targets, jnp.float32)), table
  )
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
        check(vocab, 0.1, 0.01)
  with (
    sharding.use(sharding.create_layout(**MESHES[1])),
    mock.patch.object(vocabulary, '_sum', lambda x, axes: x),
  ):
    with pytest.raises(AssertionError):
      check(16)  # nothing is summed over devices


@pytest.mark.parametrize('vocab', [1, 2, 13, 263])
def test_on_one_device(vocab):
  check(vocab)


@pytest.mark.parametrize(('label_smoothing', 'z_loss'), [(0.1, 0.0), (0.0, 0.01), (0.3, 0.1)])
def test_label_smoothing_and_z_loss(label_smoothing, z_loss):
  check(13, label_smoothing, z_loss)
  with pytest.raises(AssertionError):
    plain = vocabulary._Loss(13, 0.0, 0.0)
    with mock.patch.object(vocabulary, '_Loss', lambda *_: plain):
      check(13, label_smoothing, z_loss)


def test_in_chunks(monkeypatch):
  monkeypatch.setattr(vocabulary, 'CHUNK_BYTES', 1)
  monkeypatch.setattr(
    sys.modules[__name__], 'T', 50
  )  # 200 tokens: two chunks of 128, the last not full
  assert vocabulary._chunked(jnp.zeros((B, T, D)), (B, T), 4).shape == (2, 128, D)
  check(13)


def most_positions(text, vocab):
  """The most positions whose float32 logits one array of a compiled text holds."""
  shapes = [
    [int(size) for size in dims.split(',')] for dims in set(re.findall(r'f32\[([\d,]+)\]', text))
  ]
  return max(math.prod(shape) // vocab for shape in shapes if vocab in shape)


@pytest.mark.slow
@pytest.mark.parametrize('module', [bert_tiny, gpt_tiny])
def test_a_train_step_never_holds_the_logits_of_all_positions(monkeypatch, module):
  vocab, positions = 5003, 2048 if module is gpt_tiny else 16 * math.ceil(0.15 * 128)
  options = module.get_config().to_dict() | dict(batch_size=16, seq_len=128, micro_batches=1)
  options['model'] |= dict(vocab_size=vocab, layers=1, dim=32, mlp_dim=32)

  def most():
    made = program.outline(config.parse(options), jax.devices())
    text = made.train_step.lower(made.state, made.batch).compile().as_text()
    return most_positions(text, vocab)

  assert most() == positions  # one chunk has room
  monkeypatch.setattr(vocabulary, 'CHUNK_BYTES', 128 * vocab * 4)
  assert most() <= 128


@pytest.mark.slow
def test_on_meshes():
  root = pathlib.Path(__file__).parents[2]
  env = os.environ | {
    'PYTHONPATH': str(root),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
  }
  done = subprocess.run(
    [sys.executable, __file__], capture_output=True, text=True, check=False, cwd=root, env=env
  )
  assert done.returncode == 0, done.stderr[-3000:]


if __name__ == '__main__':
  on_meshes()
