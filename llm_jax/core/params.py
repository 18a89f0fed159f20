"""What a parameter is, said once, where it is created: its logical axes, which of them are summed
over, the layer that it belongs to, and whether it is decayed.

Sharding, optimizers, adapters, quantization and generation ask `Info` and never a path.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import numpy as np

from llm_jax.core import tree
from llm_jax.core.tree import PyTree

LAYERS = 'layers'  # the logical axis that `nn.scan` puts before the axes of one layer
EMBEDDINGS = -1  # the layer number of what comes before the first layer
_LAYER: contextvars.ContextVar[int | None] = contextvars.ContextVar('layer', default=None)


@dataclasses.dataclass(frozen=True)
class Info:
  """What a parameter is.

  Attributes:
    names: the logical axis of each dimension; None for one that is never sharded. `LAYERS` comes
      first where several layers are stacked.
    inputs: the dimensions, counted within one layer, that are summed over where the parameter
      multiplies an activation: (0,) for a kernel [D, F], (0, 1) for [N, H, D]. Empty for what is
      no matrix: biases, scales, tables of positions.
    decayed: whether weight decay acts on it.
    layer: the number of its layer, or of the first one in a stack; `EMBEDDINGS` before all layers,
      None outside of them (heads, the last norm).
    period: how many layers further the next one in a stack is.
    formable: whether a weight form may stand in its place (`nn.linear.Linear`).

  Example:
    >>> query = Info(('layers', 'embed', 'heads', 'head_dim'), inputs=(0,), decayed=True, layer=0)
    >>> query.stacked, query.outputs
    (True, (1, 2))
    >>> query.depths((12, 768, 12, 64)).tolist() == list(range(12))
    True
  """

  names: tuple[str | None, ...]
  inputs: tuple[int, ...] = ()
  decayed: bool = False
  layer: int | None = None
  period: int = 1
  formable: bool = False

  @property
  def stacked(self) -> bool:
    """Whether dimension 0 counts layers."""
    return self.names[:1] == (LAYERS,)

  @property
  def outputs(self) -> tuple[int, ...]:
    """The dimensions within one layer that are not summed over."""
    return tuple(d for d in range(len(self.names) - self.stacked) if d not in self.inputs)

  def depths(self, shape: tuple[int, ...]) -> np.ndarray | None:
    """The layer numbers of a parameter of this shape: [layers] for a stack, [] for one layer."""
    if self.layer is None:
      return None
    return self.layer + self.period * (np.arange(shape[0]) if self.stacked else np.zeros((), int))


@flax.struct.dataclass
class Boxed(nn.LogicallyPartitioned):
  """A parameter while a network is initialised, with what `Info` says of it."""

  inputs: tuple[int, ...] = flax.struct.field(default=(), pytree_node=False)
  decayed: bool = flax.struct.field(default=False, pytree_node=False)
  layer: int | None = flax.struct.field(default=None, pytree_node=False)
  period: int = flax.struct.field(default=1, pytree_node=False)
  formable: bool = flax.struct.field(default=False, pytree_node=False)

  def add_axis(self, index: int, params: dict[Any, Any]) -> 'Boxed':
    """Called by `nn.scan`, whose `metadata_params` may say `period`."""
    added = super().add_axis(index, params)
    return cast(Boxed, added.replace(period=params.get('period', self.period)))

  @property
  def info(self) -> Info:
    """Without the value."""
    return Info(self.names, self.inputs, self.decayed, self.layer, self.period, self.formable)


def boxed(
  init: Callable[..., jax.Array],
  names: tuple[str | None, ...],
  *,
  inputs: tuple[int, ...] = (),
  decayed: bool = False,
  formable: bool = False,
) -> Callable[..., Boxed]:
  """The initializer `init` for `nn.Module.param`, with what the parameter is; see `Info`."""

  def make(*args: Any, **kwargs: Any) -> Boxed:
    value = init(*args, **kwargs)
    layer = _LAYER.get()
    return Boxed(value, names, inputs=inputs, decayed=decayed, layer=layer, formable=formable)

  return make


@contextlib.contextmanager
def in_layer(number: int) -> Iterator[None]:
  """Parameters created inside belong to this layer."""
  token = _LAYER.set(number)
  try:
    yield
  finally:
    _LAYER.reset(token)


def infos(boxed_params: PyTree) -> dict[str, Info]:
  """What each parameter of a network is, by path.

  Args:
    boxed_params: as `network.init` returns them, arrays or shapes. A leaf without a box is taken
      for a matrix, and decayed, from two dimensions on; it belongs to no layer.
  """
  leaves = jax.tree_util.tree_leaves_with_path(boxed_params, is_leaf=_is_box)
  found = {}
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    found[name] = leaf.info if isinstance(leaf, Boxed) else _plain(leaf)
  return found


def is_form(weight: Any) -> bool:
  """Whether a weight is a form (`core.contracts.WeightForm`), not an array."""
  return hasattr(weight, 'product')


def leaves(params: PyTree) -> dict[str, Any]:
  """Parameters by path, as `tree.flatten` has them, but a weight form is one of them."""
  found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_form)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in found}


def split(params: PyTree, chosen: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Nested dictionaries of the leaves whose path is chosen, and of the others; forms are leaves."""
  found = leaves(params)
  inside = {path: leaf for path, leaf in found.items() if chosen(path)}
  outside = {path: leaf for path, leaf in found.items() if path not in inside}
  return tree.nest(inside), tree.nest(outside)


def merge(*parts: PyTree) -> dict[str, Any]:
  """One nested dictionary of parts that share no leaf."""
  found: dict[str, Any] = {}
  for part in parts:
    new = leaves(part)
    twice = sorted(found.keys() & new.keys())
    if twice:
      raise ValueError(f'{twice[0]} stands in two parts of the parameters.')
    found |= new
  return tree.nest(found)


def _is_box(leaf: Any) -> bool:
  return isinstance(leaf, nn.meta.AxisMetadata)


def _plain(leaf: Any) -> Info:
  leaf = nn.meta.unbox(leaf)
  return Info((None,) * leaf.ndim, decayed=leaf.ndim >= 2)
