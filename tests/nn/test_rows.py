"""Rows at some of their indices."""

import jax.numpy as jnp
import numpy as np

from llm_jax.nn.rows import at


def test_indices_in_any_order_and_more_than_once():
  x = np.arange(24).reshape(2, 3, 4)
  indices = np.array([[2, 0, 2], [1, 1, 0]])
  np.testing.assert_array_equal(at(jnp.asarray(x), indices), x[[[0], [1]], indices])
  flat = x[..., 0]
  np.testing.assert_array_equal(at(jnp.asarray(flat), indices), flat[[[0], [1]], indices])
  assert at(x, None) is x
