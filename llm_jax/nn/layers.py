"""The Linen layers that every model is made of: Linear, Norm, Embedder, RoPE, Attention, MLP,
Block, Stack.

Shapes stand in names, one letter a dimension:

    B rows of a batch        N query heads            L layers
    T places of a row        K key and value heads    M masked places
    S places of the keys     H head dimension         C classes
    D model dimension        F mlp dimension          R adapter rank
    V vocabulary             G query heads a key head, N = K G

Every parameter carries the logical axis names of its dimensions (`AXES`, and `layers` where it is
stacked); its last path component is `kernel`, `embedding`, `bias` or `scale`. Everything under a
component `layers` is stacked over layers on axis 0. (`apart` and `flipped` give other forms of the
same parameters, which the layers take as well, to programs that only run them.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llm_jax.core import tree
from llm_jax.core.plugins import nearest
from llm_jax.nn.attention.dispatch import (
  IMPLEMENTATIONS,
  LONG,
  KeyValues,
  attention,
  attention_at,
  extended,
  recall,
)
from llm_jax.nn.attention.masks import RESIDUALS
from llm_jax.nn.dropout import dropout
from llm_jax.nn.vocabulary import lookup
from llm_jax.parallel import fsdp
from llm_jax.parallel.sharding import constrain, current

AXES = {
  'D': 'embed',
  'N': 'heads',
  'K': 'kv_heads',
  'H': 'head_dim',
  'F': 'mlp',
  'V': 'vocab',
  'C': 'classes',
}
ACTIVATIONS = {
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float64': jnp.float64}
INITIALIZERS = {
  'normal': jax.nn.initializers.normal,
  'truncated_normal': jax.nn.initializers.truncated_normal,
}
NORMS = ('layernorm', 'rmsnorm')
NORM_ORDERS = ('pre', 'post')
POSITIONS = ('learned', 'rope')
NARROW = (
  'narrow'  # what a layer's matrix products give that is as wide as the model, by `checkpoint_name`
)
_SAVED = jax.checkpoint_policies
# Attention's own residuals are kept by all but 'full', where its kernel names them: computing them
# again is computing it all.
REMAT = {
  'none': None,
  'dots': _SAVED.save_from_both_policies(
    _SAVED.dots_with_no_batch_dims_saveable, _SAVED.save_only_these_names(RESIDUALS)
  ),
  'narrow': _SAVED.save_only_these_names(RESIDUALS, NARROW),
  'attention': _SAVED.save_only_these_names(RESIDUALS),
  'full': _SAVED.nothing_saveable,
  'offload': _SAVED.save_and_offload_only_these_names(
    names_which_can_be_saved=[RESIDUALS],
    names_which_can_be_offloaded=[NARROW],
    offload_src='device',
    offload_dst='pinned_host',
  ),
}
"""What backpropagation keeps of a layer, all else is computed again:

    none        everything
    dots        what matrix products give
    narrow      the same, but for the mlp's hidden layer, which is the widest
    attention   what attention itself gives
    full        the layer's input alone
    offload     as narrow, in the memory of the host (TPUs, GPUs)

