"""Transformer of an encoder and a decoder (arXiv:1706.03762): the first one and Marian's, BART
(1910.13461) and T5 (1910.10683), by options.

Parameters: `embedder`, whose table both share; `encoder/layers/block`, `decoder/layers/block`
(stacked); `decoder_embedder` where positions are learned or embeddings are normalised; a
`..._bias` for each side where positions are relative; `encoder_norm` and `final_norm` where norms
come first; `output` where the vocabulary projection is not tied; `bias` of that projection.
"""

import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.contracts import SOURCE, Batch, Outputs
from llm_jax.models._transformer import (
  Transformer,
  begun,
  check_cache_dtype,
  positions_of,
  read,
)
from llm_jax.nn import relative, stack
from llm_jax.nn.attention import cache as caches
from llm_jax.nn.attention.cache import Crossing, KeyValues
from llm_jax.nn.block import LayerContext
from llm_jax.nn.dropout import drop
from llm_jax.nn.linear import Norm, vector
from llm_jax.nn.options import Options, check_length, check_positive


class Cache(NamedTuple):
  """What is kept of rows that grow: the tokens of each so far, [B]; which tokens of each source
  there are, [B, S]; and what each layer has of both.
  """

  lengths_B: jax.Array
  memory_segments_BS: jax.Array
  layers: stack.Caches


