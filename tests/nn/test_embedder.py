"""The embedder: sums of its tables, and what layer its parameters belong to."""

import jax
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.nn.embedder import Embedder
from llm_jax.nn.options import Options

BASE = Options(dim=12, layers=2, heads=2, mlp_dim=8)
TOKENS, POSITIONS = np.array([[3, 5, 0]]), np.array([[0, 1, 0]])
pytestmark = pytest.mark.usefixtures('stated_broadcasting')


def test_it_sums_its_tables(random_params):
  module = Embedder(11, BASE, positions=6, position_offset=2, token_types=2)
  params = random_params(module, TOKENS, POSITIONS, None, False)
  token, position, kind = (
    np.asarray(params['params'][name]['embedding']) for name in ('token', 'position', 'token_type')
  )
  np.testing.assert_allclose(
    module.apply(params, TOKENS, POSITIONS, np.array([[0, 1, 1]]), False),
    token[TOKENS] + position[POSITIONS + 2] + kind[[[0, 1, 1]]],
    atol=1e-6,
  )
  np.testing.assert_allclose(
    module.apply(params, TOKENS, POSITIONS, None, False),
    token[TOKENS] + position[POSITIONS + 2] + kind[0],
    atol=1e-6,
  )


def test_a_type_that_it_does_not_know_is_its_last(random_params):
  one = Embedder(11, BASE, token_types=1)
  params = random_params(one, TOKENS, POSITIONS, None, False)
  np.testing.assert_array_equal(
    one.apply(params, TOKENS, POSITIONS, np.array([[0, 1, 1]]), False),
    one.apply(params, TOKENS, POSITIONS, None, False),
  )


def test_all_of_it_comes_before_the_layers():
  module = Embedder(11, BASE, positions=6, token_types=2, norm=True)
  boxed = jax.eval_shape(
    lambda: module.init(jax.random.key(0), TOKENS, POSITIONS, None, False)['params']
  )
  infos = params_lib.infos(boxed)
  assert len(infos) == 5 and {i.layer for i in infos.values()} == {params_lib.EMBEDDINGS}
  assert {path for path, info in infos.items() if info.decayed} == {
    'token/embedding',
    'position/embedding',
    'token_type/embedding',
  }
