import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.core import tree
from llm_jax.core.state import TrainState

PARAMS = {
  'model': {
    'layers': {'block': {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(2)}},
    'norm': {'scale': jnp.ones(3)},
  }
}


def test_paths_are_the_same_whatever_the_containers():
  state = TrainState(
    step=jnp.zeros(()), params=PARAMS, opt_state=optax.adam(1.0).init(PARAMS), rng=jnp.zeros(2)
  )
  names = tree.paths(state)
  assert names[:4] == [
    'step',
    'params/model/layers/block/bias',
    'params/model/layers/block/kernel',
    'params/model/norm/scale',
  ]
  assert 'opt_state/0/mu/model/norm/scale' in names and names[-1] == 'rng'
  assert tree.paths(tree.nest(tree.flatten(state))) != [] and set(
    tree.paths(tree.nest(tree.flatten(state)))
  ) == set(names)


@given(
  st.recursive(
    st.integers(),
    lambda child: st.dictionaries(st.sampled_from('abcd'), child, min_size=1),
    max_leaves=12,
  )
)
def test_nest_undoes_flatten(value):
  if isinstance(value, dict):
    assert tree.nest(tree.flatten(value)) == value


def test_replace_exchanges_some_leaves_and_refuses_unknown_ones():
  changed = tree.replace(PARAMS, {'model/norm/scale': 7})
  assert changed['model']['norm']['scale'] == 7
  assert changed['model']['layers'] == PARAMS['model']['layers']
  with pytest.raises(ValueError, match="'model/norm/scal'.*model/norm/scale"):
    tree.replace(PARAMS, {'model/norm/scal': 7})


def test_difference_names_missing_surplus_and_changed():
  found = {
    'model': {
      'layers': {'block': {'kernel': jnp.zeros((2, 4)), 'bias': jnp.zeros(2, jnp.int32)}},
      'extra': jnp.zeros(1),
    }
  }
  assert tree.difference(PARAMS, found).splitlines() == [
    '- model/norm/scale float32[3]',
    '+ model/extra float32[1]',
    '! model/layers/block/bias: expected float32[2], found int32[2]',
    '! model/layers/block/kernel: expected float32[2, 3], found float32[2, 4]',
  ]
  assert tree.difference(PARAMS, jax.tree.map(np.asarray, PARAMS)) == ''
