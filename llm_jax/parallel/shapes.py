"""Batches of few shapes, for a service: the length of a text's row goes by the text alone, and the
number of rows by the length. What stands beside a text then changes no bit of its answer, and all
shapes can be compiled before the first text comes.
"""

import math

import jax

from llm_jax.parallel import sharding

TILE = 64  # the shortest rows; each length is twice the one before
TOKENS = 256  # of a batch on CPUs, which are no faster per token with more
LEAST = 2  # rows of a batch: one alone is read on one core of a CPU


def length(mesh: jax.sharding.Mesh, tokens: int, most: int) -> int:
  """How long the row is that a text of so many tokens gets, of at most `most`."""
  tile = math.lcm(TILE, mesh.shape['sequence'])
  return min(most, tile * (1 << (-(-tokens // tile) - 1).bit_length()))


def lengths(mesh: jax.sharding.Mesh, most: int) -> list[int]:
  """All of these lengths."""
  return sorted({length(mesh, tokens, most) for tokens in range(1, most + 1)})


def rows(mesh: jax.sharding.Mesh, length: int, most: int) -> int:
  """The rows of a batch of this length: `most`, on a CPU fewer; the mesh divides them."""
  shards = sharding.row_shards(mesh)
  if mesh.devices.flat[0].platform == 'cpu':
    most = min(most, max(LEAST, TOKENS // length))
  return max(shards, most // shards * shards)
