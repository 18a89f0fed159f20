"""The kernel for TPUs, interpreted, against the chain rule."""

import functools

import numpy as np
import pytest

from llm_jax.nn.attention import splash


@pytest.mark.parametrize(
  ('causal', 'window', 'segmented'), [(True, None, True), (False, 64, True), (True, 100, False)]
)
def test_splash_matches_the_chain_rule(reference, causal, window, segmented):
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(1, 256, heads, 8)).astype(np.float32) for heads in (2, 1, 1)]
  segments = np.sort(rng.integers(1, 4, (1, 256))).astype(np.int32) if segmented else None
  run = functools.partial(
    splash.attention, segments_BT=segments, causal=causal, window=window, interpret=True
  )
  reference.check(run, arrays, segments, causal, window, atol=2e-5)
  with pytest.raises(AssertionError):
    reference.check(run, arrays, segments, not causal, window, atol=2e-5)
