"""T5's relative positions (Raffel et al. 2020, arXiv:1910.10683, section 2.1): each head adds a
number to a score, by how far the key is from the query. Near distances have a number each, further
ones share it with their like, on a logarithmic scale.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import params as params_lib
from llm_jax.nn.linear import initializer
from llm_jax.nn.options import DTYPES, Options


class RelativeBias(nn.Module):
  """The numbers of all layers of a stack.

  Attributes:
    options: shared options.
    buckets: how many numbers a head has.
    farthest: distances from here on share one number.
  """

  options: Options
  buckets: int
  farthest: int

  def setup(self):
    init = params_lib.boxed(initializer(self.options), (None, 'heads'))
    shape = self.buckets, self.options.heads
    with params_lib.in_layer(params_lib.EMBEDDINGS):
      self.embedding = self.param('embedding', init, shape, DTYPES[self.options.param_dtype])

  def __call__(self, length: int) -> jax.Array:
    """What is added in rows of `length` tokens, by the index of the query less that of the key, [N,
    2 length - 1]: see `attention.masks.by_distance`.
    """
    distances = np.arange(1 - length, length)
    numbers = bucket(distances, self.buckets, self.farthest, self.options.causal)
    bias_DN = jnp.asarray(self.embedding)[numbers]
    return bias_DN.T.astype(self.options.accumulation_dtype)


def bucket(distances: np.ndarray, buckets: int, farthest: int, causal: bool) -> np.ndarray:
  """The number of the bucket of each distance, query less key.

  Causal rows have all buckets for keys before the query; others half of them for those after it.
  """
  if not causal:
    buckets //= 2
  after = 0 if causal else buckets * (distances < 0)
  apart = np.maximum(distances, 0) if causal else np.abs(distances)
  exact = buckets // 2
  ratio = np.log(np.maximum(apart, 1).astype(np.float32) / np.float32(exact))
  far = exact + (ratio / np.float32(math.log(farthest / exact)) * (buckets - exact)).astype(int)
  return after + np.where(apart < exact, apart, np.minimum(far, buckets - 1))


def check(buckets: int, farthest: int) -> None:
  """Raises ValueError for numbers of buckets that no distances can be shared out among."""
  if buckets < 4 or buckets % 4:
    raise ValueError(f'buckets={buckets} must be a multiple of 4, at least 4.')
  if farthest <= buckets // 2:
    raise ValueError(
      f'farthest={farthest} must be more than half of buckets={buckets}, which are exact.'
    )
