"""Causal Transformer decoder: GPT-2 (Radford et al., 2019), LLaMA 2 (arXiv:2307.09288) and 3
(2407.21783), by options.

Parameters: `embedder`, `stack/layers/block` (stacked), `final_norm` where norms come first,
`output` where the vocabulary projection is not tied.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.contracts import Batch, Outputs
from llm_jax.models._transformer import Transformer, begun, check_cache_dtype, followed, read
from llm_jax.nn import rotary, stack
from llm_jax.nn.attention import cache as caches
from llm_jax.nn.block import LayerContext
from llm_jax.nn.options import check_length, check_positive


class Cache(NamedTuple):
  """What is kept of rows that grow: the tokens of each so far, [B], and the keys and values that
  each layer has of them.
  """

  lengths_B: jax.Array
  layers: stack.Caches


class Model(Transformer):
  """Tokens to hidden states; no position sees a later one.

  Fields of its own, beside those of `Transformer`:

  Attributes:
    position_std: standard deviation of the position table at initialisation (0.01 in GPT-2's code).
    rope_scaling: None, (factor,), or LLaMA 3's (factor, low, high, original length), as in
      `nn.rotary.frequencies`.
    window: how many positions each layer sees, its own among them (Mistral, arXiv:2310.06825).
    cache_dtype: of the keys and values that generation keeps; 'int8': in 8 bits, with a scale for
      each token of each head. None: the compute type.
  """

  inputs: ClassVar[tuple[str, ...]] = ('tokens', 'segments', 'positions', 'cached')
  causal: ClassVar[bool] = True

  max_len: int = 1024
  position_std: float = 0.01
  rope_scaling: tuple[float, ...] | None = None
  cache_dtype: str | None = None
  activation: str = 'gelu_tanh'
  init_distribution: str = 'normal'
  depth_scaled_init: bool = True

  def __post_init__(self):
    super().__post_init__()
    check_cache_dtype(self.cache_dtype)
    if self.window is not None:
      check_positive('window', self.window)
    if self.rope_scaling is not None:
      if self.positions != 'rope':
        raise ValueError(f"rope_scaling needs positions='rope'; it is {self.positions!r}.")
      rotary.frequencies(self.options.head_dim, self.rope_theta, self.rope_scaling)

  def setup(self):
    self.embedder = self._embedder(position_std=self.position_std)
    self.stack = self._stack(global_every=1 if self.window is None else 0)
    self._setup_ends()

  def __call__(
    self,
    batch: Batch,
    positions: jax.Array | None = None,
    *,
    train: bool = False,
    cache: Cache | None = None,
  ) -> Outputs:
    """Hidden states, last norm included, in the compute type.

    Args:
      batch: `tokens`, and where it has them `segments` (0 for padding; a token sees only its own
        document), `positions`, and `prefix` (1 for tokens that all of their document see).
      positions: indices of each row whose states are wanted, [B, P], without a cache; None for all.
      train: dropout is on, from the stream `dropout`.
      cache: of `empty_cache`, or as it was returned. One token per row (T = 1) follows those in it.
        More are the first of their rows, whatever the cache held, unless `cached` says how many of
        each row it holds: then they follow these. Where segments are 0 they are padding, after all
        others, and stay out of it.

    Raises:
      ValueError: a row longer than `max_len`.
    """
    tokens_BT = read(batch, 'tokens')
    check_length(tokens_BT.shape[1] + self.before(), self.max_len)
    context = self._context(batch, positions, train, cache)
    x_BTD = self.embedder(tokens_BT, context.positions_BT, None, train)
    x_BTD, layers = self.stack(x_BTD, context, cache and cache.layers)
    x_BTD = self.final_norm(x_BTD) if self.norm_order == 'pre' else x_BTD
    return Outputs(x_BTD, cache=cache and Cache(context.lengths_B, layers))

  def empty_cache(self, rows: int, slots: int) -> Cache:
    """A cache for `rows` rows of at most `slots` tokens, in the compute type; layers with a window
    keep no more than that.
    """
    options = self.options
    kept = min(slots, self.window or slots)
    shape = self.layers, rows, options.kv_heads or options.heads, kept, options.head_dim
    kept = caches.empty(shape, self.cache_dtype or options.compute_dtype)
    return Cache(jnp.zeros(rows, jnp.int32), {'layers': (kept,)})

  def _context(
    self, batch: Batch, read_BP: jax.Array | None, train: bool, cache: Cache | None
  ) -> LayerContext:
    begun_B = None
    if cache is not None and 'cached' in batch:
      segments_BT, positions_BT, lengths_B, begun_B = followed(batch)
    else:
      segments_BT, positions_BT, lengths_B = begun(batch, cache)
    positions_BT += self.before()
    return LayerContext(
      segments_BT=segments_BT,
      positions_BT=positions_BT,
      open_BT=read(batch, 'prefix'),
      rotations=self._rotations(positions_BT),
      lengths_B=lengths_B,
      begun_B=begun_B,
      read_BP=read_BP,
      train=train,
    )

  def _rotations(self, positions_BT: jax.Array) -> tuple[rotary.Rotation, rotary.Rotation] | None:
    if self.positions != 'rope':
      return None
    options = self.options
    frequencies = rotary.frequencies(options.head_dim, self.rope_theta, self.rope_scaling)
    rotation = rotary.rotation(positions_BT, frequencies, options.accumulation_dtype)
    return rotation, rotation


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
