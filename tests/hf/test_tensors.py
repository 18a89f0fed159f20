"""Axes by letters, compared with the same axes index by index."""

import numpy as np
import pytest

from llm_jax.hf.tensors import HEADS_IN, HEADS_OUT, Location, Tensor, linear

D, N, H = 4, 2, 3
X = np.arange(D * N * H, dtype=np.float32)


def test_queries_are_rows_of_heads():
  """Row n H + h of theirs is head n, dimension h of ours."""
  theirs = X.reshape(N * H, D)
  tensor = Tensor('q', HEADS_OUT[0], ('query',))
  assert tensor.shape((D, N, H)) == (6, 4)
  ours_DNH = tensor.part(theirs, 'query', (D, N, H))
  for d, n, h in np.ndindex(D, N, H):
    assert ours_DNH[d, n, h] == theirs[n * H + h, d]


def test_what_heads_give_is_summed_over_columns():
  theirs = X.reshape(D, N * H)
  ours_NHD = Tensor('o', HEADS_IN[0], ('out',)).part(theirs, 'out', (N, H, D))
  for n, h, d in np.ndindex(N, H, D):
    assert ours_NHD[n, h, d] == theirs[d, n * H + h]


@pytest.mark.parametrize(
  ('axes', 'row'),
  [
    ('(SNH)D->DNH', lambda s, n, h: (s * N + n) * H + h),  # all queries, all keys, all values
    ('(NSH)D->DNH', lambda s, n, h: (n * 3 + s) * H + h),  # head by head
  ],
)
def test_one_matrix_for_three(axes, row):
  theirs = np.arange(3 * D * N * H).reshape(3 * N * H, D)
  tensor = Tensor('qkv', axes, ('query', 'key', 'value'))
  assert tensor.shape((D, N, H)) == theirs.shape
  for s, path in enumerate(tensor.paths):
    ours_DNH = tensor.part(theirs, path, (D, N, H))
    for d, n, h in np.ndindex(D, N, H):
      assert ours_DNH[d, n, h] == theirs[row(s, n, h), d]


def test_what_is_assigned_to_a_part_is_in_theirs():
  theirs = np.zeros((2 * 5, D))
  weight, _ = linear('Wi', 'gate', 'up', axes=('(SO)I->IO', '(SO)->O'))
  weight.part(theirs, 'up/kernel', (D, 5))[...] = 1
  assert (theirs[:5] == 0).all() and (theirs[5:] == 1).all()


def test_the_shape_of_one_layer():
  tensor = Tensor('layers.{}.w', 'OI->IO', ('w',))
  assert tensor.layered and not Tensor('w', 'OI->IO', ('w',)).layered
  assert Location(tensor, 'w', ('layers.0.w', 'layers.1.w'), True).in_layer((2, 3, 4)) == (3, 4)
  assert Location(tensor, 'w', ('layers.0.w',), False).in_layer((3, 4)) == (3, 4)
