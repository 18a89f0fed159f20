"""Buckets of distances, by the words of the paper; `tests/parity` compares them with T5's."""

import math

import numpy as np
import pytest

from llm_jax.nn import relative


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize(('buckets', 'farthest'), [(32, 128), (8, 12), (16, 20)])
def test_each_distance_has_the_bucket_of_its_size(causal, buckets, farthest):
  distances = np.arange(-300, 301)
  found = relative.bucket(distances, buckets, farthest, causal)
  half = buckets if causal else buckets // 2
  for distance, number in zip(distances.tolist(), found.tolist(), strict=True):
    apart = max(distance, 0) if causal else abs(distance)
    later = 0 if causal or distance >= 0 else half  # keys after the query
    if apart < half // 2:
      assert number == later + apart
      continue
    share = math.log(apart / (half // 2)) / math.log(farthest / (half // 2))
    wanted = half // 2 + share * (half - half // 2)
    # On a border between two buckets either is right in single precision.
    assert number - later in {min(int(wanted + e), half - 1) for e in (-1e-6, 1e-6)}
  assert len(set(found[distances >= farthest].tolist())) == 1


@pytest.mark.parametrize('buckets', [0, 2, 6])
def test_buckets_that_cannot_be(buckets):
  with pytest.raises(ValueError, match=f'buckets={buckets} must be a multiple of 4'):
    relative.check(buckets, 128)