class Model(Transformer):
  """Source and target tokens to the hidden states of the target; no position of it sees a later
  one, all see the whole source of their own document.

  Document k of a row of sources belongs to document k of the row of targets beside it.

  Fields of its own, beside those of `Transformer`, whose `layers` are those of the decoder, and
  whose `positions` may also be 'sinusoidal' or 'relative':

  Attributes:
    encoder_layers: of the encoder; None for as many as the decoder has.
    position_offset: rows of the position tables left free before position 0 (BART: 2).
    buckets, farthest: of relative positions, `nn.relative`.
    embedding_norm: a norm on the embeddings of either side.
    embedding_scaled: tokens' vectors are multiplied by the square root of D.
    output_scaled: what is projected on the vocabulary is divided by the square root of D (T5 where
      it is tied).
    output_biased: the projection has a bias.
    cache_dtype: as for decoders.
  """

  inputs: ClassVar[tuple[str, ...]] = (
    *('tokens', 'segments', 'positions'),
    *('source_tokens', 'source_segments', 'source_positions'),
  )
  causal: ClassVar[bool] = True
  crosses: ClassVar[bool] = True
  known_positions: ClassVar[tuple[str, ...]] = ('learned', 'sinusoidal', 'relative')

  encoder_layers: int | None = None
  dim: int = 512
  layers: int = 6
  heads: int = 8
  mlp_dim: int = 2048
  positions: str = 'sinusoidal'
  norm_order: str = 'post'
  activation: str = 'relu'
  position_offset: int = 0
  buckets: int = 32
  farthest: int = 128
  embedding_norm: bool = False
  embedding_scaled: bool = True
  output_scaled: bool = False
  output_biased: bool = False
  cache_dtype: str | None = None

  def __post_init__(self):
    super().__post_init__()
    check_cache_dtype(self.cache_dtype)
    if self.encoder_layers is not None:
      check_positive('encoder_layers', self.encoder_layers)
    if self.position_offset < 0:
      raise ValueError(f'position_offset={self.position_offset} must be at least 0.')
    if self.window is not None:
      raise ValueError(f'window={self.window}: an encoder-decoder has none.')
    if self.positions == 'relative':
      relative.check(self.buckets, self.farthest)

  @property
  def options(self) -> Options:
    """Those of the decoder's layers, of heads too."""
    return self._options()

  @property
  def encoder_options(self) -> Options:
    """Those of the encoder's layers."""
    layers = self.encoder_layers or self.layers
    return self._options(causal=False, crosses=False, layers=layers)

  def setup(self):
    embed = functools.partial(
      self._embedder,
      position_offset=self.position_offset,
      norm=self.embedding_norm,
      scaled=self.embedding_scaled,
      sinusoids=self.positions == 'sinusoidal',
    )
    self.embedder = embed()
    self.decoder_embedder = embed(shared=self.embedder.token)
    run = functools.partial(stack.Stack, remat=self.remat, unroll=self.unroll)
    self.encoder = run(self.encoder_options)
    self.decoder = run(self.options, depth=self.encoder_options.layers)
    if self.positions == 'relative':
      bias = functools.partial(relative.RelativeBias, buckets=self.buckets, farthest=self.farthest)
      self.encoder_bias, self.decoder_bias = bias(self.encoder_options), bias(self.options)
    if self.norm_order == 'pre':
      self.encoder_norm = Norm(self.encoder_options)
    self._setup_ends()
    if self.output_biased:
      self.bias_V = vector(self, 'bias', 'V', (self.vocab_size,), self.options)

  def __call__(
    self,
    batch: Batch,
    positions: jax.Array | None = None,
    *,
    train: bool = False,
    cache: Cache | None = None,
  ) -> Outputs:
    """Hidden states of the targets, last norm included, in the compute type.

    Args:
      batch: `tokens`, and where it has them `segments` (0 for padding) and `positions`, of the
        targets; the same of the sources, `source_tokens` and so on. With a cache that has the
        sources already they are left out.
      positions: indices of each row of targets whose states are wanted, [B, P], without a cache;
        None for all.
      train: dropout is on, from the stream `dropout`.
      cache: of `empty_cache`, or as it was returned; as a decoder's.

    Raises:
      ValueError: a row longer than `max_len`, or no source.
    """
    if f'{SOURCE}tokens' not in batch and cache is None:
      raise ValueError(
        'an encoder-decoder reads two rows, a source and a target, and here is one; vectors, maps '
        'and single texts are for encoders and decoders.'
      )
    if f'{SOURCE}tokens' in batch:
      memory_BSD, segments_BS = self._encoded(batch, train)
      kept_BS = None if cache is None else _filled(segments_BS, cache.memory_segments_BS.shape[1])
    else:
      memory_BSD, segments_BS = None, cache.memory_segments_BS
      kept_BS = segments_BS
    tokens_BT = read(batch, 'tokens')
    check_length(tokens_BT.shape[1] + self.before(), self.max_len)
    segments_BT, positions_BT, lengths_B = begun(batch, cache)
    positions_BT += self.before()
    x_BTD = self.decoder_embedder(tokens_BT, positions_BT, None, train)
    slots = tokens_BT.shape[1] if cache is None else _slots(cache)
    context = LayerContext(
      segments_BT=segments_BT,
      positions_BT=positions_BT,
      lengths_B=lengths_B,
      bias_ND=self.decoder_bias(slots) if self.positions == 'relative' else None,
      memory_BSD=memory_BSD,
      memory_segments_BS=segments_BS,
      read_BP=positions,
      train=train,
    )
    x_BTD, layers = self.decoder(x_BTD, context, cache and cache.layers)
    if self.norm_order == 'pre':
      x_BTD = drop(self, self.final_norm(x_BTD), self.dropout, train)
    if self.output_scaled:
      x_BTD *= self.dim**-0.5
    return Outputs(x_BTD, cache=cache and Cache(lengths_B, kept_BS, layers))

  def empty_cache(self, rows: int, slots: int, source: int = 1) -> Cache:
    """A cache for `rows` rows of at most `slots` tokens, their sources of at most `source`, in the
    compute type.
    """
    options = self.options

    def empty(length: int) -> KeyValues:
      kv_heads = options.kv_heads or options.heads
      shape = self.layers, rows, kv_heads, length, options.head_dim
      return caches.empty(shape, self.cache_dtype or options.compute_dtype)

    layers = {'layers': (Crossing(empty(slots), empty(source)),)}
    return Cache(jnp.zeros(rows, jnp.int32), jnp.zeros((rows, source), jnp.int32), layers)

  def table_bias(self) -> jax.Array | None:
    """What is added to the logits, [V]."""
    return self.bias_V if self.output_biased else None

  def flops(self, length: int, positions: int, source: int = 0) -> float:
    """As `Transformer.flops`, of both stacks; `source`: tokens of the row of sources."""
    read_at = self._last_layer_positions(length, positions)
    encoder = stack.flops(self.encoder_options, source, source)
    return encoder + stack.flops(self.options, length, read_at, source)

  def _encoded(self, batch: Batch, train: bool) -> tuple[jax.Array, jax.Array]:
    """The sources' hidden states, [B, S, D], and their segments."""
    source = {k.removeprefix(SOURCE): x for k, x in batch.items() if k.startswith(SOURCE)}
    tokens_BS, segments_BS = read(source, 'tokens'), read(source, 'segments')
    length = tokens_BS.shape[1]
    check_length(length, self.max_len)
    if segments_BS is None:
      segments_BS = jnp.ones_like(tokens_BS)
    positions_BS = positions_of(source)
    context = LayerContext(
      segments_BT=segments_BS,
      positions_BT=positions_BS,
      bias_ND=self.encoder_bias(length) if self.positions == 'relative' else None,
      train=train,
    )
    x_BSD, _ = self.encoder(self.embedder(tokens_BS, positions_BS, None, train), context)
    if self.norm_order == 'pre':
      x_BSD = drop(self, self.encoder_norm(x_BSD), self.dropout, train)
    return x_BSD, segments_BS