'auto' beside them is the first of the five that fits, which `llm_jax.training.memory` finds; where
nothing is learnt it means none.
"""

Rope = tuple[jax.Array, jax.Array]  # sine and cosine, [B, T, 1, H / 2]


@dataclasses.dataclass(frozen=True)
class Options:
  """What all layers of a model share, heads included; values are checked here, so a wrong one never
  reaches a compiler.

  Attributes:
    dim: D.
    layers: L.
    heads: N.
    kv_heads: K; divides `heads`. None: as many as `heads`.
    head_dim: H. None: D / N, and N must divide D.
    mlp_dim: F.
    causal: a token sees no later one.
    norm: 'layernorm' (arXiv:1607.06450) or 'rmsnorm' (arXiv:1910.07467).
    norm_order: 'post' normalises sums (the first Transformer, BERT); 'pre' each layer's input, and
      the last output.
    norm_bias: a bias in every norm ('layernorm' only).
    norm_eps: added to the variance.
    bias: a bias in every linear layer.
    qkv_bias: a bias in the projections to queries, keys and values (Qwen2). None: as `bias` says.
    qk_norm: queries and keys are normalised, each head by itself, before they are turned (Qwen3;
      arXiv:2302.05442, section 2).
    activation: one of `ACTIVATIONS`.
    gated: the mlp is activation(x W_gate) * (x W_up) (GeGLU, SwiGLU; arXiv:2002.05202).
    dropout: rate on the embeddings and on what each sublayer adds.
    attention_dropout: rate on the attention probabilities.
    init_distribution: distribution of every kernel and embedding, one of `INITIALIZERS`; truncated
      at two `init_std`.
    init_std: its standard deviation (before truncation).
    depth_scaled_init: kernels that add to the residual stream start smaller by sqrt(2 L) (GPT-2).
    dtype: what activations are computed in; softmax, norms and logits in at least float32.
    param_dtype: what parameters are kept in.
    attention: which implementation, one of `attention.IMPLEMENTATIONS`.
  """

  dim: int
  layers: int
  heads: int
  kv_heads: int | None
  head_dim: int | None
  mlp_dim: int
  causal: bool
  norm: str
  norm_order: str
  norm_bias: bool
  norm_eps: float
  bias: bool
  qkv_bias: bool | None
  qk_norm: bool
  activation: str
  gated: bool
  dropout: float
  attention_dropout: float
  init_distribution: str
  init_std: float
  depth_scaled_init: bool
  dtype: str
  param_dtype: str
  attention: str

  def __post_init__(self):
    for name in ('dim', 'layers', 'heads', 'mlp_dim'):
      check_positive(name, getattr(self, name))
    for name, known in (
      ('norm', NORMS),
      ('norm_order', NORM_ORDERS),
      ('activation', ACTIVATIONS),
      ('dtype', DTYPES),
      ('param_dtype', DTYPES),
      ('init_distribution', INITIALIZERS),
      ('attention', IMPLEMENTATIONS),
    ):
      check_known(name, getattr(self, name), known)
    for name in ('dropout', 'attention_dropout'):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 0 and below 1.')
    if self.head_dim is None:
      if self.dim % self.heads:
        raise ValueError(
          f'heads={self.heads} must divide dim={self.dim}; try '
          f'heads={_divisor(self.dim, self.heads)}, or give '
          'head_dim.'
        )
      object.__setattr__(self, 'head_dim', self.dim // self.heads)
    check_positive('head_dim', self.head_dim)
    if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
      raise ValueError(
        f'kv_heads={self.kv_heads} must divide heads={self.heads}; '
        f'try kv_heads={_divisor(self.heads, self.kv_heads)}.'
      )
    if self.norm == 'rmsnorm' and self.norm_bias:
      raise ValueError("norm_bias=True needs norm='layernorm'; 'rmsnorm' has no bias.")
    if 'float64' in (self.dtype, self.param_dtype) and not jax.config.jax_enable_x64:
      raise ValueError(
        "dtype='float64' needs jax.config.update('jax_enable_x64', True), or it would quietly be "
        'float32.'
      )

  @property
  def wide(self) -> jnp.dtype:
    """The type of softmax, norms and logits: `dtype`, but at least float32."""
    return jnp.promote_types(DTYPES[self.dtype], jnp.float32)

  @property
  def residual_std(self) -> float:
    """Standard deviation at initialisation of kernels that add to the residual stream."""
    return self.init_std / math.sqrt(2 * self.layers) if self.depth_scaled_init else self.init_std


class Linear(nn.Module):
  """y = x W + b for the dimensions that `spec` names; also of a kernel that is `flipped`.

  Attributes:
    spec: the einsum, '...D,DNH->...NH' say; the kernel's letters give its logical axes.
    shape: shape of the kernel.
    options: types and initialisation.
    bias: whether there is one.
    std: standard deviation of the kernel at initialisation; None for `options.init_std`.
    wide: the result is at least float32 (logits of a few classes).
  """

  spec: str
  shape: tuple[int, ...]
  options: Options
  bias: bool
  std: float | None = None
  wide: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    letters, out = self.spec.split(',')[1].replace('...', '').split('->')
    sizes = dict(zip(letters, self.shape, strict=True))
    dtype = DTYPES[self.options.dtype]
    result = self.options.wide if self.wide else dtype
    if self.has_variable('params', 'flipped'):
      inputs = len(letters) - len(out)
      y = matrix_first(
        x.reshape(-1, math.prod(x.shape[-inputs:])).astype(dtype),
        self.get_variable('params', 'flipped'),
        result,
      )
      y = y.reshape(*x.shape[:-inputs], *(sizes[letter] for letter in out))
    else:
      kernel = parameter(self, 'kernel', letters, self.shape, self.options, self.std)
      y = fsdp.product(self.spec, x, kernel, [AXES[letter] for letter in letters], dtype, result)
    if self.bias:
      y += lift(
        parameter(self, 'bias', out, tuple(sizes[letter] for letter in out), self.options).astype(
          result
        ),
        y.ndim,
      )
    return y


class Norm(nn.Module):
  """LayerNorm or RMSNorm over the last dimension, computed in at least float32; the result is in
  the compute type.
  """

  options: Options

  @nn.compact
  def __call__(self, x_D: jax.Array) -> jax.Array:
    options = self.options
    x = x_D.astype(options.wide)
    if options.norm == 'layernorm':
      x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + options.norm_eps)
    x *= lift(parameter(self, 'scale', 'D', (x.shape[-1],), options).astype(options.wide), x.ndim)
    if options.norm_bias:
      x += lift(parameter(self, 'bias', 'D', (x.shape[-1],), options).astype(options.wide), x.ndim)
    return x.astype(DTYPES[options.dtype])


class Embedding(nn.Module):
  """A table of `size` vectors, whole on each device unless `axis` is 'vocab'."""

  size: int
  axis: str
  options: Options
  std: float | None = None

  def setup(self):
    std = self.options.init_std if self.std is None else self.std
    axes = (self.axis, 'embed' if self.axis == 'vocab' else 'norm')
    init = nn.with_logical_partitioning(INITIALIZERS[self.options.init_distribution](std), axes)
    self.embedding = self.param(
      'embedding', init, (self.size, self.options.dim), DTYPES[self.options.param_dtype]
    )

  def __call__(self, ids: jax.Array) -> jax.Array:
    """Vectors of `ids`, at least float32."""
    return self.embedding[ids].astype(self.options.wide)


class Output(nn.Module):
  """The kernel [D, V] of a projection on the vocabulary that is not tied to the token table."""

  size: int
  options: Options

  def setup(self):
    self.kernel = parameter(self, 'kernel', 'DV', (self.options.dim, self.size), self.options)


class Embedder(nn.Module):
  """Sum of token, position and token-type embeddings, then (where asked) a norm, then dropout.

  Attributes:
    vocab_size: V.
    options: shared options.
    positions: rows of the table of learned positions; 0 for no table.
    position_offset: row of position 0 (RoBERTa leaves two unused rows).
    position_std: standard deviation of that table at initialisation; None for `options.init_std`.
    token_types: rows of the token-type table, 0 for none; a higher type than it knows counts as its
      last (RoBERTa has one).
    norm: whether a norm follows the sum.
  """

  vocab_size: int
  options: Options
  positions: int = 0
  position_offset: int = 0
  position_std: float | None = None
  token_types: int = 0
  norm: bool = False

  def setup(self):
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
    """The embedded row, [B, T, D] in the compute type."""
    x_BTD = lookup(self.token.embedding, tokens_BT, DTYPES[self.options.dtype]).astype(
      self.options.wide
    )
    if self.positions:
      x_BTD += self.position(positions_BT + self.position_offset)
    if self.token_types:
      types_BT = (
        jnp.zeros_like(tokens_BT)
        if token_types_BT is None
        else jnp.minimum(token_types_BT, self.token_types - 1)
      )
      x_BTD += self.token_type(types_BT)
    x_BTD = self.embedding_norm(x_BTD) if self.norm else x_BTD.astype(DTYPES[self.options.dtype])
    return between_layers(drop(self, x_BTD, self.options.dropout, train))


def rope_frequencies(
  head_dim: int, theta: float, scaling: tuple[float, ...] | None = None
) -> np.ndarray:
  """Radians a position for each pair of dimensions (RoFormer, arXiv:2104.09864, eq. 15), [H / 2]
  float64.

  Args:
    head_dim: H, even.
    theta: the base.
    scaling: None; or (factor,), all waves stretched alike (arXiv:2306.15595); or LLaMA 3's
      (arXiv:2407.21783; code of release 3.1): (factor, low, high, length). Waves shorter than
      length / high are kept, those longer than length / low are stretched `factor` times, those
      between partly.

  Raises:
    ValueError: an odd head dimension, or a scaling that is not one number, or four with low < high.
  """
  if head_dim % 2:
    raise ValueError(
      f'positions="rope" turns pairs of dimensions; head_dim={head_dim} must be even.'
    )
  frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is None:
    return frequencies
  if len(scaling) == 1:
    return frequencies / scaling[0]
  if len(scaling) != 4 or not scaling[1] < scaling[2]:
    raise ValueError(
      f'rope_scaling={scaling} must be (factor,), or (factor, low, high, original length) with low '
      '< high.'
    )
  factor, low, high, length = scaling
  waves = length * frequencies / (2 * np.pi)  # how often each pair turns within the original length
  kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
  return frequencies * (kept + (1.0 - kept) / factor)


def rope(positions_BT: jax.Array, frequencies: np.ndarray, dtype: jnp.dtype) -> Rope:
  """Sine and cosine of each position's angles, [B, T, 1, H / 2] each, in `dtype`."""
  angles = positions_BT[:, :, None, None].astype(dtype) * lift(jnp.asarray(frequencies, dtype), 4)
  return jnp.sin(angles), jnp.cos(angles)


