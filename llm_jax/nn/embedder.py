"""From ids to vectors: the embeddings before the first layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llm_jax.core import params
from llm_jax.nn.block import between_layers
from llm_jax.nn.dropout import drop
from llm_jax.nn.linear import Embedding, Norm
from llm_jax.nn.options import Options
from llm_jax.nn.vocabulary import lookup


class Embedder(nn.Module):
  """Sum of token, position and token-type embeddings, then (where asked) a norm, then dropout.

  Learned positions have a table; those of the first Transformer are sines and cosines of the
  position at D / 2 frequencies (arXiv:1706.03762, section 3.5), all sines before all cosines.

  Attributes:
    vocab_size: V.
    options: shared options.
    positions: rows of the table of learned positions; 0 for no table.
    position_offset: row of position 0 (RoBERTa leaves two unused rows).
    position_std: standard deviation of that table at initialisation; None for `options.init_std`.
    token_types: rows of the token-type table, 0 for none; a higher type than it knows counts as its
      last (RoBERTa has one).
    norm: whether a norm follows the sum.
    scaled: tokens' vectors are multiplied by the square root of D, before the sum.
    sinusoids: whether positions are sines and cosines.
    shared: the table of tokens, where it is that of another embedder.
  """

  vocab_size: int
  options: Options
  positions: int = 0
  position_offset: int = 0
  position_std: float | None = None
  token_types: int = 0
  norm: bool = False
  scaled: bool = False
  sinusoids: bool = False
  shared: Embedding | None = None

  def setup(self):
    if self.shared is None:
      self.token = Embedding(self.vocab_size, 'vocab', self.options)
    if self.positions:
      self.position = Embedding(self.positions, 'positions', self.options, self.position_std)
    if self.token_types:
      self.token_type = Embedding(self.token_types, 'token_types', self.options)
    if self.norm:
      self.embedding_norm = Norm(self.options)

  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    token_types_BT: jax.Array | None,
    train: bool,
  ) -> jax.Array:
    """The embedded row, [B, T, D] in the compute type; token types None: all of type 0."""
    with params.in_layer(params.EMBEDDINGS):
      x_BTD = self._summed(tokens_BT, positions_BT, token_types_BT)
      x_BTD = self.embedding_norm(x_BTD) if self.norm else x_BTD.astype(self.options.compute_dtype)
    return between_layers(drop(self, x_BTD, self.options.dropout, train))

  def vectors(self, tokens_BT: jax.Array) -> jax.Array:
    """Those of tokens, [B, T, D]; an adapter may stand around this."""
    table = (self.token if self.shared is None else self.shared).embedding
    if params.is_form(table):
      return table.rows(tokens_BT, self.options.compute_dtype)
    return lookup(table, tokens_BT, self.options.compute_dtype)

  def _summed(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, token_types_BT: jax.Array | None
  ) -> jax.Array:
    options = self.options
    x_BTD = self.vectors(tokens_BT).astype(options.accumulation_dtype)
    if self.scaled:
      x_BTD *= options.dim**0.5
    if self.sinusoids:
      x_BTD += sinusoids(positions_BT, options.dim, x_BTD.dtype)
    if self.positions:
      x_BTD += self.position(positions_BT + self.position_offset)
    if self.token_types:
      if token_types_BT is None:
        token_types_BT = jnp.zeros_like(tokens_BT)
      else:
        token_types_BT = jnp.minimum(token_types_BT, self.token_types - 1)
      x_BTD += self.token_type(token_types_BT)
    return x_BTD


def sinusoids(positions_BT: jax.Array, dim: int, dtype: DTypeLike) -> jax.Array:
  """Sines of each position at `dim` / 2 frequencies, then their cosines, [B, T, D]."""
  frequencies = jnp.asarray(10000.0 ** (-np.arange(dim // 2) / (dim // 2)), dtype)
  angles = positions_BT[..., None].astype(dtype) * frequencies
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
