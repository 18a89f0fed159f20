"""What a reference thinks of texts: kept whole, and found again."""

import numpy as np
import pytest

from llm_jax.core.config import Config
from llm_jax.programs import reference


def test_numbers_come_back_as_they_were(tmp_path):
  path = tmp_path / 'deep' / 'x.npz'
  assert reference._read(path) is None
  rng = np.random.default_rng(0)
  values = [rng.normal(size=(n, 2)).astype(np.float32) * 10.0**n for n in (3, 1, 12)] * 4
  reference._write(path, values)
  for ours, each in zip(reference._read(path), values, strict=True):
    np.testing.assert_array_equal(np.array(ours, np.float32), each)
  assert [file.name for file in path.parent.iterdir()] == ['x.npz']


class Rows:
  def __len__(self):
    return 1


def test_a_model_must_be_named(tmp_path):
  named = {'name': 'x'}
  config = Config(steps=1, batch_size=1, seq_len=8, tokenizer=named, model=named, objective=named)
  with pytest.raises(ValueError, match='give config.init_from, or config.objective.reference, or'):
    reference.attach(config, object(), None, [Rows()], tmp_path)
  reference.attach(config, object(), None, [], tmp_path)