def rotate(x_BTNH: jax.Array, turn: Rope) -> jax.Array:
  """Turns dimension i together with dimension i + H / 2 (the halved layout of GPT-NeoX), in at
  least float32.
  """
  sine, cosine = turn
  a, b = jnp.split(x_BTNH.astype(sine.dtype), 2, axis=-1)
  return jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1).astype(
    x_BTNH.dtype
  )


class Attention(nn.Module):
  """Self-attention with its four projections; `window` is static, as kernels need it. `places_BP`
  as in `Stack`.
  """

  options: Options
  window: int | None

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    turn: Rope | None,
    train: bool,
    cache: KeyValues | None = None,
    lengths_B: jax.Array | None = None,
    places_BP: jax.Array | None = None,
  ) -> tuple[jax.Array, KeyValues | None]:
    """What is added to `x_BTD`, and the cache with these tokens in it, if there is one (`Stack`)."""
    options = self.options
    D, N, H = options.dim, options.heads, options.head_dim
    K = options.kv_heads or N
    x_BTD = constrain(x_BTD, 'batch', 'length', None)
    bias = options.bias if options.qkv_bias is None else options.qkv_bias
    q_BTNH = Linear('...D,DNH->...NH', (D, N, H), options, bias, name='query')(at(x_BTD, places_BP))
    k_BTKH = Linear('...D,DKH->...KH', (D, K, H), options, bias, name='key')(x_BTD)
    v_BTKH = Linear('...D,DKH->...KH', (D, K, H), options, bias, name='value')(x_BTD)
    if options.qk_norm:
      q_BTNH, k_BTKH = (
        Norm(options, name='query_norm')(q_BTNH),
        Norm(options, name='key_norm')(k_BTKH),
      )
    if turn is not None:
      q_BTNH, k_BTKH = rotate(q_BTNH, tuple(at(x, places_BP) for x in turn)), rotate(k_BTKH, turn)
    q_BTNH = constrain(q_BTNH, 'batch', 'length', 'heads', None)
    k_BTKH, v_BTKH = (constrain(x, 'batch', 'length', 'kv_heads', None) for x in (k_BTKH, v_BTKH))
    q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, NARROW) for x in (q_BTNH, k_BTKH, v_BTKH))
    if cache is not None:
      cache = extended(cache, k_BTKH, v_BTKH, lengths_B)
    if cache is not None and x_BTD.shape[1] == 1:
      x_BTNH = recall(q_BTNH, cache, lengths_B)
    else:
      drops = train and options.attention_dropout > 0.0
      given = dict(
        segments_BT=segments_BT,
        causal=options.causal,
        window=self.window,
        dropout_rate=options.attention_dropout,
        dropout_rng=self.make_rng('dropout') if drops else None,
      )
      if places_BP is None:
        x_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, **given, implementation=options.attention)
      else:
        x_BTNH = attention_at(q_BTNH, k_BTKH, v_BTKH, places_BP, **given)
    x_BTNH = constrain(x_BTNH, 'batch', 'length', 'heads', None)
    out = Linear(
      '...NH,NHD->...D', (N, H, D), options, options.bias, options.residual_std, name='out'
    )
    return checkpoint_name(between_layers(out(x_BTNH)), NARROW), cache


