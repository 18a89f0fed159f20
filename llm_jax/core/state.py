"""The state of a training run: everything that a step reads and writes besides the batch; and
parameters that a run starts from.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax

from llm_jax.core import params as params_lib
from llm_jax.core.tree import PyTree

# In `TrainState.extras`: averages of the trained parameters; what a method of `compress` carries.
AVERAGES, COMPRESSED = 'averages', 'compress'


@flax.struct.dataclass
class TrainState:
  """A pytree; a checkpoint holds it whole.

  Attributes:
    step: int32 scalar, optimizer steps taken.
    params: what is trained, nested by name, float32 arrays. Gradient and optimizer see these alone.
    frozen: the other parameters of the network, which no step changes.
    opt_state: the optimizer's state, of `params`.
    extras: arrays by name that adapters, averages and masks carry from step to step.
    rng: uint32 [2], the key from which each step folds its own; it never changes.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  rng: jax.Array
  frozen: PyTree = flax.struct.field(default_factory=dict)
  extras: PyTree = flax.struct.field(default_factory=dict)

  @property
  def network_params(self) -> Any:
    """All parameters of the network, trained or not."""
    return self._whole(self.params)

  @property
  def answering_params(self) -> Any:
    """Those that evaluations and predictions use: in place of the trained ones their averages over
    the steps, where the run keeps these.
    """
    return self._whole(self.extras.get(AVERAGES, self.params))

  def _whole(self, trained: PyTree) -> Any:
    return params_lib.merge(trained, self.frozen) if self.frozen else trained


class Loaded(NamedTuple):
  """Parameters of another run, or of a Hugging Face folder.

  Attributes:
    params: those that are wanted and were found, by path.
    new: paths of those that are wanted and were not found.
    unused: what was found and is not wanted: paths, or names of a folder's tensors.
    step: the other run's step; None where the parameters are of no run.
    values: the numbers of the validation set with which a run saved them; None where there are
      none.
    base: what a run says of parameters that it does not hold itself (`programs.bases`); None where
      it holds all.
  """

  params: dict[str, jax.Array]
  new: Sequence[str]
  unused: Sequence[str]
  step: int | None
  values: Mapping[str, float] | None = None
  base: Mapping[str, Any] | None = None
