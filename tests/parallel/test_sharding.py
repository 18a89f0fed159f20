"""The mesh and its rules, on descriptions of devices: nothing is computed."""

import dataclasses
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.params import Info
from llm_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a device as a mesh reads."""

  id: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'
  process_index: int = 0


def layout(count=8, **sizes):
  return sharding.create_layout(**sizes, devices=[Device(i) for i in range(count)])


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_one_axis_takes_what_is_left():
  made = layout(data=-1, fsdp=2, tensor=2)
  assert dict(made.mesh.shape) == {'data': 2, 'fsdp': 2, 'sequence': 1, 'tensor': 2}
  assert set(made.mesh.axis_types) == {jax.sharding.AxisType.Auto}
  assert sharding.row_shards(made.mesh) == 4 and made.platform == 'cpu'
  assert sharding.batch_sharding(made.mesh).spec == P(('data', 'fsdp'))
  assert sharding.replicated(made.mesh).spec == P()


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'data': 3}, r'wants 3 devices; there are 1\. Set one axis to -1'),
    ({'data': -1, 'tensor': 2}, r'wants a multiple of 2 devices; there are 1'),
    ({'data': -1, 'dcn_data': 2}, r'wants a multiple of 2 devices; there are 1'),
    ({'data': -1, 'fsdp': -1}, r'at most one of data, fsdp, sequence, tensor is -1'),
    ({'data': 0}, r'sizes are at least 1'),
    ({'dcn_fsdp': -1}, r'sizes are at least 1'),
  ],
)
def test_an_impossible_mesh_is_an_error(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.create_mesh(**sizes, devices=[Device(0)])


def test_unknown_rules_are_an_error():
  with pytest.raises(
    ValueError, match="config.mesh.rules='zero2' is not known.*known: fsdp, zero1"
  ):
    layout(rules='zero2')


def test_slices_are_the_outer_part_of_an_axis():
  ids = np.vectorize(lambda device: device.id)
  made = layout(dcn_data=2, data=2, tensor=2)
  np.testing.assert_array_equal(ids(made.mesh.devices).reshape(4, 2), np.arange(8).reshape(4, 2))
  made = layout(dcn_fsdp=2, data=2, fsdp=2)
  assert dict(made.mesh.shape) == {'data': 2, 'fsdp': 4, 'sequence': 1, 'tensor': 1}
  # Devices 0-3 are one slice: of each row of fsdp, the first half lies in it.
  np.testing.assert_array_equal(ids(made.mesh.devices).reshape(2, 4), [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_activations():
  made = layout(data=2, fsdp=1, sequence=2, tensor=2)
  assert made.spec(('batch', 'length', 'heads', None), (4, 6, 2, 5)) == P(
    'data', 'sequence', 'tensor', None
  )
  assert made.spec(('batch', 'norm_length', None), (4, 8, 5)) == P(
    'data', ('sequence', 'tensor'), None
  )
  assert made.spec(('batch', 'norm_length', None), (4, 6, 5)) == P(
    'data', 'sequence', None
  )  # 6 positions do not divide by 4
  assert made.spec(('batch', 'length'), (3, 5)) == P(None, None)


def test_what_does_not_divide_is_reported(caplog):
  sharding._report.cache_clear()
  with caplog.at_level(logging.WARNING, logger='absl'):
    assert layout(tensor=8, data=1).spec(('mlp',), (12,)) == P(None)
  assert 'mlp of size 12 does not divide by tensor = 8 and is not cut by tensor' in caplog.text


def test_parameters():
  made = layout(data=1, fsdp=4, tensor=2)
  assert made.parameter_spec(('layers', 'embed', 'heads', 'head_dim'), (3, 8, 4, 5)) == P(
    None, 'fsdp', 'tensor', None
  )
  assert made.parameter_spec(('vocab', 'embed'), (10, 8)) == P('tensor', 'fsdp')
  assert made.parameter_spec(('vocab', 'embed'), (7, 8)) == P(
    None, ('fsdp', 'tensor')
  )  # odd: `embed` is cut by both
  assert made.parameter_spec(('vocab', 'embed'), (7, 12)) == P(None, 'fsdp')  # which 12 is not
  assert made.parameter_spec(('vocab',), (7,)) == P(None)
  zero1 = layout(data=2, fsdp=2, tensor=2, rules='zero1')
  assert zero1.parameter_spec(('embed', 'mlp'), (8, 6)) == P(None, 'tensor')
  assert zero1.parameter_spec(('embed', 'mlp'), (8, 6), optimizer=True) == P(
    ('data', 'fsdp'), 'tensor'
  )


def test_an_optimizer_lies_as_its_rules_say():
  made = layout(data=2, fsdp=2, tensor=2, rules='zero1')
  shapes = {'a': {'kernel': shape(3, 8, 6)}, 'b': shape(2)}
  infos = {'a/kernel': Info(('layers', 'embed', 'mlp')), 'b': Info((None,))}
  params = sharding.parameter_shardings(made, shapes, infos)
  kept = sharding.parameter_shardings(made, shapes, infos, optimizer=True)
  assert params['a']['kernel'].spec == P(None, None, 'tensor')
  assert params['b'].is_equivalent_to(sharding.replicated(made.mesh), 1)
  state = jax.eval_shape(optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init, shapes)
  where = sharding.optimizer_shardings(made.mesh, shapes, kept, state)
  specs = {path: found.spec for path, found in tree.flatten(where).items()}
  moments = [spec for path, spec in specs.items() if path.endswith('kernel')]
  assert moments == [P(None, ('data', 'fsdp'), 'tensor')] * 2
  counts = [spec for path, spec in specs.items() if path.endswith('count')]
  assert counts and set(counts) == {P()}


def test_a_part_of_the_parameters_and_the_boxes_that_name_their_axes():
  made = layout(data=1, fsdp=4, tensor=2)
  kernel = params_lib.boxed(nn.initializers.zeros, ('embed', 'mlp'), inputs=(0,))
  boxed = {'a': kernel(jax.random.key(0), (8, 6)), 'b': jnp.zeros(2)}
  infos = params_lib.infos(boxed)
  found = sharding.parameter_shardings(made, {'a': shape(8, 6)}, infos)
  assert list(found) == ['a'] and found['a'].spec == P('fsdp', 'tensor')


@pytest.mark.parametrize(
  ('heads', 'kv_heads', 'tensor', 'repeated'),
  [(8, 2, 4, 4), (8, 4, 4, 4), (8, 1, 8, 8), (12, 6, 4, 12), (6, 2, 4, 2)],
)
def test_divisible_heads(heads, kv_heads, tensor, repeated):
  x = np.random.default_rng(0).normal(size=(1, 2, kv_heads, 3)).astype(np.float32)
  with sharding.use(layout(8, tensor=tensor)):
    found = sharding.divisible_heads(x, heads)
  assert found.shape[2] == repeated
  per_head = lambda y: np.stack([y[:, :, n // (heads // y.shape[2])] for n in range(heads)])
  np.testing.assert_array_equal(per_head(np.asarray(found)), per_head(x))


def test_outside_of_a_program_nothing_is_laid_out():
  x = jnp.ones((2, 3))
  assert sharding.current() is None and sharding.constrain(x, 'batch', 'length') is x
  assert sharding.divisible_heads(x[:, :, None, None], 4).shape == (2, 3, 1, 1)
