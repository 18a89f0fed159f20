"""Bidirectional Transformer encoder: BERT (arXiv:1810.04805), RoBERTa (1907.11692), ModernBERT
(2412.13663), by options.

Parameters: `embedder`, `stack/first` (ModernBERT's first layer), `stack/layers/block*` (stacked),
`final_norm` where norms come first, `output` where the vocabulary projection is not tied.
"""

from typing import ClassVar

import jax

from llm_jax.core.contracts import Batch, Outputs
from llm_jax.core.tree import PyTree
from llm_jax.models._transformer import Transformer, positions_of, read
from llm_jax.nn import rotary
from llm_jax.nn.block import LayerContext
from llm_jax.nn.options import check_length
from llm_jax.nn.stack import check_pattern


class Model(Transformer):
  """Tokens to hidden states.

  Fields of its own, beside those of `Transformer`:

  Attributes:
    position_offset: rows of the position table left free before position 0 (RoBERTa: 2).
    rope_theta: base of the rotations of layers that see everywhere.
    rope_local_theta: base of those with a window.
    token_types: kinds of text in a pair that an embedding tells from each other; 0 for no such
      embedding.
    embedding_norm: a norm on the embeddings; layer 0 of a pre-norm stack then has none before its
      attention.
    window: how far local layers see, half to either side; None where there are none.
    global_every: one layer in so many sees everywhere, layer 0 first.
  """

  inputs: ClassVar[tuple[str, ...]] = ('tokens', 'segments', 'positions', 'token_types')

  position_offset: int = 0
  rope_local_theta: float = 10000.0
  token_types: int = 2
  embedding_norm: bool = True
  norm_order: str = 'post'
  norm_eps: float = 1e-12
  global_every: int = 1

  def __post_init__(self):
    super().__post_init__()
    for name in ('position_offset', 'token_types'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 0.')
    check_pattern(self.layers, self.window, self.global_every, self.first_bare)

  @property
  def first_bare(self) -> bool:
    """Whether layer 0 has no norm before its attention."""
    return self.embedding_norm and self.norm_order == 'pre'

  def setup(self):
    self.embedder = self._embedder(
      position_offset=self.position_offset,
      token_types=self.token_types,
      norm=self.embedding_norm,
    )
    self.stack = self._stack(global_every=self.global_every, first_bare=self.first_bare)
    self._setup_ends()

  def __call__(
    self,
    batch: Batch,
    positions: jax.Array | None = None,
    *,
    train: bool = False,
    cache: PyTree = None,
  ) -> Outputs:
    """Hidden states, last norm included, in the compute type.

    Args:
      batch: `tokens`, and where it has them `segments` (0 for padding; a token sees only its own
        document), `positions`, and `token_types` (0 or 1, first or second text).
      positions: indices of each row whose states are wanted, [B, P]; None for all.
      train: dropout is on, from the stream `dropout`.
      cache: None: an encoder sees whole rows.

    Raises:
      ValueError: a row longer than `max_len`, or a cache.
    """
    if cache is not None:
      raise ValueError('an encoder keeps no cache; generation needs a decoder.')
    tokens_BT, token_types_BT = read(batch, 'tokens'), read(batch, 'token_types')
    check_length(tokens_BT.shape[1] + self.before(), self.max_len)
    positions_BT = positions_of(batch) + self.before()
    context = LayerContext(
      segments_BT=read(batch, 'segments'),
      positions_BT=positions_BT,
      rotations=self._rotations(positions_BT),
      read_BP=positions,
      train=train,
    )
    x_BTD = self.embedder(tokens_BT, positions_BT, token_types_BT, train)
    x_BTD, _ = self.stack(x_BTD, context)
    return Outputs(self.final_norm(x_BTD) if self.norm_order == 'pre' else x_BTD)

  def flops(self, length: int, positions: int, source: int = 0) -> float:
    """As `Transformer.flops`; a layer that stands by itself always runs whole."""
    return super().flops(length, length if self.layers == self.first_bare else positions)

  def _rotations(self, positions_BT: jax.Array) -> tuple[rotary.Rotation, rotary.Rotation] | None:
    if self.positions != 'rope':
      return None
    options = self.options
    everywhere, local = (
      rotary.rotation(
        positions_BT, rotary.frequencies(options.head_dim, theta), options.accumulation_dtype
      )
      for theta in (self.rope_theta, self.rope_local_theta)
    )
    return everywhere, local


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
