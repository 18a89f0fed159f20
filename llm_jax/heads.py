"""Heads: hidden states to what one objective reads from them. Each takes the model's `options` for types and sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.contracts import Batch
from llm_jax.layers import ACTIVATIONS, Linear, Norm, Options, drop, parameter

POOLS = ('cls', 'mean', 'last')


def pool(hidden_BTD: jax.Array, batch: Batch, how: str) -> jax.Array:
  """One vector a text, from the hidden states of the row that holds it; anything finite where a row has fewer texts.

  Args:
    hidden_BTD: hidden states.
    batch: its `segments`, where text g has the number g + 1, and its `text_firsts` and `text_lasts`, [B, G].
    how: 'cls', the first place of each text; 'last', its last; 'mean', the mean of all its places, special tokens included
      (Reimers and Gurevych 2019, arXiv:1908.10084, section 3), at least float32.

  Returns:
    [B, G, D].
  """
  if how != 'mean':
    return _at(hidden_BTD, batch['text_firsts' if how == 'cls' else 'text_lasts'])
  # A sum over one text alone, not a difference of running sums: what stands in another text changes it by exactly nothing.
  x_BTD = hidden_BTD.astype(jnp.promote_types(hidden_BTD.dtype, jnp.float32))
  texts = 1 + jnp.arange(batch['text_firsts'].shape[1])
  inside_BTG = (batch['segments'][..., None] == texts[None, None]).astype(x_BTD.dtype)
  x_BGD = jnp.einsum('BTG,BTD->BGD', inside_BTG, x_BTD, precision='highest')
  return x_BGD / jnp.maximum(jnp.sum(inside_BTG, axis=1), 1)[..., None]


def _at(hidden_BTD: jax.Array, places_BG: jax.Array) -> jax.Array:
  return jnp.take_along_axis(hidden_BTD, places_BG[..., None], axis=1)


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
  """BERT's pooler: tanh of a linear map of one place of each text."""

  options: Options

  @nn.compact
  def __call__(self, hidden_BTD: jax.Array, places_BG: jax.Array | None = None) -> jax.Array:
    """The pooled vectors, [B, G, D], from the places `places_BG` of each row; None for the first of it ([CLS]): [B, D]."""
    x = hidden_BTD[:, 0] if places_BG is None else _at(hidden_BTD, places_BG)
    return jnp.tanh(Linear('...D,DF->...F', (self.options.dim, self.options.dim), self.options, True, name='dense')(x))


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
  def __call__(self, x_BGD: jax.Array) -> jax.Array:
    """Logits [B, G, C], at least float32; with any axes before the last in place of B and G."""
    x_BGD = drop(self, x_BGD, self.dropout, train=self.has_rng('dropout'))
    return Linear('...D,DC->...C', (self.options.dim, self.classes), self.options, self.bias, wide=True,
                  name='dense')(x_BGD)


class PairHead(nn.Module):
  """Linear map to two logits: are two texts what they should be to each other (next sentence, sentence order)."""

  options: Options

  @nn.compact
  def __call__(self, x_BD: jax.Array) -> jax.Array:
    """Logits [B, 2], at least float32."""
    return Linear('...D,DC->...C', (self.options.dim, 2), self.options, True, wide=True, name='dense')(x_BD)
