"""JAX's random bits on a CPU, where it compiles its generator as a loop over rounds that goes
through memory in each; here it is one pass.

Threefry-2x32 (Salmon et al. 2011, doi:10.1145/2063384.2063405), 20 rounds.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = np.uint32(0x1BD11BDA)


def bernoulli(rng: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
  """What `jax.random.bernoulli` draws, [shape] bool, in one pass where JAX is set as usual."""
  if not _is_plain(rng, math.prod(shape)):
    return jax.random.bernoulli(rng, probability, shape)
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = np.uint32(math.prod(shape[axis + 1 :]))
    index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
  key = (jnp.broadcast_to(word, shape) for word in jax.random.key_data(rng))
  high, low = threefry_2x32(*key, jnp.zeros(shape, jnp.uint32), index)
  # A uniform float32 takes 23 bits of the draw.
  return ((high ^ low) >> 9) < math.ceil(float(np.float32(probability)) * (1 << 23))


def _is_plain(rng: jax.Array, size: int) -> bool:
  """Whether JAX draws `size` numbers as it does by default: Threefry of their index, of which one
  word is enough, in float32.
  """
  config = jax.config
  return (
    str(jax.random.key_impl(rng)) == 'threefry2x32'
    and config.jax_threefry_partitionable
    and not config.jax_enable_x64
    and 0 < size < 1 << 32
  )


def threefry_2x32(
  key_0: jax.Array, key_1: jax.Array, x_0: jax.Array, x_1: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Two words from a key of two words and a counter of two, all uint32 of one shape."""
  keys = key_0, key_1, key_0 ^ key_1 ^ _PARITY
  x_0, x_1 = x_0 + keys[0], x_1 + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      x_0 += x_1
      x_1 = (x_1 << rotation | x_1 >> 32 - rotation) ^ x_0
    x_0 += keys[(group + 1) % 3]
    x_1 += keys[(group + 2) % 3] + np.uint32(group + 1)
  return x_0, x_1
