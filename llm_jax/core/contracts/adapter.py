"""What is trained beside a frozen base."""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llm_jax.core.contracts.values import Metrics
from llm_jax.core.tree import PyTree

if TYPE_CHECKING:
  import flax.linen as nn

  from llm_jax.core.params import Info
  from llm_jax.core.state import TrainState


class Piece(NamedTuple):
  """A parameter of an adapter, and the tensor of the library peft that it is.

  Attributes:
    name: ours, the last component of its path.
    suffix: theirs, after the name of the linear map, or of the table, that it stands beside.
    theirs: the axes of their tensor: R rank, I inputs of the map or rows of the table, O outputs, 1
      an axis of length one.
    ours: those of our parameter, where I and O may be several each.
    fill: what may stand for a map that is not adapted, where several maps are one tensor; None:
      nothing.
    targets: the option of the adapter that names the maps.
    listed: a list of adapter_config.json that names them, beside target_modules.
    beside: the last component of the path of the base's parameter: kernel, or embedding.
  """

  name: str
  suffix: str
  theirs: str
  ours: str
  fill: float | None = 0.0
  targets: str = 'targets'
  listed: str | None = None
  beside: str = 'kernel'


class Ported(NamedTuple):
  """What an adapter is to the library peft.

  Attributes:
    settings: its adapter_config.json, but for what the base decides.
    pieces: what it has beside linear maps. Of those with the same `targets`, the first is there in
      every adapted map.
    prompt: instead, one tensor of the whole model, whose name is the `suffix`; of its axes L counts
      layers where our parameter is in layers.
    tasks: peft's names of the tasks in which the network is the same there and here; () for all.
  """

  settings: Mapping[str, Any]
  pieces: tuple[Piece, ...] = ()
  prompt: Piece | None = None
  tasks: tuple[str, ...] = ()


class Adapter:
  """What is trained beside a frozen base, whose parameters keep their paths and their bits.

  By default nothing is added and every parameter that the adapter created is trained.

  Attributes:
    terms: name of each metric that `loss` gives -> its coefficient in the loss that is trained.
    positions: how many positions it takes before each document; a row is shorter by as many.
    tokens: how many virtual tokens it puts before each text, ids from the model's `vocab_size` on.
  """

  terms: Mapping[str, float] = {}
  positions: int = 0
  tokens: int = 0

  def check(self, infos: Mapping[str, 'Info'], base: Collection[str]) -> None:
    """Raises ValueError where an option does not fit the network; called before a run trains.

    Args:
      infos: what each parameter is, by path, the adapter's own among them.
      base: the paths of those that are not the adapter's own.
    """
    del infos, base

  def intercept(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: 'nn.module.InterceptorContext',
  ) -> Any:
    """Stands around every method of every module (`flax.linen.intercept_methods`).

    May create parameters in `context.module`; they are initialised after the whole base.
    """
    del context
    return next_fun(*args, **kwargs)

  def weights(self, params: PyTree) -> PyTree:
    """The parameters in the form in which the network reads them; kernels may be weight forms.

    Args:
      params: those of the network; in generation, where only the model runs, `model` alone.
    """
    return params

  def trains(self, path: str, info: 'Info', base: bool) -> bool:
    """Whether a parameter is trained; `base`: it is not the adapter's own."""
    del path, info
    return not base

  def trained_layers(self, params: PyTree, infos: Mapping[str, 'Info']) -> Mapping[str, np.ndarray]:
    """Of parameters that are trained in some layers only: in which, bool by path, as
    `Info.depths` numbers them ([layers] for a stack). One that is trained in none is frozen, one
    that is not mentioned is trained whole.

    Args:
      params: those that `trains` says are trained, arrays or shapes.
      infos: what each of them is, by path.
    """
    del params, infos
    return {}

  def begins(self, params: PyTree, infos: Mapping[str, 'Info']) -> Mapping[str, np.ndarray]:
    """Of parameters that are not trained from the first step on: after how many steps each of their
    layers is, int32 by path, as `trained_layers` has them.

    Until then they stay as they are; what the optimizer keeps of their gradients it keeps from the
    first step on, so that their first update is like any other.

    Args:
      params, infos: as for `trained_layers`.
    """
    del params, infos
    return {}

  def no_gradient(self, path: str) -> str | None:
    """Why the gradient of a trained parameter is zero before the first step, if the method has it
    so; None where it must not be, or the parameter would never learn.
    """
    del path
    return None

  def rate(self, path: str) -> float:
    """A factor on the learning rate of a trained parameter."""
    del path
    return 1.0

  def merged(self, params: PyTree, infos: Mapping[str, 'Info']) -> PyTree:
    """The parameters of the base alone, nested, with which it computes what the adapted network
    does; where the adapter adds nothing to the network, `params` as they are.

    Args:
      params: those of the network, nested arrays; a head may be missing.
      infos: what each of them is, by path.

    Raises:
      ValueError: the method cannot be merged, or a kernel is no array.
    """
    del infos
    if type(self).intercept is Adapter.intercept and type(self).weights is Adapter.weights:
      return params
    raise ValueError(
      f'the adapter {type(self).__module__} cannot be merged into its base: it has no `merged`.'
    )

  def ported(self, times: int = 1) -> Ported:
    """What the adapter is to the library peft.

    Args:
      times: by how much the rank is larger, where one tensor of the base is several maps of ours.

    Raises:
      ValueError: peft has no such method, or it is not known here how it has it.
    """
    del times
    raise ValueError(
      f'the adapter {type(self).__module__} has no form in the library peft; --export=merged '
      'writes a whole model.'
    )

  def to_ported(self, params: PyTree, infos: Mapping[str, 'Info']) -> PyTree:
    """The parameters with the values that `ported` has in peft; both nested."""
    del infos
    return params

  def from_ported(self, params: PyTree, infos: Mapping[str, 'Info']) -> PyTree:
    """The inverse of `to_ported`."""
    del infos
    return params

  @classmethod
  def ported_options(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the adapter, from an adapter_config.json whose type is one of `PEFT_TYPES` of its
    module; targets are not among them.

    Raises:
      ValueError: a setting that the adapter cannot have.
    """
    raise NotImplementedError

  def extras(self, params: PyTree) -> dict[str, Any]:
    """Arrays that are carried from step to step in `TrainState.extras`."""
    del params
    return {}

  def loss(self, params: PyTree) -> Metrics:
    """What the adapter itself wants of its parameters: (sum, weight) for each of `terms`, which are
    added to the loss that is trained, once per step.

    Args:
      params: those that are trained.
    """
    del params
    return {}

  def after_update(self, state: 'TrainState', grads: PyTree) -> 'TrainState':
    """Runs inside the jitted step, after the optimizer.

    Args:
      state: after the update.
      grads: of `state.params` before it, as they were, not clipped.
    """
    del grads
    return state
