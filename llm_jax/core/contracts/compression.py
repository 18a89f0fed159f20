"""What makes a model smaller."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import numpy as np

from llm_jax.core.contracts.data import Tokenizer
from llm_jax.core.contracts.weights import Scheme
from llm_jax.core.tree import PyTree

if TYPE_CHECKING:
  from llm_jax.core.params import Info

ACTIVATIONS, GRADIENTS, IDS = 'activations', 'gradients', 'ids'


@flax.struct.dataclass
class Seen:
  """What a model did with texts, for methods that look at it (`Compression.looks_at`).

  Attributes:
    activations: of each kernel of a linear map, by path: `square`, the mean square of each of its
      inputs, in their shape, `most`, the largest absolute value of all of them, and `error`, by how
      much what the form gives differs from what the kernel does, as a share of the latter's size;
      stacked as the kernels are.
    gradients: of each parameter, by path, |w dL/dw| of a batch added up over all axes but those of
      heads and channels, on average over the batches: how much the loss changes where they are left
      out, in first order (arXiv:1905.10650, equation 2).
    counts: int64 [V], how often each id stands in the texts.
  """

  activations: Mapping[str, Mapping[str, jax.Array]] = flax.struct.field(default_factory=dict)
  gradients: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
  counts: np.ndarray | None = None


class Smaller:
  """A model while it is made smaller; not an array is copied before it is changed.

  Attributes:
    options: the section `model` of its config, complete.
    params: nested arrays, all of the network.
    infos: what each of them is, by path.
    tokenizer: its own.
  """

  def __init__(
    self,
    options: Mapping[str, Any],
    params: PyTree,
    infos: Mapping[str, 'Info'],
    tokenizer: Tokenizer,
  ):
    self.options, self.params = dict(options), params
    self.infos, self.tokenizer = infos, tokenizer


class Compression:
  """A method: `config.compress`. It changes a model's shape (`shrink`), or puts kernels into other
  forms (`schemes`), or both.

  A run may also be trained with it (`trains`), so that the model gets used to it: what it has
  learned is then evaluated, and answers, in its smaller form.

  Attributes:
    looks_at: which of `Seen` it wants, before it changes anything.
    trains: whether a run may be trained with it.
  """

  looks_at: Sequence[str] = ()
  trains: bool = False

  def check(self, infos: Mapping[str, 'Info'], shapes: Mapping[str, Any]) -> None:
    """Raises ValueError where an option does not fit the model; called before anything is compiled.

    Args:
      infos: what each parameter is, by path.
      shapes: of each of them, by path.
    """
    del infos, shapes

  def schemes(self, infos: Mapping[str, 'Info'], shapes: Mapping[str, Any]) -> Mapping[str, Scheme]:
    """How the kernels and tables that get another form are put into it, by path. A folder is opened
    by the same method with the same options, so that nothing else may decide it.
    """
    del infos, shapes
    return {}

  def decide(self, seen: Seen) -> dict[str, Any]:
    """Options that follow from what was seen; they stand in the folder's config."""
    del seen
    return {}

  def shrink(self, model: Smaller, seen: Seen) -> None:
    """Gives the model another shape, or other numbers."""
    del model, seen

  def extras(self, params: PyTree, infos: Mapping[str, 'Info']) -> dict[str, Any]:
    """In training: what is carried from step to step, by name, each nested as the parameters that
    it is of, and laid out as they are; `TrainState.extras` has it under `compress`.

    Args:
      params: those that are trained, at the start.
      infos: what each of them is.
    """
    del params, infos
    return {}

  def before_update(
    self, grads: PyTree, params: PyTree, extras: dict[str, Any], done: jax.Array
  ) -> tuple[PyTree, dict[str, Any]]:
    """In training: gradients for the optimizer, and extras, after the gradient of a batch.

    Args:
      grads: of the trained parameters.
      params: these.
      extras: of `extras`.
      done: the share of the run that is over, from 0 to 1.
    """
    del params, done
    return grads, extras

  def after_update(
    self, params: PyTree, extras: dict[str, Any], done: jax.Array, infos: Mapping[str, 'Info']
  ) -> tuple[PyTree, dict[str, Any]]:
    """In training: parameters and extras after the optimizer; `done` counts this step."""
    del done, infos
    return params, extras
