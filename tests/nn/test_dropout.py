"""Dropout: what is kept grows, and the draws do not depend on the platform."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.nn import dropout


def test_what_is_kept_grows_and_the_rest_is_zero():
  x = jnp.full((4096,), 2.0)
  y = np.asarray(dropout.dropout(x, 0.25, jax.random.key(0)))
  assert set(np.unique(y)) == {np.float32(0), np.float32(2) / np.float32(0.75)}
  assert abs(np.mean(y == 0) - 0.25) < 5 * (0.25 * 0.75 / 4096) ** 0.5


def test_draws_are_the_same_on_every_platform():
  draws = []
  for platform in ('cpu', 'tpu'):
    with mock.patch.object(dropout.sharding, 'platform', lambda platform=platform: platform):
      draws.append(dropout.bernoulli(jax.random.key(3), 0.9, (5, 64)))
  np.testing.assert_array_equal(*draws)
  assert 0 < np.sum(draws[0]) < draws[0].size


def test_it_drops_in_training_alone():
  class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, rate, train):
      return dropout.drop(self, x, rate, train)

  x, rngs = jnp.ones((64,)), {'dropout': jax.random.key(0)}
  assert np.any(Dropped().apply({}, x, 0.5, True, rngs=rngs) != x)
  np.testing.assert_array_equal(Dropped().apply({}, x, 0.0, True), x)
  np.testing.assert_array_equal(Dropped().apply({}, x, 0.5, False), x)
