"""Bidirectional Transformer encoder: BERT (arXiv:1810.04805), RoBERTa (1907.11692), ModernBERT
(2412.13663), by options.

Parameters: `embedder`, `stack/first` (ModernBERT's first layer), `stack/layers/block*` (stacked),
`final_norm` where norms come first, `output` where the vocabulary projection is not tied.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.nn import layers as L


class Model(nn.Module):
  """Tokens to hidden states.

  Attributes (the rest as in `layers.Options` and `layers.Stack`):
    vocab_size: V.
    max_len: longest row; rows of the position table, if there is one.
    positions: 'learned' or 'rope'.
    position_offset: rows of the position table left free before position 0 (RoBERTa: 2).
    rope_theta: base of the rotations of layers that see everywhere.
    rope_local_theta: base of those with a window.
    token_types: kinds of text in a pair that are told apart by an embedding; 0 for no such
      embedding.
    embedding_norm: a norm on the embeddings; layer 0 of a pre-norm stack then has none before its
      attention.
    window: how far local layers see, half to either side; None where there are none.
    global_every: one layer in so many sees everywhere, layer 0 first.
    tied: logits use the token table; otherwise a matrix of their own.
    remat: what backpropagation keeps, one of `layers.REMAT`, or 'auto'.
    unroll: layer groups a turn of the compiled loop; 0 for all.
  """

  vocab_size: int
  dim: int = 768
  layers: int = 12
  heads: int = 12
  kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int = 3072
  max_len: int = 512
  positions: str = 'learned'
  position_offset: int = 0
  rope_theta: float = 10000.0
  rope_local_theta: float = 10000.0
  token_types: int = 2
  embedding_norm: bool = True
  norm: str = 'layernorm'
  norm_order: str = 'post'
  norm_bias: bool = True
  norm_eps: float = 1e-12
  bias: bool = True
  qkv_bias: bool | None = None
  qk_norm: bool = False
  activation: str = 'gelu'
  gated: bool = False
  window: int | None = None
  global_every: int = 1
  tied: bool = True
  dropout: float = 0.1
  attention_dropout: float = 0.1
  init_distribution: str = 'truncated_normal'
  init_std: float = 0.02
  depth_scaled_init: bool = False
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  attention: str = 'auto'
  remat: str = 'none'
  unroll: int = 1

  causal = False

  def __post_init__(self):
    super().__post_init__()
    L.check_model(self)
    for name in ('position_offset', 'token_types'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 0.')
    L.check_pattern(self.layers, self.window, self.global_every, self.first_bare)

  @property
  def options(self) -> L.Options:
    """What all layers share; heads are made from it too."""
    return L.Options(
      **{field.name: getattr(self, field.name) for field in dataclasses.fields(L.Options)}
    )

  @property
  def first_bare(self) -> bool:
    """Whether layer 0 has no norm before its attention."""
    return self.embedding_norm and self.norm_order == 'pre'

  def setup(self):
    self.embedder = L.Embedder(
      self.vocab_size,
      self.options,
      positions=self.max_len + self.position_offset if self.positions == 'learned' else 0,
      position_offset=self.position_offset,
      token_types=self.token_types,
      norm=self.embedding_norm,
    )
    self.stack = L.Stack(
      self.options,
      window=self.window,
      global_every=self.global_every,
      first_bare=self.first_bare,
      remat=self.remat,
      unroll=self.unroll,
    )
    if self.norm_order == 'pre':
      self.final_norm = L.Norm(self.options)
    if not self.tied:
      self.output = L.Output(self.vocab_size, self.options)

  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    token_types_BT: jax.Array | None = None,
    places_BP: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Hidden states [B, T, D], or [B, P, D], in the compute type, last norm included.

    Args:
      tokens_BT: ids.
      segments_BT: document of each token, 0 for padding; a token sees only its own document. None:
        one document a row.
      positions_BT: place of each token in its document; None: its place in the row.
      token_types_BT: 0 or 1, first or second text; None: all first.
      places_BP: places of each row whose states are wanted; None for all.
      train: dropout is on, from the stream `dropout`.

    Raises:
      ValueError: a row longer than `max_len`.
    """
    L.check_length(tokens_BT.shape[1], self.max_len)
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    turns = (None, None)
    if self.positions == 'rope':
      turns = tuple(
        L.rope(positions_BT, L.rope_frequencies(self.options.head_dim, theta), self.options.wide)
        for theta in (self.rope_theta, self.rope_local_theta)
      )
    x_BTD = self.embedder(tokens_BT, positions_BT, token_types_BT, train)
    x_BTD = self.stack(x_BTD, segments_BT, turns, train, places_BP=places_BP)
    return self.final_norm(x_BTD) if self.norm_order == 'pre' else x_BTD

  def table(self) -> jax.Array:
    """The projection on the vocabulary, [V, D]: logits are inner products with its rows
    (`vocabulary.cross_entropy`).
    """
    return self.embedder.token.embedding if self.tied else self.output.kernel.T

  def logits(self, x_BMD: jax.Array) -> jax.Array:
    """Projection on the vocabulary, [B, M, V], at least float32, all at once; the losses go through
    it in chunks.
    """
    return jnp.einsum(
      '...D,VD->...V',
      x_BMD,
      self.table().astype(x_BMD.dtype),
      preferred_element_type=self.options.wide,
    )


VARIANTS = {
  # Norms first and rotary positions, as in ModernBERT: BERT's own order needs far more text before
  # it beats a unigram model.
  'bert_tiny': dict(
    dim=128,
    layers=4,
    heads=2,
    mlp_dim=512,
    positions='rope',
    norm_order='pre',
    embedding_norm=False,
    token_types=0,
    dropout=0.0,
    attention_dropout=0.0,
  ),
  'bert_base': dict(),
  'bert_large': dict(dim=1024, layers=24, heads=16, mlp_dim=4096),
  'roberta_base': dict(position_offset=2, token_types=1, norm_eps=1e-5),
  'modernbert_base': dict(
    layers=22,
    mlp_dim=1152,
    max_len=8192,
    positions='rope',
    rope_theta=160000.0,
    rope_local_theta=10000.0,
    token_types=0,
    norm_order='pre',
    norm_bias=False,
    norm_eps=1e-5,
    bias=False,
    gated=True,
    window=128,
    global_every=3,
    dropout=0.0,
    attention_dropout=0.0,
    depth_scaled_init=True,
  ),
}
