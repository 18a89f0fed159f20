"""A cache that grows token by token sees what whole rows see, also where it forgets."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.attention.cache import KeyValues, Rounded, empty, extended, recall


@pytest.mark.parametrize('window', [None, 3])
def test_the_newest_token_sees_what_it_sees_in_the_whole_row(reference, window):
  q, k, v = map(jnp.asarray, reference.inputs(kv_heads=2))
  whole = reference.brute_force(*map(np.asarray, (q, k, v)), None, True, window)
  slots = window or reference.T
  zeros = jnp.zeros((reference.B, 2, slots, reference.H))
  prompts = jnp.array([2, 4])  # tokens of each row; those behind are padding
  cache = extended(KeyValues(zeros, zeros), k[:, :4], v[:, :4], prompts)
  for step in range(3):
    lengths = prompts + step + 1
    newest = (lengths - 1)[:, None, None, None]
    q_1, k_1, v_1 = (jnp.take_along_axis(x, newest, axis=1) for x in (q, k, v))
    cache = extended(cache, k_1, v_1, lengths)
    out = recall(q_1, cache, lengths)
    expected = np.take_along_axis(whole, np.asarray(newest), axis=1)
    np.testing.assert_allclose(out, expected, atol=2e-6)
  forgetful = KeyValues(cache.keys, cache.values.at[:, :, 0].set(9.0))
  assert np.abs(recall(q_1, forgetful, lengths) - out).max() > 0.1


@pytest.mark.parametrize('window', [None, 3])
def test_in_8_bits_it_recalls_nearly_the_same(reference, window):
  """Against the whole row: what 8 bits leave out of keys and values, and not more."""
  q, k, v = map(jnp.asarray, reference.inputs(kv_heads=2))
  whole = reference.brute_force(*map(np.asarray, (q, k, v)), None, True, window)
  shape = reference.B, 2, window or reference.T, reference.H
  prompts = jnp.array([2, 4])
  cache = extended(empty(shape, 'int8'), k[:, :4], v[:, :4], prompts)
  assert isinstance(cache.keys, Rounded) and cache.values.values.dtype == jnp.int8
  for step in range(3):
    lengths = prompts + step + 1
    newest = (lengths - 1)[:, None, None, None]
    q_1, k_1, v_1 = (jnp.take_along_axis(x, newest, axis=1) for x in (q, k, v))
    cache = extended(cache, k_1, v_1, lengths)
    out = recall(q_1, cache, lengths)
    expected = np.take_along_axis(whole, np.asarray(newest), axis=1)
    error = np.abs(out - expected).max()
    assert 0 < error < 0.03 * np.abs(expected).max()
  # By hand: rounded keys and values in place of the whole ones.
  rounded = [
    np.asarray(held.values, np.float32) * np.asarray(held.scale)
    for held in (cache.keys, cache.values)
  ]
  same = recall(q_1, KeyValues(*map(jnp.asarray, rounded)), lengths)
  np.testing.assert_allclose(out, same, atol=2e-6)