class MLP(nn.Module):
  """activation(x W_up) W_down, or with a gate (activation(x W_gate) * x W_up) W_down."""

  options: Options

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    options = self.options
    D, F = options.dim, options.mlp_dim
    act = ACTIVATIONS[options.activation]
    x_BTD = constrain(x_BTD, 'batch', 'length', None)
    h_BTF = Linear('...D,DF->...F', (D, F), options, options.bias, name='up')(x_BTD)
    if options.gated:
      h_BTF *= act(Linear('...D,DF->...F', (D, F), options, options.bias, name='gate')(x_BTD))
    else:
      h_BTF = act(h_BTF)
    h_BTF = constrain(h_BTF, 'batch', 'length', 'mlp')
    y_BTD = Linear(
      '...F,FD->...D', (F, D), options, options.bias, options.residual_std, name='down'
    )(h_BTF)
    return checkpoint_name(between_layers(y_BTD), NARROW)


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
    self,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    turn: Rope | None,
    train: bool,
    cache: KeyValues | None = None,
    lengths_B: jax.Array | None = None,
    places_BP: jax.Array | None = None,
  ) -> tuple[jax.Array, KeyValues | None]:
    """The layer's output, and its cache with these tokens in it, if there is one (`Stack`)."""
    attend = Attention(self.options, self.window, name='attention')
    mlp = MLP(self.options, name='mlp')
    norm_1 = Norm(self.options, name='attention_norm') if self.attention_norm else lambda x: x
    norm_2 = Norm(self.options, name='mlp_norm')
    dropped = functools.partial(drop, self, rate=self.options.dropout, train=train)
    if self.options.norm_order == 'post':
      added_BTD, cache = attend(x_BTD, segments_BT, turn, train, cache, lengths_B, places_BP)
      x_BTD = norm_1(at(x_BTD, places_BP) + dropped(added_BTD))
      return norm_2(x_BTD + dropped(mlp(x_BTD))), cache
    added_BTD, cache = attend(norm_1(x_BTD), segments_BT, turn, train, cache, lengths_B, places_BP)
    x_BTD = at(x_BTD, places_BP) + dropped(added_BTD)
    return x_BTD + dropped(mlp(norm_2(x_BTD))), cache


