"""Heads: hidden states to what one objective reads from them. Each takes the model's `options` for
types and sizes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.contracts import Batch
from llm_jax.nn.dropout import drop
from llm_jax.nn.linear import Linear, Norm, vector
from llm_jax.nn.options import ACTIVATIONS, Options

POOLS = {'cls': 'text_firsts', 'mean': None, 'last': 'text_lasts'}
"""Where the one vector of a text comes from, and the array of a batch that says at which indices:
its first token, all (their mean), its last.
"""


def pool_positions(batch: Batch, how: str) -> jax.Array | None:
  """The indices of each row that `pool` reads, [B, G]; None for all."""
  return None if POOLS[how] is None else batch[POOLS[how]]


def pool(hidden_BPD: jax.Array, batch: Batch, how: str) -> jax.Array:
  """One vector per text, [B, G, D]; anything finite where a row has fewer texts.

  Args:
    hidden_BPD: hidden states of the row that holds the texts, at `pool_positions`.
    batch: its `segments`, where text g has the number g + 1, and its `text_firsts`, [B, G].
    how: one of `POOLS`; 'mean' is over all tokens of a text, special ones included (Reimers and
      Gurevych 2019, arXiv:1908.10084, section 3), at least float32.
  """
  if how != 'mean':
    return hidden_BPD
  # A sum over one text alone, not a difference of running sums: what stands in another text changes
  # it by exactly nothing.
  x_BTD = hidden_BPD.astype(jnp.promote_types(hidden_BPD.dtype, jnp.float32))
  texts = 1 + jnp.arange(batch['text_firsts'].shape[1])
  inside_BTG = (batch['segments'][..., None] == texts[None, None]).astype(x_BTD.dtype)
  x_BGD = jnp.einsum('BTG,BTD->BGD', inside_BTG, x_BTD, precision='highest')
  return x_BGD / jnp.maximum(jnp.sum(inside_BTG, axis=1), 1)[..., None]


class MLMHead(nn.Module):
  """BERT's masked-LM head (arXiv:1810.04805): linear, activation, norm; the model's vocabulary
  projection; a bias per token.

  Example:
    >>> head = MLMHead(Options(dim=64), vocab_size=100)
    >>> (x_BMD, bias_V), _ = head.init_with_output(jax.random.key(0), jnp.ones((2, 3, 64)))
    >>> x_BMD.shape, bias_V.shape
    ((2, 3, 64), (100,))
  """

  options: Options
  vocab_size: int

  @nn.compact
  def __call__(self, x_BMD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the vocabulary projection is applied to, [B, M, D], and the bias of the logits, [V]."""
    x_BMD = _transformed(x_BMD, self.options)
    return x_BMD, vector(self, 'bias', 'V', (self.vocab_size,), self.options)


class Pooler(nn.Module):
  """BERT's pooler: tanh of a linear map of the first token of a text ([CLS])."""

  options: Options

  @nn.compact
  def __call__(self, x_BGD: jax.Array) -> jax.Array:
    """The pooled vectors, [B, G, D]; any axes may stand before the last one."""
    shape = self.options.dim, self.options.dim
    return jnp.tanh(Linear('...D,DF->...F', shape, self.options, True, name='dense')(x_BGD))


class Transform(nn.Module):
  """What ModernBERT has in place of a pooler (arXiv:2412.13663): linear, activation, norm."""

  options: Options

  @nn.compact
  def __call__(self, x_BGD: jax.Array) -> jax.Array:
    """The pooled vectors, [B, G, D]; any axes may stand before the last one."""
    return _transformed(x_BGD, self.options)


TRANSFORMS: dict[str, tuple[str, type[Pooler] | type[Transform]]] = {
  'pooler': ('pooler', Pooler),
  'norm': ('transform', Transform),
}
"""What may stand between a text's vector and a last layer: name of the head, and module."""


class ClassifierHead(nn.Module):
  """Dropout and a linear map to `classes` logits; the dropout acts where the stream `dropout` is
  given.

  Attributes:
    options: shared options.
    classes: C.
    dropout: rate.
    bias: whether the map has one; GPT's has none (Radford et al. 2018, eq. 3).
    states: how many states of the model stand side by side in what it reads.
  """

  options: Options
  classes: int
  dropout: float = 0.1
  bias: bool = True
  states: int = 1

  @nn.compact
  def __call__(self, x_BGD: jax.Array) -> jax.Array:
    """Logits [B, G, C], at least float32; any axes may stand before the last one."""
    x_BGD = drop(self, x_BGD, self.dropout, train=self.has_rng('dropout'))
    shape = self.states * self.options.dim, self.classes
    dense = Linear('...D,DC->...C', shape, self.options, self.bias, accumulated=True, name='dense')
    return dense(x_BGD)


class PairHead(nn.Module):
  """Linear map to two logits: are two texts what they should be to each other (next sentence,
  sentence order).
  """

  options: Options

  @nn.compact
  def __call__(self, x_BD: jax.Array) -> jax.Array:
    """Logits [B, 2], at least float32."""
    shape = self.options.dim, 2
    dense = Linear('...D,DC->...C', shape, self.options, True, accumulated=True, name='dense')
    return dense(x_BD)


def _transformed(x: jax.Array, options: Options) -> jax.Array:
  """Linear, activation, norm, as submodules `dense` and `norm` of the module that calls it."""
  shape = options.dim, options.dim
  x = Linear('...D,DF->...F', shape, options, options.bias, name='dense')(x)
  return Norm(options, name='norm')(ACTIVATIONS[options.activation](x))
