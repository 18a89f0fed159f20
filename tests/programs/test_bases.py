"""A fingerprint goes by the values of arrays, and not by where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.programs import bases

TYPES = ['float32', 'bfloat16', 'int8', 'int32']


def mesh():
  return jax.sharding.Mesh(np.array(jax.devices()), ('data',))


def fingerprint(leaves, *axes):
  where = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec(*axes))
  return bases.fingerprints({path: jax.device_put(x, where) for path, x in leaves.items()}, mesh())


@pytest.mark.parametrize('dtype', TYPES)
def test_it_is_the_same_wherever_the_arrays_lie(dtype):
  leaves = {'a': jnp.arange(48).reshape(16, 3).astype(dtype), 'b': jnp.ones(8, dtype)}
  found = fingerprint(leaves)
  assert found == fingerprint(leaves, 'data') and {len(x) for x in found.values()} == {64}


def test_it_changes_with_any_bit_order_shape_or_type():
  x = jnp.arange(1, 49, dtype=jnp.float32).reshape(16, 3)
  bit = np.array(x).view(np.uint32)
  bit[7, 1] ^= 1
  others = [
    {'a': x},
    {'a': jnp.asarray(bit.view(np.float32))},
    {'a': x.at[7].set(x[8]).at[8].set(x[7])},
    {'a': x.T},
    {'a': x.reshape(3, 16)},
    {'a': x.astype(jnp.bfloat16)},
    {'a': -x},
    {'a': jnp.zeros((16, 3))},
    {'a': jnp.zeros((16, 3)).at[0, 0].set(-0.0)},
  ]
  assert len({fingerprint(leaves)['a'] for leaves in others}) == len(others)


def test_float64_counts_whole():
  with jax.enable_x64(True):
    x = jnp.ones((4, 2), jnp.float64)
    assert fingerprint({'a': x}) != fingerprint({'a': x.at[3, 1].add(1e-15)})
