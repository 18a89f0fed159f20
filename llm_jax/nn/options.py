"""What all layers of a model share, and the words that the config may use for it.

Shapes stand in names, one letter per dimension, here and in the rest of `llm_jax.nn`:

    B rows of a batch          N query heads            L layers
    T positions of a row       K key and value heads    M masked positions
    S positions of the keys    H head dimension         C classes
    P positions that are read  F mlp dimension          R adapter rank
    D model dimension          G query heads per key head, N = K G
    V vocabulary
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from llm_jax.core.plugins import nearest
from llm_jax.nn.attention.dispatch import IMPLEMENTATIONS

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


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class Options:
  """What all layers of a model share, heads included. Never changed after it is made.

  Values are checked here, so that a wrong one never reaches a compiler. A head of a model that is
  not of this package takes `Options(dim=64)`.

  Attributes:
    dim: D.
    layers: L.
    heads: N.
    kv_heads: K; divides `heads`. None: as many as `heads`.
    head_dim: H. None: D / N, and N must divide D.
    mlp_dim: F. None: 4 D.
    causal: whether a token sees no later one.
    norm: 'layernorm' (arXiv:1607.06450) or 'rmsnorm' (arXiv:1910.07467).
    norm_order: 'post' normalises sums (the first Transformer, BERT); 'pre' each layer's input, and
      the last output.
    norm_bias: a bias in every norm ('layernorm' only).
    norm_eps: added to the variance.
    bias: a bias in every linear layer.
    qkv_bias: a bias in the projections to queries, keys and values (Qwen2). None: as `bias`.
    qk_norm: queries and keys are normalised, each head by itself, before they are rotated (Qwen3;
      arXiv:2302.05442, section 2).
    activation: one of `ACTIVATIONS`.
    gated: the mlp is activation(x W_gate) * (x W_up) (GeGLU, SwiGLU; arXiv:2002.05202).
    scaled: scores are divided by the square root of H; T5 leaves it out (arXiv:1910.10683).
    crosses: each layer reads a second row, the memory, between attention and mlp.
    dropout: rate on the embeddings and on what each sublayer adds.
    attention_dropout: rate on the attention probabilities.
    init_distribution: distribution of every kernel and embedding, one of `INITIALIZERS`; truncated
      at two `init_std`.
    init_std: its standard deviation (before truncation).
    depth_scaled_init: kernels that add to the residual stream start smaller by sqrt(2 L) (GPT-2).
    dtype: what activations are computed in; softmax, norms and logits in at least float32.
    param_dtype: what parameters are kept in.
    attention: which implementation, one of `attention.dispatch.IMPLEMENTATIONS`.

  Raises:
    ValueError: a value that is not allowed, with the nearest that is.
  """

  dim: int
  layers: int = 1
  heads: int = 1
  kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int | None = None
  causal: bool = False
  norm: str = 'layernorm'
  norm_order: str = 'pre'
  norm_bias: bool = True
  norm_eps: float = 1e-5
  bias: bool = True
  qkv_bias: bool | None = None
  qk_norm: bool = False
  activation: str = 'gelu'
  gated: bool = False
  scaled: bool = True
  crosses: bool = False
  dropout: float = 0.0
  attention_dropout: float = 0.0
  init_distribution: str = 'truncated_normal'
  init_std: float = 0.02
  depth_scaled_init: bool = False
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  attention: str = 'auto'

  def __post_init__(self):
    if self.mlp_dim is None:
      self.mlp_dim = 4 * self.dim
    for name in ('dim', 'layers', 'heads', 'mlp_dim'):
      check_positive(name, getattr(self, name))
    self._check_names()
    for name in ('dropout', 'attention_dropout'):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 0 and below 1.')
    self._fill_in_head_dim()
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

  def _check_names(self) -> None:
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

  def _fill_in_head_dim(self) -> None:
    if self.head_dim is None:
      if self.dim % self.heads:
        raise ValueError(
          f'heads={self.heads} must divide dim={self.dim}; '
          f'try heads={_divisor(self.dim, self.heads)}, or give head_dim.'
        )
      self.head_dim = self.dim // self.heads
    check_positive('head_dim', self.head_dim)

  @property
  def compute_dtype(self) -> jnp.dtype:
    """`dtype` as JAX has it."""
    return jnp.dtype(DTYPES[self.dtype])

  @property
  def accumulation_dtype(self) -> jnp.dtype:
    """The type of softmax, norms and logits: `dtype`, but at least float32."""
    return jnp.promote_types(DTYPES[self.dtype], jnp.float32)

  @property
  def residual_std(self) -> float:
    """Standard deviation at initialisation of kernels that add to the residual stream."""
    return self.init_std / math.sqrt(2 * self.layers) if self.depth_scaled_init else self.init_std


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


def _divisor(of: int, near: int) -> int:
  """The divisor of `of` that is nearest to `near`."""
  return min((n for n in range(1, of + 1) if of % n == 0), key=lambda n: abs(n - near))
