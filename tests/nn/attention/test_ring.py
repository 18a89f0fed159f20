"""Rings of one device, and of eight in a process of its own (this file as a script)."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.attention.dispatch import attention
from llm_jax.parallel import sharding


def ring_of_devices(check):
  """What the script checks."""
  rng = np.random.default_rng(0)
  segments = np.sort(rng.integers(1, 4, (2, 16))).astype(np.int32)
  for sizes in (dict(sequence=8), dict(data=2, sequence=2, tensor=2), dict(sequence=2, tensor=4)):
    layout = sharding.create_layout(**sizes)
    for kv_heads, causal, window in (
      (4, True, None),
      (2, False, None),
      (1, True, 3),
      (2, False, 4),
    ):
      arrays = [
        rng.normal(size=(2, 16, heads, 8)).astype(np.float32) for heads in (4, kv_heads, kv_heads)
      ]
      with sharding.use(layout):
        run = functools.partial(attention, segments_BT=segments, causal=causal, window=window)
        check(jax.jit(run), arrays, segments, causal, window)
    with sharding.use(layout):
      ring_dropout()
      ring_with_bias(check)
      ring_of_another_row(check)


def ring_with_bias(check):
  """Of scores by distance: its gradient is summed over all rows and positions."""
  rng = np.random.default_rng(1)
  segments = np.sort(rng.integers(1, 4, (2, 16))).astype(np.int32)
  arrays = [rng.normal(size=(2, 16, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
  bias = rng.normal(size=(4, 31)).astype(np.float32)
  for causal in (True, False):
    run = lambda q, k, v, bias_ND, causal=causal: attention(
      q, k, v, bias_ND=bias_ND, segments_BT=segments, causal=causal
    )
    check(jax.jit(run), arrays, segments, causal, bias=bias)


def ring_of_another_row(check):
  """Keys of a longer row, which goes around while the queries stay."""
  rng = np.random.default_rng(2)
  segments = np.sort(rng.integers(1, 4, (2, 16))).astype(np.int32)
  keys = np.tile(np.repeat(np.arange(4, dtype=np.int32), 8), (2, 1))
  arrays = [
    rng.normal(size=(2, *shape, 8)).astype(np.float32) for shape in ((16, 4), (32, 2), (32, 2))
  ]
  run = functools.partial(attention, segments_BT=segments, key_segments_BS=keys)
  check(jax.jit(run), arrays, segments, key_segments=keys)


def ring_dropout():
  """One key, one mask; right on average; and the backward pass drops what the forward pass did."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, 16, 4, 8)).astype(np.float32)) for _ in range(3))
  run = jax.jit(
    lambda v, key: attention(q, k, v, dropout_rate=0.25, dropout_rng=key, implementation='ring')
  )
  once = run(v, jax.random.key(0))
  np.testing.assert_array_equal(once, run(v, jax.random.key(0)))
  assert np.abs(once - run(v, jax.random.key(1))).max() > 0.1
  mean = np.mean([run(v, key) for key in jax.random.split(jax.random.key(2), 400)], axis=0)
  plain = attention(q, k, v, implementation='xla')
  assert np.abs(mean - plain).max() < 0.25 < np.abs(once - plain).max()
  assert np.abs(mean - plain).mean() < 0.03
  # Linear in the values: their gradient is the transpose of the map forward only under the same
  # mask.
  g = jnp.asarray(rng.normal(size=once.shape).astype(np.float32))
  gradient = jax.vjp(lambda v: run(v, jax.random.key(0)), v)[1](g)[0]
  np.testing.assert_allclose(jnp.vdot(once, g), jnp.vdot(v, gradient), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_a_ring_of_one_device_drops():
  ring_dropout()


@pytest.mark.slow
def test_a_ring_of_devices():
  root = pathlib.Path(__file__).parents[3]
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
  import conftest  # of this folder

  ring_of_devices(conftest.check)
