"""Random bits on a CPU: the draws are JAX's own, the generator that of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.parallel.cpu import random


# The known answers that come with the authors' library, Random123.
@pytest.mark.parametrize(
  'key, counter, answer',
  [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
  ],
)
def test_the_generator_gives_the_known_answers(key, counter, answer):
  words = random.threefry_2x32(*(jnp.uint32(word) for word in key + counter))
  assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize('shape', [(7,), (3, 5, 8), (2, 3, 1, 16, 16), (0, 4), ()])
@pytest.mark.parametrize('probability', [0.9, 0.5, 1 / 3, 1e-3, 1.0])
def test_draws_are_those_of_jax(shape, probability):
  rng = jax.random.key(3)
  ours = jax.jit(random.bernoulli, static_argnums=(1, 2))(rng, probability, shape)
  np.testing.assert_array_equal(ours, jax.random.bernoulli(rng, probability, shape))


@pytest.mark.parametrize(
  'setting', [{'jax_enable_x64': True}, {'jax_threefry_partitionable': False}]
)
def test_draws_are_those_of_jax_however_it_is_set(setting):
  ((name, value),) = setting.items()
  before = getattr(jax.config, name)
  jax.config.update(name, value)
  try:
    rng = jax.random.key(3)
    np.testing.assert_array_equal(
      random.bernoulli(rng, 0.9, (64, 8)), jax.random.bernoulli(rng, 0.9, (64, 8))
    )
  finally:
    jax.config.update(name, before)


def test_another_key_draws_others():
  draws = [random.bernoulli(jax.random.key(seed), 0.5, (64,)) for seed in (0, 1)]
  assert np.any(draws[0] != draws[1])


def test_another_generator_is_left_to_jax():
  rng = jax.random.key(3, impl='rbg')
  np.testing.assert_array_equal(
    random.bernoulli(rng, 0.9, (64,)), jax.random.bernoulli(rng, 0.9, (64,))
  )
