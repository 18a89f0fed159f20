"""The state of a training run: everything that a step reads and writes besides the batch, and all
that a checkpoint must hold.
"""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
  """A pytree.

  Attributes:
    step: int32 scalar, optimizer steps taken.
    params: parameters that the gradient is taken over, float32 arrays.
    opt_state: the optimizer's state.
    rng: uint32 [2], the key from which each step folds its own; it never changes.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  rng: jax.Array