def _filled(segments_BS: jax.Array, slots: int) -> jax.Array:
  return jnp.pad(segments_BS, [(0, 0), (0, slots - segments_BS.shape[1])])


def _slots(cache: Cache) -> int:
  """How many tokens of a row there is room for."""
  own = next(leaf for leaf in jax.tree.leaves(cache.layers, is_leaf=_keeps) if _keeps(leaf)).own
  return own.slots


def _keeps(part: object) -> bool:
  return isinstance(part, Crossing)


_T5 = dict(
  positions='relative',
  norm='rmsnorm',
  norm_order='pre',
  norm_bias=False,
  norm_eps=1e-6,
  bias=False,
  scaled=False,
  embedding_scaled=False,
  head_dim=64,
  attention_dropout=0.1,
)
_T5_1_1 = _T5 | dict(activation='gelu_tanh', gated=True, tied=False)
_BART = dict(
  positions='learned',
  position_offset=2,
  embedding_norm=True,
  embedding_scaled=False,
  activation='gelu',
  output_biased=True,
  max_len=1024,
)
VARIANTS = {
  # Norms first, as in mBART: the paper's own order needs far more text.
  'transformer_tiny': dict(
    dim=128,
    layers=3,
    heads=4,
    mlp_dim=512,
    norm_order='pre',
    positions='learned',
    position_offset=2,
    embedding_norm=True,
    dropout=0.0,
    attention_dropout=0.0,
  ),
  'transformer_base': dict(attention_dropout=0.0),
  't5_tiny': _T5_1_1
  | dict(dim=128, layers=3, heads=4, head_dim=32, mlp_dim=320, dropout=0.0, attention_dropout=0.0),
  't5_small': _T5 | dict(output_scaled=True),
  't5_base': _T5 | dict(dim=768, layers=12, heads=12, mlp_dim=3072, output_scaled=True),
  't5_large': _T5 | dict(dim=1024, layers=24, heads=16, mlp_dim=4096, output_scaled=True),
  't5_1_1_small': _T5_1_1 | dict(layers=8, heads=6, mlp_dim=1024),
  't5_1_1_base': _T5_1_1 | dict(dim=768, layers=12, heads=12, mlp_dim=2048),
  't5_1_1_large': _T5_1_1 | dict(dim=1024, layers=24, heads=16, mlp_dim=2816),
  'bart_base': _BART | dict(dim=768, heads=12, mlp_dim=3072),
  'bart_large': _BART | dict(dim=1024, layers=12, heads=16, mlp_dim=4096),
}
