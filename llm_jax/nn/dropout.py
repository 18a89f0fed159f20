"""Dropout (Srivastava et al. 2014, jmlr.org/papers/v15/srivastava14a.html), the inverted form: what
is kept grows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.parallel import sharding
from llm_jax.parallel.cpu import random as cpu_random


def dropout(x: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
  """Zero with probability `rate`, else x / (1 - rate), in the type of `x`.

  Which elements are dropped depends on `rng` and the shape alone, not on the mesh. The barrier
  keeps the compiler from drawing the same numbers anew in each of the products that read the
  result: one draw, one byte per element.
  """
  keep = jax.lax.optimization_barrier(bernoulli(rng, 1.0 - rate, x.shape))
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def drop(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
  """Dropout by the module's stream `dropout`, when training; otherwise `x`."""
  return dropout(x, rate, module.make_rng('dropout')) if train and rate else x


def bernoulli(rng: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
  """True with `probability`, in `shape`: what `jax.random.bernoulli` draws from the key `rng`."""
  draw = cpu_random.bernoulli if sharding.platform() == 'cpu' else jax.random.bernoulli
  return draw(rng, probability, shape)
