"""One layer of a Transformer (arXiv:1706.03762): attention, mlp, norms and residual connections.

What a layer needs besides its input is one `LayerContext`, the same for all layers.
"""

import functools

import flax.linen as nn
import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn.attention.cache import KeyValues, extended, recall
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
    rotations: those of layers that see everywhere, and of those with a window; None where
      positions are not rotary.
    lengths_B: with a cache, the tokens of each row so far, these included.
    read_BP: without a cache, the indices of each row whose states are wanted; None for all. A
      layer that has them returns these alone.
    train: whether dropout is on.
  """

  segments_BT: jax.Array | None = None
  positions_BT: jax.Array | None = None
  rotations: tuple[Rotation, Rotation] | None = None
  lengths_B: jax.Array | None = None
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
    options = self.options
    x_BTD = constrain(x_BTD, 'batch', 'length', None)
    q_BTNH, k_BTKH, v_BTKH = self._projected(x_BTD, context)
    if cache is not None:
      cache = extended(cache, k_BTKH, v_BTKH, context.lengths_B)
    if cache is not None and x_BTD.shape[1] == 1:
      x_BTNH = recall(q_BTNH, cache, context.lengths_B, self.prefix())
    else:
      x_BTNH = self._mixed(q_BTNH, k_BTKH, v_BTKH, context)
    x_BTNH = constrain(x_BTNH, 'batch', 'length', 'heads', None)
    shape = options.heads, options.head_dim, options.dim
    out = Linear('...NH,NHD->...D', shape, options, options.bias, options.residual_std, name='out')
    return checkpoint_name(between_layers(out(x_BTNH)), PROJECTIONS), cache

  def prefix(self) -> Prefix | None:
    """Keys and values that all tokens see before their own; an adapter may stand around this."""
    return None

  @nn.nowrap
  def _projected(
    self, x_BTD: jax.Array, context: LayerContext
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, of the indices that are read, and the keys and values of all."""
    options, rotation = self.options, context.rotation(self.window)
    D, N, H = options.dim, options.heads, options.head_dim
    K = options.kv_heads or N
    bias = options.bias if options.qkv_bias is None else options.qkv_bias
    query = Linear('...D,DNH->...NH', (D, N, H), options, bias, name='query')
    q_BTNH = query(at(x_BTD, context.read_BP))
    k_BTKH = Linear('...D,DKH->...KH', (D, K, H), options, bias, name='key')(x_BTD)
    v_BTKH = Linear('...D,DKH->...KH', (D, K, H), options, bias, name='value')(x_BTD)
    if options.qk_norm:
      q_BTNH = Norm(options, name='query_norm')(q_BTNH)
      k_BTKH = Norm(options, name='key_norm')(k_BTKH)
    if rotation is not None:
      read = tuple(at(x, context.read_BP) for x in rotation)
      q_BTNH, k_BTKH = rotate(q_BTNH, read), rotate(k_BTKH, rotation)
    q_BTNH = constrain(q_BTNH, 'batch', 'length', 'heads', None)
    k_BTKH, v_BTKH = (constrain(x, 'batch', 'length', 'kv_heads', None) for x in (k_BTKH, v_BTKH))
    return tuple(checkpoint_name(x, PROJECTIONS) for x in (q_BTNH, k_BTKH, v_BTKH))

  @nn.nowrap
  def _mixed(
    self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, context: LayerContext
  ) -> jax.Array:
    options = self.options
    drops = context.train and options.attention_dropout > 0.0
    given = dict(
      prefix=self.prefix(),
      segments_BT=context.segments_BT,
      causal=options.causal,
      window=self.window,
      dropout_rate=options.attention_dropout,
      dropout_rng=self.make_rng('dropout') if drops else None,
    )
    if context.read_BP is None:
      if self.is_mutable_collection(MAPS) and not self.is_initializing():
        masks = {name: given[name] for name in ('prefix', 'segments_BT', 'causal', 'window')}
        maps_BNTS = probabilities(q_BTNH, k_BTKH, **masks)
        self.sow(MAPS, 'probabilities', maps_BNTS, lambda _, new: new, lambda: None)
      return attention(q_BTNH, k_BTKH, v_BTKH, **given, implementation=options.attention)
    return attention_at(q_BTNH, k_BTKH, v_BTKH, context.read_BP, **given)


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
  """One layer: attention and mlp, each with a residual connection, a norm and dropout on what it
  adds.

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
    self, x_BTD: jax.Array, context: LayerContext, cache: KeyValues | None = None
  ) -> tuple[jax.Array, KeyValues | None]:
    """The layer's output, and its cache with these tokens in it, if there is one."""
    options = self.options
    attend = Attention(options, self.window, name='attention')
    mlp = MLP(options, name='mlp')
    norm_1 = Norm(options, name='attention_norm') if self.attention_norm else lambda x: x
    norm_2 = Norm(options, name='mlp_norm')
    dropped = functools.partial(drop, self, rate=options.dropout, train=context.train)
    if options.norm_order == 'post':
      added_BTD, cache = attend(x_BTD, context, cache)
      x_BTD = self.after_attention(at(x_BTD, context.read_BP), dropped(added_BTD), norm_1)
      return self.after_mlp(x_BTD, dropped(mlp(x_BTD)), norm_2), cache
    added_BTD, cache = attend(norm_1(x_BTD), context, cache)
    x_BTD = self.after_attention(at(x_BTD, context.read_BP), dropped(added_BTD))
    return self.after_mlp(x_BTD, dropped(mlp(norm_2(x_BTD)))), cache

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