class Group(nn.Module):
  """The blocks of one period of a layer pattern, each with its own static window: the body that
  `Stack` scans.

  Caches are a tuple, one a block. The last block alone has `places_BP`.
  """

  options: Options
  windows: tuple[int | None, ...]

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    turns: tuple[Rope | None, Rope | None],
    train: bool,
    caches: tuple[KeyValues, ...] | None = None,
    lengths_B: jax.Array | None = None,
    places_BP: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[KeyValues, ...] | None]:
    written = []
    for i, window in enumerate(self.windows):
      name = f'block_{i}' if len(self.windows) > 1 else 'block'
      x_BTD, cache = Block(self.options, window, name=name)(
        x_BTD,
        segments_BT,
        turns[window is not None],
        train,
        caches and caches[i],
        lengths_B,
        places_BP if i == len(self.windows) - 1 else None,
      )
      written.append(cache)
    return x_BTD, None if caches is None else tuple(written)


class Stack(nn.Module):
  """All layers: one scan over the periods of the layer pattern, parameters stacked under `layers`;
  without it one by one.

  Layer i sees everywhere when i is a multiple of `global_every`, and `window` otherwise. Layer g P
  + j of a pattern of period P (1 where all layers are alike) is index g of `layers/block_j`
  (`layers/block` where P = 1); with `first_bare`, layer 0 stands apart as `first`, and the pattern
  starts at layer 1. Parameters that `apart` has taken out of the stack are run one by one.

  Attributes:
    options: shared options.
    window: window of the local layers; None where there are none.
    global_every: how often a layer is global; 1 where all are, 0 where none is.
    first_bare: layer 0 has no norm before its attention.
    remat: what backpropagation keeps, one of `REMAT`; all else is computed again.
    unroll: layer groups that one turn of the compiled loop runs; 0 for all (no loop). Changes no
      parameter, and no value but what dropout draws.
  """

  options: Options
  window: int | None = None
  global_every: int = 1
  first_bare: bool = False
  remat: str = 'none'
  unroll: int = 1

  def setup(self):
    windows = self.layer_windows()
    if self.first_bare:
      self.first = self._rematted(Block, looped=False)(
        self.options, windows[0], attention_norm=False
      )
    period = max(self.global_every, 1)
    groups = len(windows[self.first_bare :]) // period
    if groups:
      unroll = groups if self.unroll == 0 else min(self.unroll, groups)
      scanned = nn.scan(
        self._rematted(Group, looped=unroll == 1),
        length=groups,
        unroll=unroll,
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast),
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      pattern = tuple(windows[self.first_bare :][:period])
      self.layers = scanned(self.options, pattern)
      self.single = self._rematted(Group, looped=False)(self.options, pattern, parent=None)

  def __call__(
    self,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    turns: tuple[Rope | None, Rope | None],
    train: bool,
    caches: Mapping[str, Any] | None = None,
    lengths_B: jax.Array | None = None,
    places_BP: jax.Array | None = None,
  ) -> Any:
    """Runs all layers.

    Args:
      x_BTD: the embedded rows.
      segments_BT: document of each token.
      turns: the rotations of global and of local layers.
      train: dropout is on.
      caches: what the layers keep of rows that grow (`attention.KeyValues`), stacked or `apart` as
        the parameters are. None for rows that are whole.
      lengths_B: with caches, the tokens of each row so far, these included.
      places_BP: without caches, the places of each row that are wanted, in any order, any of them
        more than once; None for all.

    Returns:
      The rows, or their places; with caches the pair of them and the caches with these tokens in
      them.
    """
    if self.first_bare:
      x_BTD, _ = self.first(x_BTD, segments_BT, turns[self.layer_windows()[0] is not None], train)
    if self.options.layers == self.first_bare:
      return at(x_BTD, places_BP)
    groups = self._one_by_one(stacked=caches is None)
    if groups is None:
      x_BTD, written = self.layers(
        x_BTD, segments_BT, turns, train, caches and caches['layers'], lengths_B
      )
      return at(x_BTD, places_BP) if caches is None else (x_BTD, {'layers': written})
    written, narrow = (
      {},
      places_BP is not None and ends_narrow(self.unroll, x_BTD.shape[1], places_BP.shape[1]),
    )
    for i, (name, params) in enumerate(groups.items()):
      last = i == len(groups) - 1
      x_BTD, written[name] = self.single.apply(
        {'params': params},
        x_BTD,
        segments_BT,
        turns,
        train,
        caches and caches[name],
        lengths_B,
        places_BP if last and narrow else None,
        rngs={'dropout': self.make_rng('dropout')} if self.has_rng('dropout') else {},
      )
    if caches is not None:
      return x_BTD, written
    return x_BTD if narrow else at(x_BTD, places_BP)

  def _one_by_one(self, stacked: bool) -> dict[str, Any] | None:
    """Parameters of each group where no loop runs them: as `apart` has them, or out of the stack,
    if that is wanted.
    """
    params = self.variables.get('params', {})
    if 'group_0' not in params:
      if self.unroll or not stacked or self.is_initializing():
        return None
      params = apart({'layers': params['layers']})
    names = (f'group_{i}' for i in range(self.options.layers))
    return {name: params[name] for name in names if name in params}

  def layer_windows(self) -> list[int | None]:
    """The window of each layer."""
    return [
      None if self.global_every and i % self.global_every == 0 else self.window
      for i in range(self.options.layers)
    ]

  def _rematted(self, module: Callable, looped: bool) -> Callable:
    if self.remat in ('none', 'auto'):
      return module
    # In a loop nothing can be merged with the forward pass; outside of one the compiler must be
    # kept from undoing the remat.
    return nn.remat(module, policy=REMAT[self.remat], prevent_cse=not looped, static_argnums=(4,))


