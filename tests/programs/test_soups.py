"""The mean of the parameters of several runs: NumPy's, and only where it has a meaning."""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.programs import soups

FOLDERS = [pathlib.Path(name) for name in ('first', 'second', 'third')]


def program(trained=None):
  """Of a network whose adapter trains the paths that are named; None for no adapter."""
  adapter = None
  if trained is not None:
    adapter = types.SimpleNamespace(trains=lambda path, info, base: path in trained)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('data',))
  infos = dict.fromkeys(('a/kernel', 'a/bias', 'head'))
  network = types.SimpleNamespace(adapter=adapter)
  return types.SimpleNamespace(network=network, mesh=mesh, infos=infos, base=frozenset())


@pytest.fixture
def runs():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    folder: {'a/kernel': draw(3, 4), 'a/bias': draw(4), 'head': draw(2)} for folder in FOLDERS
  }


def average(runs, trained=None):
  on_device = lambda folder: tree.nest({k: jnp.asarray(x) for k, x in runs[folder].items()})
  return tree.flatten(soups.average(program(trained), FOLDERS, on_device))


def test_the_mean_is_that_of_numpy(runs):
  found = average(runs)
  for path, x in found.items():
    each = [run[path].astype(np.float64) for run in runs.values()]
    np.testing.assert_allclose(x, np.mean(each, axis=0), rtol=2e-6, atol=1e-7)
    assert x.dtype == jnp.float32
  assert np.abs(found['head'] - runs[FOLDERS[0]]['head']).max() > 1e-2


def test_beside_one_base_what_is_trained_is_averaged(runs):
  base = runs[FOLDERS[0]]['a/kernel']
  for run in runs.values():
    run['a/kernel'] = base.copy()
  found = average(runs, trained=('a/bias', 'head'))
  assert np.array_equal(found['a/kernel'], base)  # to the bit
  wanted = np.mean([run['a/bias'] for run in runs.values()], axis=0)
  np.testing.assert_allclose(found['a/bias'], wanted, rtol=2e-6, atol=1e-7)
  assert np.array_equal(average(runs)['a/kernel'], base)  # equal ones are their own mean
  runs[FOLDERS[2]]['a/kernel'][1, 2] += 1e-6
  with pytest.raises(
    ValueError, match='third was trained beside another base than first: a/kernel'
  ):
    average(runs, trained=('a/bias', 'head'))


def test_other_parameters_are_named(runs):
  runs[FOLDERS[1]]['a/bias'] = np.zeros(5, np.float32)
  del runs[FOLDERS[1]]['head']
  with pytest.raises(ValueError, match=r'second cannot be averaged(?s:.*)- head(?s:.*)! a/bias'):
    average(runs)


def test_equal_shapes_may_mean_something_else():
  config = config_lib.Config(
    steps=1,
    batch_size=1,
    seq_len=8,
    tokenizer=dict(name='byte'),
    model=dict(name='encoder', dim=8, dropout=0.1, positions='rope'),
    objective=dict(name='classify', classes=['a', 'b'], pool='cls', label_smoothing=0.0),
    adapter=dict(name='lora', alpha=8.0),
  )
  other = dataclasses.replace(
    config,
    steps=9,
    model=config.model | dict(dropout=0.0, dtype='float32'),
    objective=config.objective | dict(classes=('a', 'b'), label_smoothing=0.1),
  )
  soups.check(config, other, FOLDERS[1])  # how they were trained may differ
  for section, name, value in (
    ('model', 'positions', 'learned'),
    ('objective', 'classes', ('b', 'a')),
    ('adapter', 'alpha', 16.0),
  ):
    changed = dataclasses.replace(config, **{section: getattr(config, section) | {name: value}})
    with pytest.raises(ValueError, match=rf'second .* config.{section}.{name} is .* there, and'):
      soups.check(config, changed, FOLDERS[1])
