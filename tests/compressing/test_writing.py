"""A smaller model is written whole, or not at all, and opens as what it is."""

import numpy as np
import pytest

import llm_jax
from configs import base
from llm_jax.compressing import making, writing
from llm_jax.core import config as config_lib
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.contracts import Seen
from llm_jax.inference.session import Session
from llm_jax.programs import assemble

SHAPE = dict(dim=8, layers=2, heads=2, mlp_dim=16, max_len=16, vocab_size=263)


@pytest.fixture(scope='module')
def session():
  given = base.get_config().to_dict()
  given |= dict(steps=1, batch_size=2, seq_len=16, tokenizer=dict(name='byte'))
  given['model'] = dict(name='encoder', variant='bert_base', remat='none', **SHAPE)
  given['objective'] = dict(name='classify', classes=('a', 'b'), pool='cls')
  given['data'] = {}
  config = config_lib.parse(given)
  made = Session('nowhere', config, assemble.byte_tokenizer(config))
  rng = np.random.default_rng(0)
  drawn = lambda path, x: rng.normal(size=x.shape).astype(x.dtype)
  made.params = tree.map_with_path(drawn, made.program.params)
  return made


def test_what_is_written_opens_as_it_was(session, tmp_path):
  whole, params = making.parent(session)
  made = making.make(whole, params, dict(name='int8'), Seen())
  writing.write(made, tmp_path / 'small', {'loss': 0.5})
  opened = llm_jax.open(tmp_path / 'small')
  assert opened.config.compress == {'name': 'int8'} and opened.config.init_from is None
  ours, theirs = (params_lib.leaves(x) for x in (made.params, opened.params))
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    both = zip(tree.flatten(leaf).values(), tree.flatten(theirs[path]).values(), strict=True)
    assert params_lib.is_form(leaf) == params_lib.is_form(theirs[path])
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in both), path
  assert not list(tmp_path.glob('*.partial'))
  with pytest.raises(ValueError, match='changes nothing'):  # numbers that 8 bits have already
    zeros = tree.map_with_path(lambda path, x: np.zeros_like(x), params)
    making.make(whole, zeros, dict(name='int8'), Seen())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
  (tmp_path / 'x').mkdir()
  writing.check_target(tmp_path / 'x')
  writing.check_target(tmp_path / 'y')
  (tmp_path / 'x' / 'file').touch()
  with pytest.raises(ValueError, match='holds something already'):
    writing.check_target(tmp_path / 'x')
  with pytest.raises(ValueError, match='in a folder that exists'):
    writing.check_target(tmp_path / 'z' / 'y')
