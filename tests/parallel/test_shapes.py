"""Shapes of a service's batches: few, large enough, and whole multiples of what a mesh needs."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.parallel import shapes

AXES = ('data', 'fsdp', 'sequence', 'tensor')


def mesh():
  return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_row_holds_its_text_and_has_one_of_few_lengths(tokens, most):
  length = shapes.length(mesh(), min(tokens, most), most)
  assert min(tokens, most) <= length <= most
  assert length == most or (length % shapes.TILE == 0 and length < 2 * max(tokens, shapes.TILE))
  assert length in shapes.lengths(mesh(), most) and len(shapes.lengths(mesh(), most)) <= 8


@pytest.mark.parametrize(
  ('length', 'most', 'rows'), [(64, 8, 4), (128, 8, 2), (512, 8, 2), (64, 3, 3), (64, 1, 1)]
)
def test_a_batch_on_a_cpu_has_few_rows(length, most, rows):
  assert shapes.rows(mesh(), length, most) == rows
