"""Which key each query sees, by brute force over pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.attention.masks import visible


@pytest.mark.parametrize('window', [None, 1, 4])
@pytest.mark.parametrize('causal', [True, False])
def test_visible_is_what_each_pair_says(reference, causal, window):
  queries = np.array([[6, 2], [0, 5]])  # each row has its own
  segments = reference.segments
  of_queries = np.take_along_axis(segments, queries, axis=1)
  mask = visible(
    jnp.asarray(queries), jnp.arange(reference.T), (of_queries, segments), causal, window
  )
  for b, t, s in np.ndindex(2, 2, reference.T):
    distance = queries[b, t] - s
    seen = of_queries[b, t] == segments[b, s] and (not causal or distance >= 0)
    if window is not None:
      seen = seen and (distance < window if causal else 2 * abs(distance) <= window)
    assert mask[b, 0, 0, t, s] == seen


def test_nothing_hides_nothing():
  assert visible(jnp.arange(3), jnp.arange(3), None, False, None) is None