def apart(stack: Mapping[str, Any]) -> dict[str, Any]:
  """A stack's parameters, or caches, with each group of layers by itself: `group_g` for index g of
  `layers`.

  A loop over layers copies the weights of each out of the stack at every turn. Where a turn
  computes little (one token a row), that is most of its time.
  """
  leaves, shape = jax.tree.flatten(stack['layers'])
  # Not by slices, each of whose gradients would be as large as the stack.
  parts = [jax.lax.split(x, (1,) * len(x)) for x in leaves]
  groups = [shape.unflatten(jnp.squeeze(x, 0) for x in part) for part in zip(*parts, strict=True)]
  rest = {name: value for name, value in stack.items() if name != 'layers'}
  return rest | {f'group_{i}': group for i, group in enumerate(groups)}


def flipped(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of layers that are `apart`, with `flipped` [outputs, inputs] in place of each
  `kernel`: for `matrix_first`.
  """
  leaves = {}
  for path, leaf in tree.flatten(params).items():
    if path.endswith('/kernel'):
      inputs = 2 if path.endswith('attention/out/kernel') else 1  # N and H
      path, leaf = (
        f'{path.removesuffix("kernel")}flipped',
        leaf.reshape(math.prod(leaf.shape[:inputs]), -1).T,
      )
    leaves[path] = leaf
  return tree.nest(leaves)


def matrix_first(x_RI: jax.Array, w_OI: jax.Array, result: jnp.dtype) -> jax.Array:
  """x W^T, [R, O] in the type `result`, for few rows on a CPU: as (W x^T)^T it takes XLA half the
  time, up to some 32 rows.

  The barriers keep XLA from turning the product round again.
  """
  x_IR = jax.lax.optimization_barrier(x_RI.T)
  y_OR = jnp.einsum('OI,IR->OR', w_OI.astype(x_RI.dtype), x_IR, preferred_element_type=result)
  return jax.lax.optimization_barrier(y_OR).T


def between_layers(x_BTD: jax.Array) -> jax.Array:
  """The residual stream, laid out as norms and dropout work on it: places cut over `sequence` and
  `tensor` alike.
  """
  layout = current()
  if layout is not None and layout.mesh.shape['sequence'] > 1:
    # In two steps: where `sequence` and `tensor` both cut the places, XLA otherwise gathers
    # operands of the product before.
    x_BTD = constrain(x_BTD, 'batch', 'length', None)
  return constrain(x_BTD, 'batch', 'norm_length', None)


def drop(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
  """Dropout by the module's stream `dropout`, when training; otherwise `x`."""
  return dropout(x, rate, module.make_rng('dropout')) if train and rate else x


def at(x_BT: jax.Array, places_BP: jax.Array | None) -> jax.Array:
  """`x` at some places of each row, [B, P, ...]; None for all of it."""
  return (
    x_BT
    if places_BP is None
    else jnp.take_along_axis(x_BT, places_BP.reshape(*places_BP.shape, *(1,) * (x_BT.ndim - 2)), 1)
  )


def ends_narrow(unroll: int, length: int, places: int) -> bool:
  """Whether a stack runs its last layer only at the places that are wanted of its rows.

  Not in a loop, whose turns are all alike; nor where rows are cut over the mesh, or so long that
  their scores need a kernel.
  """
  layout = current()
  return (
    unroll == 0
    and places < length <= LONG
    and (layout is None or layout.mesh.shape['sequence'] == 1)
  )


def lift(x: jax.Array, ndim: int) -> jax.Array:
  """`x` with leading axes of size 1 up to `ndim`: broadcasting that is said, not implied."""
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def parameter(
  module: nn.Module,
  name: str,
  letters: str,
  shape: tuple[int, ...],
  options: Options,
  std: float | None = None,
) -> jax.Array:
  """Creates the parameter `name` of `module`, with the logical axes of `letters`; biases start at
  0, scales at 1.
  """
  if name == 'kernel':
    init = INITIALIZERS[options.init_distribution](options.init_std if std is None else std)
  else:
    init = {'bias': jax.nn.initializers.zeros, 'scale': jax.nn.initializers.ones}[name]
  axes = (
    ('norm',) if letters == 'D' else tuple(AXES[letter] for letter in letters)
  )  # vectors are whole on each device
  return module.param(
    name, nn.with_logical_partitioning(init, axes), shape, DTYPES[options.param_dtype]
  )


def check_known(name: str, value: str, known: Iterable[str]) -> None:
  """Raises ValueError unless `value` is one of `known`."""
  if value not in known:
    raise ValueError(
      f'{name}={value!r} is not known{nearest(str(value), known)}; known: {", ".join(known)}.'
    )


def check_positive(name: str, value: int) -> None:
  """Raises ValueError unless `value` is at least 1."""
  if value < 1:
    raise ValueError(f'{name}={value} must be at least 1.')


def check_length(length: int, max_len: int) -> None:
  """Raises ValueError for rows longer than the model takes."""
  if length > max_len:
    raise ValueError(
      f'rows of {length} tokens are longer than max_len={max_len}; shorten seq_len or raise '
      'model.max_len.'
    )


def check_model(model: nn.Module) -> None:
  """Raises ValueError for a wrong value among the fields that every model has, those of `Options`
  included.
  """
  options = model.options
  for name in ('vocab_size', 'max_len'):
    check_positive(name, getattr(model, name))
  check_known('positions', model.positions, POSITIONS)
  check_known('remat', model.remat, (*REMAT, 'auto'))
  if model.unroll < 0:
    raise ValueError(f'unroll={model.unroll} must be at least 1, or 0 for all layers.')
  if model.positions == 'rope':
    rope_frequencies(options.head_dim, model.rope_theta)


def check_pattern(layers: int, window: int | None, global_every: int, first_bare: bool) -> None:
  """Raises ValueError unless a stack of `layers` is whole periods of its pattern (`Stack`)."""
  check_positive('global_every', global_every)
  if window is not None:
    check_positive('window', window)
  if (window is None) != (global_every == 1):
    raise ValueError(
      f'window={window} with global_every={global_every}: local layers need a window and '
      'global_every above 1; '
      'without them window=None and global_every=1.'
    )
  if (layers - first_bare) % global_every:
    rounded = (layers - first_bare) // global_every * global_every + first_bare
    raise ValueError(
      f'layers={layers} must be {"1 + " * first_bare}a multiple of global_every={global_every}; '
      f'try {rounded or rounded + global_every} or {rounded + global_every}.'
    )


def _divisor(of: int, near: int) -> int:
  return min((n for n in range(1, of + 1) if of % n == 0), key=lambda n: abs(n - near))
