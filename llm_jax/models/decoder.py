"""Causal Transformer decoder: GPT-2 (Radford et al., 2019), LLaMA 2 (arXiv:2307.09288) and 3
(2407.21783), by options.

Parameters: `embedder`, `stack/layers/block` (stacked), `final_norm` where norms come first,
`output` where the vocabulary projection is not tied.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.nn import layers as L
from llm_jax.nn.attention.dispatch import KeyValues


class Cache(NamedTuple):
  """What is kept of rows that grow: the tokens of each so far, [B], and the keys and values that
  each layer has of them.
  """

  lengths_B: jax.Array
  layers: Any


class Model(nn.Module):
  """Tokens to hidden states; no place sees a later one.

  Attributes (the rest as in `layers.Options` and `layers.Stack`):
    vocab_size: V.
    max_len: longest row; rows of the position table, if there is one.
    positions: 'learned' or 'rope'.
    position_std: standard deviation of the position table at initialisation (0.01 in GPT-2's code).
    rope_theta: base of the rotations.
    rope_scaling: None, (factor,), or LLaMA 3's (factor, low, high, original length), as in
      `layers.rope_frequencies`.
    window: how many places each layer sees, its own among them (Mistral, arXiv:2310.06825); None
      for all.
    tied: logits use the token table; otherwise a matrix of their own.
    remat: what backpropagation keeps, one of `layers.REMAT`, or 'auto'.
    unroll: layers a turn of the compiled loop; 0 for all.
  """

  vocab_size: int
  dim: int = 768
  layers: int = 12
  heads: int = 12
  kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int = 3072
  max_len: int = 1024
  positions: str = 'learned'
  position_std: float = 0.01
  rope_theta: float = 10000.0
  rope_scaling: tuple[float, ...] | None = None
  window: int | None = None
  norm: str = 'layernorm'
  norm_order: str = 'pre'
  norm_bias: bool = True
  norm_eps: float = 1e-5
  bias: bool = True
  qkv_bias: bool | None = None
  qk_norm: bool = False
  activation: str = 'gelu_tanh'
  gated: bool = False
  tied: bool = True
  dropout: float = 0.1
  attention_dropout: float = 0.1
  init_distribution: str = 'normal'
  init_std: float = 0.02
  depth_scaled_init: bool = True
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  attention: str = 'auto'
  remat: str = 'none'
  unroll: int = 1

  causal = True

  def __post_init__(self):
    super().__post_init__()
    L.check_model(self)
    if self.window is not None:
      L.check_positive('window', self.window)
    if self.rope_scaling is not None:
      if self.positions != 'rope':
        raise ValueError(f"rope_scaling needs positions='rope'; it is {self.positions!r}.")
      L.rope_frequencies(self.options.head_dim, self.rope_theta, self.rope_scaling)

  @property
  def options(self) -> L.Options:
    """What all layers share; heads are made from it too."""
    return L.Options(
      **{field.name: getattr(self, field.name) for field in dataclasses.fields(L.Options)}
    )

  def setup(self):
    self.embedder = L.Embedder(
      self.vocab_size,
      self.options,
      positions=self.max_len if self.positions == 'learned' else 0,
      position_std=self.position_std,
    )
    self.stack = L.Stack(
      self.options,
      window=self.window,
      global_every=1 if self.window is None else 0,
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
    cache: Cache | None = None,
  ) -> Any:
    """Hidden states [B, T, D], or [B, P, D], in the compute type, last norm included; with a cache
    also the cache after them.

    Args:
      tokens_BT: ids.
      segments_BT: document of each token, 0 for padding; a token sees only its own document. None:
        one document a row.
      positions_BT: place of each token in its document; None: its place in the row.
      token_types_BT: which text of a pair; decoders have no embedding for it, the separators tell.
      places_BP: places of each row whose states are wanted, without a cache; None for all.
      train: dropout is on, from the stream `dropout`.
      cache: of `empty_cache`, or as it was returned. One token a row (T = 1) follows those in it.
        More are the first of their rows, whatever the cache held: where segments are 0 they are
        padding, after all others, and stay out of it.

    Raises:
      ValueError: a row longer than `max_len`.
    """
    del token_types_BT
    L.check_length(tokens_BT.shape[1], self.max_len)
    lengths_B = None
    if cache is not None and tokens_BT.shape[1] == 1:
      lengths_B, positions_BT, segments_BT = cache.lengths_B + 1, cache.lengths_B[:, None], None
    elif cache is not None:
      real_BT = jnp.ones_like(tokens_BT) if segments_BT is None else jnp.int32(segments_BT > 0)
      lengths_B = jnp.sum(real_BT, axis=1, dtype=jnp.int32)
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    turn = None
    if self.positions == 'rope':
      frequencies = L.rope_frequencies(self.options.head_dim, self.rope_theta, self.rope_scaling)
      turn = L.rope(positions_BT, frequencies, self.options.wide)
    x_BTD = self.embedder(tokens_BT, positions_BT, None, train)
    x_BTD = self.stack(
      x_BTD, segments_BT, (turn, turn), train, cache and cache.layers, lengths_B, places_BP
    )
    x_BTD, layers = (x_BTD, None) if cache is None else x_BTD
    x_BTD = self.final_norm(x_BTD) if self.norm_order == 'pre' else x_BTD
    return x_BTD if cache is None else (x_BTD, Cache(lengths_B, layers))

  def empty_cache(self, rows: int, slots: int) -> Cache:
    """A cache for `rows` rows of at most `slots` tokens, in the compute type; layers with a window
    keep no more than that.
    """
    options, S = self.options, min(slots, self.window or slots)
    shape = (self.layers, rows, options.kv_heads or options.heads, S, options.head_dim)
    zeros = lambda: jnp.zeros(shape, L.DTYPES[self.dtype])
    return Cache(jnp.zeros(rows, jnp.int32), {'layers': (KeyValues(zeros(), zeros()),)})

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


_LLAMA = dict(
  positions='rope',
  norm='rmsnorm',
  norm_bias=False,
  norm_eps=1e-5,
  bias=False,
  activation='silu',
  gated=True,
  dropout=0.0,
  attention_dropout=0.0,
  depth_scaled_init=False,
)
VARIANTS = {
  'gpt_tiny': dict(
    dim=128, layers=4, heads=2, mlp_dim=512, positions='rope', dropout=0.0, attention_dropout=0.0
  ),
  'gpt2_small': dict(),
  'gpt2_medium': dict(dim=1024, layers=24, heads=16, mlp_dim=4096),
  'gpt2_large': dict(dim=1280, layers=36, heads=20, mlp_dim=5120),
  'gpt2_xl': dict(dim=1600, layers=48, heads=25, mlp_dim=6400),
  'llama_tiny': _LLAMA | dict(dim=128, layers=4, heads=4, kv_heads=2, mlp_dim=344),
  'llama_3_2_1b': _LLAMA
  | dict(
    dim=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    mlp_dim=8192,
    max_len=131072,
    rope_theta=500000.0,
    rope_scaling=(32.0, 1.0, 4.0, 8192.0),
  ),
  'llama_2_7b': _LLAMA
  | dict(dim=4096, layers=32, heads=32, mlp_dim=11008, max_len=4096, tied=False),
}
