"""Rotary positions: products know distances alone; scaling is LLaMA's."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import rotary

pytestmark = pytest.mark.usefixtures('stated_broadcasting')


def test_rotations_know_distances_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
  frequencies = rotary.frequencies(8, 100.0)

  def rotated(x, position):
    rotation = rotary.rotation(jnp.array([[position]]), frequencies, jnp.float32)
    return rotary.rotate(x, rotation)

  def product(i, j):
    return float(jnp.sum(rotated(q, i) * rotated(k, j)))

  assert product(7, 3) == pytest.approx(product(24, 20), abs=1e-4)
  assert abs(product(7, 3) - product(7, 4)) > 1e-2
  np.testing.assert_array_equal(rotated(q, 0), q)
  angle = 3 * 100.0 ** (-2 / 8)  # of the second pair, at position 3
  a, b = float(q[0, 0, 0, 1]), float(q[0, 0, 0, 5])
  first, second = (
    a * math.cos(angle) - b * math.sin(angle),
    b * math.cos(angle) + a * math.sin(angle),
  )
  assert float(rotated(q, 3)[0, 0, 0, 1]) == pytest.approx(first, abs=1e-5)
  assert float(rotated(q, 3)[0, 0, 0, 5]) == pytest.approx(second, abs=1e-5)


def test_scaling_of_llama_3():
  plain = rotary.frequencies(64, 500000.0)
  scaled = rotary.frequencies(64, 500000.0, (32.0, 1.0, 4.0, 8192.0))
  for frequency, result in zip(plain, scaled, strict=True):
    wave = 2 * math.pi / frequency
    if wave < 8192 / 4:
      expected = frequency
    elif wave > 8192 / 1:
      expected = frequency / 32
    else:
      smooth = (8192 / wave - 1) / (4 - 1)
      expected = (1 - smooth) * frequency / 32 + smooth * frequency
    assert result == pytest.approx(expected, rel=1e-12)
  assert np.any((scaled != plain) & (scaled != plain / 32))
  with pytest.raises(ValueError, match='rope_scaling='):
    rotary.frequencies(64, 500000.0, (32.0, 4.0, 1.0, 8192.0))


def test_linear_scaling_stretches_all_waves():
  plain = rotary.frequencies(8, 100.0)
  np.testing.assert_allclose(rotary.frequencies(8, 100.0, (4.0,)), plain / 4, rtol=1e-15)
