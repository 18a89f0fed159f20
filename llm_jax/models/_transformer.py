"""What encoders and decoders share: the fields, the layers around the stack, the vocabulary."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import contracts, params
from llm_jax.core.contracts import Batch
from llm_jax.nn import rotary, stack
from llm_jax.nn.embedder import Embedder
from llm_jax.nn.linear import Norm, Output
from llm_jax.nn.options import DTYPES, Options, check_known, check_positive
from llm_jax.parallel.sharding import constrain


class Transformer(contracts.Model, nn.Module, Options):
  """A stack of layers between an embedder and, where norms come first, a last norm.

  Its fields are those of `nn.options.Options`, which its layers share, and these:

  Attributes:
    vocab_size: V.
    max_len: longest row; rows of the position table, if there is one.
    positions: 'learned' or 'rope'.
    rope_theta: base of the rotations.
    window: how far layers see that do not see everywhere; None where all do.
    tied: logits use the token table; otherwise a matrix of their own.
    remat: what backpropagation keeps, one of `nn.stack.REMAT`, or 'auto'.
    unroll: layer groups per iteration of the compiled loop; 0 for all, without a loop.
  """

  causal: ClassVar[bool] = False
  crosses: ClassVar[bool] = False
  known_positions: ClassVar[tuple[str, ...]] = ('learned', 'rope')

  _: dataclasses.KW_ONLY
  vocab_size: int
  dim: int = 768
  layers: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  max_len: int = 512
  positions: str = 'learned'
  rope_theta: float = 10000.0
  window: int | None = None
  tied: bool = True
  dropout: float = 0.1
  attention_dropout: float = 0.1
  remat: str = 'none'
  unroll: int = 1

  def __post_init__(self):
    super().__post_init__()
    options = self.options
    for name in ('vocab_size', 'max_len'):
      check_positive(name, getattr(self, name))
    check_known('positions', self.positions, self.known_positions)
    check_known('remat', self.remat, (*stack.REMAT, 'auto'))
    if self.unroll < 0:
      raise ValueError(f'unroll={self.unroll} must be at least 1, or 0 for all layers.')
    if self.positions == 'rope':
      rotary.frequencies(options.head_dim, self.rope_theta)

  @property
  def options(self) -> Options:
    """What all layers share; heads are made from it too."""
    return self._options()

  def table(self) -> jax.Array:
    """The projection on the vocabulary, [V, D]; see `vocabulary.cross_entropy`."""
    weight = self.embedder.token.embedding if self.tied else self.output.kernel
    if params.is_form(weight):
      weight = weight.dense(self.options.compute_dtype)
    return weight if self.tied else weight.T

  def projection(self) -> tuple[str, contracts.WeightForm] | None:
    """See the contract."""
    weight = self.embedder.token.embedding if self.tied else self.output.kernel
    if not params.is_form(weight):
      return None
    return '...D,VD->...V' if self.tied else '...D,DV->...V', weight

  def logits(self, x_BMD: jax.Array) -> jax.Array:
    """Projection on the vocabulary, [B, M, V], at least float32, all at once; the losses go through
    it in chunks.
    """
    dtype, projection = self.options.accumulation_dtype, self.projection()
    if projection is not None:
      spec, form = projection
      return form.product(spec, x_BMD, x_BMD.dtype, dtype)
    table_VD = self.table().astype(x_BMD.dtype)
    return jnp.einsum('...D,VD->...V', x_BMD, table_VD, preferred_element_type=dtype)

  def table_bias(self) -> jax.Array | None:
    """What is added to the logits: nothing."""
    return None

  def flops(self, length: int, positions: int, source: int = 0) -> float:
    """FLOPs of the forward pass of one row of `length` tokens, its states read at `positions`.

    The products of the layers alone (`nn.stack.flops`); where the last layer runs only at the
    positions that are read depends on the layout in force.
    """
    del source
    return stack.flops(self.options, length, self._last_layer_positions(length, positions))

  def before(self) -> int:
    """How many positions are taken before each document; an adapter may stand around this."""
    return 0

  @nn.nowrap
  def _options(self, **others) -> Options:
    names = [field.name for field in dataclasses.fields(Options)]
    return Options(**{name: getattr(self, name) for name in names} | others)

  @nn.nowrap
  def _last_layer_positions(self, length: int, positions: int) -> int:
    reads = stack.reads_in_last_layer(self.unroll, length, positions)
    return positions if reads else length

  @nn.nowrap
  def _embedder(self, **options) -> Embedder:
    """The embedder; a table of positions has `max_len` rows beside those left free."""
    rows = self.max_len + options.get('position_offset', 0)
    learned = rows if self.positions == 'learned' else 0
    return Embedder(self.vocab_size, self.options, positions=learned, **options)

  @nn.nowrap
  def _stack(self, **options) -> stack.Stack:
    return stack.Stack(
      self.options, window=self.window, remat=self.remat, unroll=self.unroll, **options
    )

  @nn.nowrap
  def _setup_ends(self) -> None:
    """The last norm, and a projection on the vocabulary of its own: called by `setup`."""
    if self.norm_order == 'pre':
      self.final_norm = Norm(self.options)
    if not self.tied:
      self.output = Output(self.vocab_size, self.options)


def check_cache_dtype(name: str | None) -> None:
  """Raises ValueError unless a cache may be kept in this type."""
  if name is not None:
    check_known('cache_dtype', name, (*DTYPES, 'int8'))


def read(batch: Batch, name: str) -> jax.Array | None:
  """An array [B, T] of a batch, laid out as the rows are; None where the batch has none."""
  return constrain(batch[name], 'batch', 'length') if name in batch else None


def begun(batch: Batch, cache: Any) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
  """Segments and positions of the tokens of a decoder, and how many each row has with them.

  Args:
    batch: as a decoder gets it.
    cache: has `lengths_B`; None where rows are whole, and then the lengths are None.
  """
  segments_BT = read(batch, 'segments')
  if cache is None:
    return segments_BT, positions_of(batch), None
  if batch['tokens'].shape[1] == 1:
    # The cache holds the tokens of one document, and says where this one stands in it.
    return None, cache.lengths_B[:, None], cache.lengths_B + 1
  real_BT = jnp.ones_like(batch['tokens']) if segments_BT is None else segments_BT > 0
  return segments_BT, positions_of(batch), jnp.sum(real_BT, axis=1, dtype=jnp.int32)


def followed(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Segments and positions of tokens that follow those in a cache, how many each row has with them,
  and how many it had before.
  """
  segments_BT, begun_B = read(batch, 'segments'), batch['cached'][:, 0]
  real_BT = jnp.ones_like(batch['tokens']) if segments_BT is None else segments_BT > 0
  positions_BT = begun_B[:, None] + jnp.arange(real_BT.shape[1])
  lengths_B = begun_B + jnp.sum(real_BT, axis=1, dtype=jnp.int32)
  # Padding may be past the last position that there is.
  return segments_BT, jnp.where(real_BT > 0, positions_BT, 0), lengths_B, begun_B


def positions_of(batch: Batch) -> jax.Array:
  """The position of each token in its document, [B, T]; in its row where the batch has none."""
  positions_BT = read(batch, 'positions')
  if positions_BT is not None:
    return positions_BT
  shape = batch['tokens'].shape
  return jnp.broadcast_to(jnp.arange(shape[1]), shape)
