"""An encoder without attention: gated short convolutions (after arXiv:1612.08083), and a weighted
mean of what its layers give (ELMo, arXiv:1802.05365, eq. 1).

h = norm(x); x + (sigmoid(h W_gate) * convolution(h)) W_out, with one filter per channel, which
reaches to both sides and stops where a document does.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import contracts, params
from llm_jax.core.contracts import Batch, Outputs
from llm_jax.hf.family import Family
from llm_jax.hf.tensors import Tensor, linear, norm, table, vocabulary
from llm_jax.nn.linear import Embedding, Linear, Norm, Output
from llm_jax.nn.options import Options
from llm_jax.nn.rows import at


class Model(contracts.Model, nn.Module):
  """Tokens to hidden states.

  Attributes:
    vocab_size: V.
    dim: D.
    layers: L.
    width: how many positions a filter spans, an odd number.
    max_len: longest row.
    tied: the projection on the vocabulary is the token table.
    balance: coefficient of the auxiliary loss, by which gates are half open on average.
  """

  vocab_size: int
  dim: int = 16
  layers: int = 2
  width: int = 3
  max_len: int = 64
  tied: bool = True
  balance: float = 1.0

  @property
  def options(self) -> Options:
    return Options(dim=self.dim, layers=self.layers)

  @property
  def terms(self) -> dict[str, float]:
    return {'gates': self.balance}

  def setup(self):
    self.token = Embedding(self.vocab_size, 'vocab', self.options, std=0.5)
    self.blocks = [Block(self.options, self.width) for _ in range(self.layers)]
    # Neither in a box nor named as the package names its parameters.
    self.mixture_weights = self.param('mixture_weights', nn.initializers.zeros, (self.layers,))
    self.norm = Norm(self.options)
    if not self.tied:
      self.output = Output(self.vocab_size, self.options)

  def __call__(
    self, batch: Batch, positions: Any = None, *, train: bool = False, cache: Any = None
  ) -> Outputs:
    del train, cache
    tokens_BT = batch['tokens']
    segments_BT = batch['segments'] if 'segments' in batch else jnp.ones_like(tokens_BT)
    real_BT = (segments_BT > 0).astype(jnp.float32)
    mixture_L = jax.nn.softmax(self.mixture_weights)
    x_BTD = self.token(tokens_BT)
    mixed_BTD, unbalanced = 0.0, 0.0
    for layer, block in enumerate(self.blocks):
      with params.in_layer(layer):
        x_BTD, open_BT = block(x_BTD, segments_BT)
      mixed_BTD += mixture_L[layer] * x_BTD
      unbalanced += jnp.sum(jnp.square(open_BT - 0.5) * real_BT)
    hidden_BTD = at(self.norm(mixed_BTD), positions)
    return Outputs(hidden_BTD, {'gates': (unbalanced, jnp.sum(real_BT))})

  def table(self) -> jax.Array:
    return self.token.embedding if self.tied else self.output.kernel.T


class Block(nn.Module):
  """One layer."""

  options: Options
  width: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The layer's output, and how far its gates are open, [B, T]."""
    options, D = self.options, self.options.dim
    h_BTD = Norm(options, name='norm')(x_BTD)
    gate_BTD = nn.sigmoid(Linear('...D,DF->...F', (D, D), options, True, name='gate')(h_BTD))
    init = params.boxed(nn.initializers.normal(0.5), (None, 'norm'), decayed=True)
    filters_WD = self.param('filters', init, (self.width, D))
    mixed_BTD = jnp.zeros_like(h_BTD)
    for i in range(self.width):
      by = i - self.width // 2
      same_BT1 = (_shifted(segments_BT, by) == segments_BT)[..., None]
      mixed_BTD += jnp.where(same_BT1, _shifted(h_BTD, by), 0) * filters_WD[None, None, i]
    out = Linear('...F,FD->...D', (D, D), options, True, std=0.2, name='out')
    return x_BTD + out(gate_BTD * mixed_BTD), jnp.mean(gate_BTD, -1)


def _shifted(x_BT: jax.Array, by: int) -> jax.Array:
  """[B, T, ...]: at index t what `x` has at t + by, zeros beyond its ends."""
  length = x_BT.shape[1]
  padding = [(0, 0), (abs(by), abs(by))] + [(0, 0)] * (x_BT.ndim - 2)
  start = abs(by) + by
  return jnp.pad(x_BT, padding)[:, start : start + length]


VARIANTS = {}
HF_FAMILIES = {
  'gated_convolution': Family(
    prefix='',
    fields={
      'vocab_size': ('vocab_size', int),
      'hidden_size': ('dim', int),
      'num_hidden_layers': ('layers', int),
      'filter_width': ('width', int),
      'max_position_embeddings': ('max_len', int),
      'gate_balance': ('balance', float, 1.0),
      'tie_word_embeddings': ('tied', bool, True),
    },
    options={},
    body=(
      *table('tokens', 'model/token'),
      Tensor('mixture', 'L->L', ('model/mixture_weights',)),
      Tensor('layers.{}.filters', 'DW->WD', ('filters',)),
      *norm('layers.{}.norm', 'norm'),
      *linear('layers.{}.gate', 'gate'),
      *linear('layers.{}.out', 'out'),
      *norm('last_norm', 'model/norm'),
    ),
    heads=vocabulary('projection.weight'),
    classes={'GatedConvolutionModel': ()},
  )
}
