"""Heads: hidden states to what one objective reads from them. Each takes the model's `options` for types and sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.layers import ACTIVATIONS, Linear, Norm, Options, drop, parameter


class MLMHead(nn.Module):
  """BERT's masked-LM head (arXiv:1810.04805): linear, activation, norm; the model's vocabulary projection; a bias a token."""

  options: Options
  vocab_size: int

  @nn.compact
  def __call__(self, x_BMD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the vocabulary projection is applied to, [B, M, D], and the bias of the logits, [V]."""
    options = self.options
    x_BMD = Linear('...D,DF->...F', (options.dim, options.dim), options, options.bias, name='dense')(x_BMD)
    x_BMD = Norm(options, name='norm')(ACTIVATIONS[options.activation](x_BMD))
    return x_BMD, parameter(self, 'bias', 'V', (self.vocab_size,), options)


class Pooler(nn.Module):
  """BERT's pooler: tanh of a linear map of one place of each row."""

  options: Options

  @nn.compact
  def __call__(self, hidden_BTD: jax.Array, places_B: jax.Array | None = None) -> jax.Array:
    """The pooled vector, [B, D], from place `places_B` of each row; None for the first ([CLS])."""
    x_BD = hidden_BTD[:, 0] if places_B is None else jnp.take_along_axis(hidden_BTD, places_B[:, None, None], axis=1)[:, 0]
    return jnp.tanh(Linear('...D,DF->...F', (self.options.dim, self.options.dim), self.options, True, name='dense')(x_BD))


class ClassifierHead(nn.Module):
  """Dropout and a linear map to `classes` logits; the dropout acts where the stream `dropout` is given.

  Attributes:
    options: shared options.
    classes: C.
    dropout: rate.
    bias: whether the map has one; GPT's has none (Radford et al. 2018, eq. 3).
  """

  options: Options
  classes: int
  dropout: float = 0.1
  bias: bool = True

  @nn.compact
  def __call__(self, x_BD: jax.Array) -> jax.Array:
    """Logits [B, C], at least float32."""
    x_BD = drop(self, x_BD, self.dropout, train=self.has_rng('dropout'))
    return Linear('...D,DC->...C', (self.options.dim, self.classes), self.options, self.bias, wide=True,
                  name='dense')(x_BD)


class PairHead(nn.Module):
  """Linear map to two logits: are two texts what they should be to each other (next sentence, sentence order)."""

  options: Options

  @nn.compact
  def __call__(self, x_BD: jax.Array) -> jax.Array:
    """Logits [B, 2], at least float32."""
    return Linear('...D,DC->...C', (self.options.dim, 2), self.options, True, wide=True, name='dense')(x_BD)
