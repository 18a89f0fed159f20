"""One layer of a Transformer (arXiv:1706.03762): attention, mlp, norms and residual connections.

What a layer needs besides its input is one `LayerContext`, the same for all layers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn.attention.cache import (
  Crossing,
  KeyValues,
  continued,
  extended,
  mixed,
  recall,
  remembered,
)
from llm_jax.nn.attention.dispatch import attention
from llm_jax.nn.attention.masks import Prefix
from llm_jax.nn.attention.xla import attention_at, probabilities
from llm_jax.nn.dropout import drop
from llm_jax.nn.linear import Linear, Norm
from llm_jax.nn.options import ACTIVATIONS, Options
from llm_jax.nn.rotary import Rotation, rotate
from llm_jax.nn.rows import at
from llm_jax.parallel.sharding import constrain, current

# What a layer's matrix products give that is as wide as the model, by `checkpoint_name`: the names
# that `stack.REMAT` goes by.
PROJECTIONS = 'projections'
# Where attention leaves its probabilities, [B, N, T, S], if a caller makes this collection mutable.
MAPS = 'attention_maps'


@flax.struct.dataclass
class LayerContext:
  """What layers know of the rows that they run on.

  Attributes:
    segments_BT: document of each token; a token sees its own alone. None: one document per row.
    positions_BT: position of each token in its document.
    open_BT: not 0 for tokens that all of their document see, where rows are causal; None for none.
    rotations: those of layers that see everywhere, and of those with a window; None where
      positions are not rotary.
    lengths_B: with a cache, the tokens of each row so far, these included.
    begun_B: with a cache, how many of each row it holds, which these follow; None where it is one
      token, or the first ones.
    bias_ND: what is added to scores by distance (`nn.relative`); None for nothing.
    memory_BSD: a second row, which layers that cross read; None where a cache has what they need of
      it.
    memory_segments_BS: document of each of its tokens, 0 for padding; a token sees that of its own.
    read_BP: without a cache, the indices of each row whose states are wanted; None for all. A
      layer that has them returns these alone.
    train: whether dropout is on.
  """

  segments_BT: jax.Array | None = None
  positions_BT: jax.Array | None = None
  open_BT: jax.Array | None = None
  rotations: tuple[Rotation, Rotation] | None = None
  lengths_B: jax.Array | None = None
  begun_B: jax.Array | None = None
  bias_ND: jax.Array | None = None
  memory_BSD: jax.Array | None = None
  memory_segments_BS: jax.Array | None = None
  read_BP: jax.Array | None = None
  train: bool = flax.struct.field(default=False, pytree_node=False)

  def rotation(self, window: int | None) -> Rotation | None:
    """The rotation of a layer with this window."""
    return None if self.rotations is None else self.rotations[window is not None]


class Attention(nn.Module):
  """Self-attention with its four projections.

  Attributes:
    options: shared options.
    window: how far a token sees; None for everywhere. Static, as kernels need it.
  """

  options: Options
  window: int | None = None

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, context: LayerContext, cache: KeyValues | None = None
  ) -> tuple[jax.Array, KeyValues | None]:
    """What is added to `x_BTD`, and the cache with these tokens in it, if there is one."""
    x_BTD = constrain(x_BTD, 'batch', 'length', None)
    q_BTNH, k_BTKH, v_BTKH = self._projected(x_BTD, context)
    held, begun_B = cache, context.begun_B
    if cache is not None:
      cache = extended(cache, k_BTKH, v_BTKH, context.lengths_B, begun_B)
    if held is not None and begun_B is not None:
      new = q_BTNH, held, k_BTKH, v_BTKH
      x_BTNH = continued(*new, begun_B, self.window, self.prefix())
    elif cache is not None and x_BTD.shape[1] == 1:
      x_BTNH = recall(q_BTNH, cache, context.lengths_B, self.prefix(), context.bias_ND)
    else:
      x_BTNH = self._mixed(q_BTNH, k_BTKH, v_BTKH, context)
    return self._out(x_BTNH), cache

  def prefix(self) -> Prefix | None:
    """Keys and values that all tokens see before their own; an adapter may stand around this."""
    return None

  @nn.nowrap
  def _projected(
    self, x_BTD: jax.Array, context: LayerContext
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, of the indices that are read, and the keys and values of all."""
    options, rotation = self.options, context.rotation(self.window)
    q_BTNH = self._queries(at(x_BTD, context.read_BP))
    k_BTKH, v_BTKH = self._key_values(x_BTD)
    if options.qk_norm:
      q_BTNH = Norm(options, name='query_norm')(q_BTNH)
      k_BTKH = Norm(options, name='key_norm')(k_BTKH)
    if rotation is not None:
      read = tuple(at(x, context.read_BP) for x in rotation)
      q_BTNH, k_BTKH = rotate(q_BTNH, read), rotate(k_BTKH, rotation)
    return self._laid_out(q_BTNH, k_BTKH, v_BTKH)

  @nn.nowrap
  def _queries(self, x_BTD: jax.Array) -> jax.Array:
    options = self.options
    shape = options.dim, options.heads, options.head_dim
    q_BTNH = Linear('...D,DNH->...NH', shape, options, self._biased, name='query')(x_BTD)
    return q_BTNH if options.scaled else q_BTNH * options.head_dim**0.5

  @nn.nowrap
  def _key_values(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    options = self.options
    shape = options.dim, options.kv_heads or options.heads, options.head_dim
    k_BTKH, v_BTKH = (
      Linear('...D,DKH->...KH', shape, options, self._biased, name=name)(x_BTD)
      for name in ('key', 'value')
    )
    return k_BTKH, v_BTKH

  @nn.nowrap
  def _laid_out(
    self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BTNH = constrain(q_BTNH, 'batch', 'length', 'heads', None)
    k_BSKH, v_BSKH = (constrain(x, 'batch', 'length', 'kv_heads', None) for x in (k_BSKH, v_BSKH))
    return tuple(checkpoint_name(x, PROJECTIONS) for x in (q_BTNH, k_BSKH, v_BSKH))

  @nn.nowrap
  def _out(self, x_BTNH: jax.Array) -> jax.Array:
    options = self.options
    x_BTNH = constrain(x_BTNH, 'batch', 'length', 'heads', None)
    shape = options.heads, options.head_dim, options.dim
    out = Linear('...NH,NHD->...D', shape, options, options.bias, options.residual_std, name='out')
    return checkpoint_name(between_layers(out(x_BTNH)), PROJECTIONS)

  @property
  def _biased(self) -> bool:
    options = self.options
    return options.bias if options.qkv_bias is None else options.qkv_bias

  @nn.nowrap
  def _mixed(
    self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, context: LayerContext
  ) -> jax.Array:
    options = self.options
    drops = context.train and options.attention_dropout > 0.0
    given = dict(
      prefix=self.prefix(),
      bias_ND=context.bias_ND,
      segments_BT=context.segments_BT,
      open_BS=context.open_BT,
      causal=options.causal,
      window=self.window,
      dropout_rate=options.attention_dropout,
      dropout_rng=self.make_rng('dropout') if drops else None,
    )
    if context.read_BP is None:
      if self.is_mutable_collection(MAPS) and not self.is_initializing():
        names = 'prefix', 'bias_ND', 'segments_BT', 'open_BS', 'causal', 'window'
        self._keep_maps(q_BTNH, k_BTKH, {name: given[name] for name in names})
      return attention(q_BTNH, k_BTKH, v_BTKH, **given, implementation=options.attention)
    return attention_at(q_BTNH, k_BTKH, v_BTKH, context.read_BP, **given)

  @nn.nowrap
  def _keep_maps(self, q_BTNH: jax.Array, k_BSKH: jax.Array, masks: Mapping[str, Any]) -> None:
    maps_BNTS = probabilities(q_BTNH, k_BSKH, **masks)
    self.sow(MAPS, 'probabilities', maps_BNTS, lambda _, new: new, lambda: None)


class CrossAttention(Attention):
  """Attention of the tokens of a row to a memory, each to the document there that has the number of
  its own (arXiv:1706.03762, section 3.2.3).
  """

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, context: LayerContext, cache: KeyValues | None = None
  ) -> tuple[jax.Array, KeyValues | None]:
    """What is added to `x_BTD`, whose positions are those that the layer returns; and the cache
    with keys and values of the memory, where the context has one and there is a cache.
    """
    q_BTNH = self._queries(constrain(x_BTD, 'batch', 'length', None))
    if context.memory_BSD is None:  # one token of each row, and one document
      return self._out(mixed(q_BTNH, cache, context.memory_segments_BS > 0)), cache
    memory_BSD = constrain(context.memory_BSD, 'batch', 'length', None)
    q_BTNH, k_BSKH, v_BSKH = self._laid_out(q_BTNH, *self._key_values(memory_BSD))
    if cache is not None:
      cache = remembered(cache, k_BSKH, v_BSKH)
    return self._out(self._crossed(q_BTNH, k_BSKH, v_BSKH, context)), cache

  @nn.nowrap
  def _crossed(
    self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, context: LayerContext
  ) -> jax.Array:
    options, segments_BT = self.options, context.segments_BT
    if segments_BT is None:
      segments_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
    elif context.read_BP is not None:
      segments_BT = jnp.take_along_axis(segments_BT, context.read_BP, axis=1)
    masks = dict(segments_BT=segments_BT, key_segments_BS=context.memory_segments_BS)
    if self.is_mutable_collection(MAPS) and not self.is_initializing():
      self._keep_maps(q_BTNH, k_BSKH, masks)
    drops = context.train and options.attention_dropout > 0.0
    return attention(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      **masks,
      dropout_rate=options.attention_dropout,
      dropout_rng=self.make_rng('dropout') if drops else None,
      implementation=options.attention,
    )


class MLP(nn.Module):
  """activation(x W_up) W_down, or with a gate (activation(x W_gate) * x W_up) W_down."""

  options: Options

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    options = self.options
    D, F = options.dim, options.mlp_dim
    activation = ACTIVATIONS[options.activation]
    x_BTD = constrain(x_BTD, 'batch', 'length', None)
    h_BTF = Linear('...D,DF->...F', (D, F), options, options.bias, name='up')(x_BTD)
    if options.gated:
      gate = Linear('...D,DF->...F', (D, F), options, options.bias, name='gate')
      h_BTF *= activation(gate(x_BTD))
    else:
      h_BTF = activation(h_BTF)
    h_BTF = constrain(h_BTF, 'batch', 'length', 'mlp')
    std = options.residual_std
    down = Linear('...F,FD->...D', (F, D), options, options.bias, std, name='down')
    return checkpoint_name(between_layers(down(h_BTF)), PROJECTIONS)


class Block(nn.Module):
  """One layer: attention, where it crosses attention to a memory, and mlp, each with a residual
  connection, a norm and dropout on what it adds.

  Attributes:
    options: shared options.
    window: how far this layer sees; None for everywhere.
    attention_norm: False leaves out the norm before attention (ModernBERT's first layer, whose
      input is normalised already).
  """

  options: Options
  window: int | None = None
  attention_norm: bool = True

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    context: LayerContext,
    cache: KeyValues | Crossing | None = None,
  ) -> tuple[jax.Array, KeyValues | Crossing | None]:
    """The layer's output, and its cache with these tokens in it, if there is one."""
    options = self.options
    own, memory = cache if isinstance(cache, Crossing) else (cache, None)
    mlp = MLP(options, name='mlp')
    norm_1 = Norm(options, name='attention_norm') if self.attention_norm else lambda x: x
    before_1, after_1 = _sides(options, norm_1)
    before_2, after_2 = _sides(options, Norm(options, name='mlp_norm'))
    dropped = functools.partial(drop, self, rate=options.dropout, train=context.train)

    attend = Attention(options, self.window, name='attention')
    added_BTD, own = attend(before_1(x_BTD), context, own)
    x_BTD = self.after_attention(at(x_BTD, context.read_BP), dropped(added_BTD), after_1)
    if options.crosses:
      cross = CrossAttention(options, name='cross_attention')
      before, after = _sides(options, Norm(options, name='cross_attention_norm'))
      added_BTD, memory = cross(before(x_BTD), context, memory)
      x_BTD = _joined(x_BTD, dropped(added_BTD), after)
    x_BTD = self.after_mlp(x_BTD, dropped(mlp(before_2(x_BTD))), after_2)
    return x_BTD, own if memory is None else Crossing(own, memory)

  def after_attention(
    self, x_BTD: jax.Array, added_BTD: jax.Array, norm: Norm | None = None
  ) -> jax.Array:
    """The residual stream after attention; an adapter may stand around this.

    Args:
      x_BTD: the stream before.
      added_BTD: what attention adds to it.
      norm: of the sum; None where norms come first.
    """
    return _joined(x_BTD, added_BTD, norm)

  def after_mlp(
    self, x_BTD: jax.Array, added_BTD: jax.Array, norm: Norm | None = None
  ) -> jax.Array:
    """The same after the mlp."""
    return _joined(x_BTD, added_BTD, norm)


def _sides(
  options: Options, norm: Callable[[jax.Array], jax.Array]
) -> tuple[Callable[[jax.Array], jax.Array], Norm | None]:
  """A sublayer's norm before it, or after the sum."""
  return (lambda x: x, norm) if options.norm_order == 'post' else (norm, None)


def _joined(x_BTD: jax.Array, added_BTD: jax.Array, norm: Norm | None) -> jax.Array:
  return x_BTD + added_BTD if norm is None else norm(x_BTD + added_BTD)


def between_layers(x_BTD: jax.Array) -> jax.Array:
  """The residual stream, laid out as norms and dropout work on it: positions cut over `sequence`
  and `tensor` alike.
  """
  layout = current()
  if layout is not None and layout.mesh.shape['sequence'] > 1:
    # In two steps: where `sequence` and `tensor` both cut the positions, XLA otherwise gathers
    # operands of the product before.
    x_BTD = constrain(x_BTD, 'batch', 'length', None)
  return constrain(x_BTD, 'batch', 'norm_length', None)
