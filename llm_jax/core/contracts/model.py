"""A model, what it returns, and a network as objectives see it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import flax.struct
import jax

from llm_jax.core.contracts.values import SOURCE, Batch, Metrics
from llm_jax.core.contracts.weights import WeightForm
from llm_jax.core.tree import PyTree

if TYPE_CHECKING:
  import flax.linen as nn


@flax.struct.dataclass
class Outputs:
  """What a model returns.

  Attributes:
    hidden: [B, P, D] in the compute type, at the positions asked for; [B, T, D] for all.
    aux_losses: (sum, weight) by name, each with a coefficient in the model's `terms`.
    intermediates: arrays by name (attention maps, say), where they were asked for.
    cache: what the next call continues from; None without a cache.
  """

  hidden: jax.Array
  aux_losses: Metrics = flax.struct.field(default_factory=dict)
  intermediates: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
  cache: PyTree = None


class Model:
  """A Linen module from a batch to hidden states: `class Model(contracts.Model, nn.Module)`.

  Its fields are the options of the config. Parameters say what they are (`core.params.boxed`);
  one that does not is replicated, and decayed if it is a matrix. Nothing outside a model names
  its parameters' paths.

  Attributes:
    inputs: the batch arrays that it reads.
    causal: whether a position sees no later one.
    vocab_size: V.
    max_len: the longest row.
    options: `nn.Options`, which heads are made from: sizes, types, initialisation.
    terms: coefficients of its `aux_losses` in the total loss.
  """

  inputs: ClassVar[tuple[str, ...]] = ('tokens', 'segments', 'positions')
  causal: ClassVar[bool] = False
  terms: ClassVar[Mapping[str, float]] = {}

  def __call__(
    self,
    batch: Batch,
    positions: jax.Array | None = None,
    *,
    train: bool = False,
    cache: PyTree = None,
  ) -> Outputs:
    """Hidden states, last norm included.

    Args:
      batch: has `inputs`, each [B, T]; one that is left out means one document per row.
      positions: [B, P] int32, the indices of each row whose states are wanted, in any order, any
        of them more than once; None for all.
      train: dropout is on, from the stream `dropout`.
      cache: of `empty_cache`, or as it was returned; models that generate only. A model whose
        `inputs` have `cached` reads rows piece by piece as well: the array says, at each token,
        how many of its row the cache holds before this piece.
    """
    raise NotImplementedError

  @classmethod
  def reads_source(cls) -> bool:
    """Whether it reads a second row beside the tokens."""
    return f'{SOURCE}tokens' in cls.inputs

  def table(self) -> jax.Array:
    """The projection on the vocabulary, [V, D]: logits are inner products with its rows."""
    raise ValueError(f'{type(self).__name__} has no projection on the vocabulary.')

  def table_bias(self) -> jax.Array | None:
    """What is added to the logits, [V]; None for nothing."""
    return None

  def projection(self) -> 'tuple[str, WeightForm] | None':
    """The weight form that stands in place of the projection on the vocabulary, and the einsum of
    its product: '...D,VD->...V', or '...D,DV->...V'; None where it is an array.
    """
    return None

  def empty_cache(self, rows: int, slots: int) -> PyTree:
    """What `cache` begins with, for `rows` rows of at most `slots` tokens. A model that reads a
    second row takes as a third argument the most tokens of that one.

    Axis 0 of every array is the row, so that rows of one cache can be put into another's; only
    the arrays of a `nn.stack.Stack` have their layers before it.
    """
    raise ValueError(f'{type(self).__name__} keeps no cache, so it cannot generate.')

  def flops(self, length: int, positions: int, source: int = 0) -> float:
    """FLOPs of the forward pass of one row of `length` tokens, its states read at `positions`, and
    of a second row of `source` tokens, where the model reads one.

    0 where a model does not say; utilization is then not reported.
    """
    del length, positions, source
    return 0.0


class Net(NamedTuple):
  """A network with its parameters, as objectives and predictors see it.

  Attributes:
    model: the bound model; `model.table()` is the projection on the vocabulary.
    heads: the bound heads by name.
    forward: (batch, positions) -> `Outputs`: a further pass through the model.
    train: whether it is training: dropout is on, and drawn anew in each pass.
    seen: what its layers passed on, by name, where the objective watches: `hidden` [L, B, T, D];
      `query`, `key` and `value` [L, B, T, N, H].
    objective: what the network learned; of another network than that of the objective that sees it.
  """

  model: Model
  heads: Mapping[str, 'nn.Module']
  forward: Callable[..., Outputs]
  train: bool = False
  seen: Mapping[str, jax.Array] = {}
  objective: Any = None
