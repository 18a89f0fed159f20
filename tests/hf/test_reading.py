"""Comparing tensors block by block; the rest of reading is tested with whole folders."""

import types

import numpy as np
import pytest

from llm_jax.hf import reading


def tensors(**arrays):
  return types.SimpleNamespace(view=arrays.__getitem__)


def test_every_block_is_compared(monkeypatch):
  monkeypatch.setattr(reading, '_COMPARED', 4)
  a = np.arange(10.0).reshape(2, 5)
  reading.check_equal(tensors(a=a, b=a.copy()), 'a', 'b')
  for i in range(10):
    b = a.copy()
    b.flat[i] += 1
    with pytest.raises(ValueError, match='a and b differ, and must be the same'):
      reading.check_equal(tensors(a=a, b=b), 'a', 'b')


@pytest.mark.parametrize('b', [np.zeros((3, 2)), np.zeros((2, 3), np.float32)])
def test_shape_and_type_are_compared(b):
  with pytest.raises(ValueError, match='a and b differ'):
    reading.check_equal(tensors(a=np.zeros((2, 3)), b=b), 'a', 'b')
