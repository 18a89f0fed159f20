"""Dropout (Srivastava et al. 2014, jmlr.org/papers/v15/srivastava14a.html), the inverted form: what
is kept grows.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.parallel import sharding

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)  # of Threefry-2x32


def dropout(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
  """Zero with probability `rate`, else x / (1 - rate), in the type of `x`.

  The places depend on `rng` and the shape alone, not on the mesh. The barrier keeps the compiler
  from drawing the same numbers anew in each of the products that read the result: one draw, one
  byte a place.
  """
  keep = jax.lax.optimization_barrier(bernoulli(rng, 1.0 - rate, x.shape))
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def bernoulli(rng: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
  """True with `probability`, in `shape`: what `jax.random.bernoulli` draws from the key `rng`,
  faster on a CPU.

  There JAX compiles its generator as a loop over rounds that goes through memory in each; here it
  is one pass.
  """
  if sharding.platform() != 'cpu' or not _is_plain(rng, math.prod(shape)):
    return jax.random.bernoulli(rng, probability, shape)
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(
      math.prod(shape[axis + 1 :])
    )
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
  """Two words from a key of two and a counter of two, uint32 (Salmon et al. 2011,
  doi:10.1145/2063384.2063405; 20 rounds).
  """
  keys = key_0, key_1, key_0 ^ key_1 ^ np.uint32(0x1BD11BDA)
  x_0, x_1 = x_0 + keys[0], x_1 + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      x_0 += x_1
      x_1 = (x_1 << rotation | x_1 >> 32 - rotation) ^ x_0
    x_0 += keys[(group + 1) % 3]
    x_1 += keys[(group + 2) % 3] + np.uint32(group + 1)
  return x_0, x_1
