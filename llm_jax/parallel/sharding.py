"""The mesh of devices, and the rules that lay logical axes on it. Models name logical axes only;
mesh axes are known here.

Mesh axes, from the slowest links to the fastest:

    data      rows of the batch
    fsdp      rows of the batch; parameters and optimizer state are cut over it too, and parameters
              are gathered where they are used
    sequence  positions of a row (ring attention, arXiv:2310.01889)
    tensor    heads, mlp and vocabulary (Megatron-LM, arXiv:1909.08053); between them the positions
              of a row (arXiv:2205.05198)

A dimension that its axes do not divide stays whole, and is reported.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax.core import plugins, tree
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree

Axes = str | tuple[str, ...] | None  # mesh axes that cut a dimension, as PartitionSpec has them
AXES = ('data', 'fsdp', 'sequence', 'tensor')
BATCH = ('data', 'fsdp')  # mesh axes that share out the rows of a batch
TENSOR = {axis: ('tensor',) for axis in ('mlp', 'heads', 'kv_heads', 'vocab')}
ACTIVATIONS = TENSOR | {
  'batch': BATCH,
  'length': ('sequence',),
  'norm_length': ('sequence', 'tensor'),
}


@dataclasses.dataclass(frozen=True)
class Rules:
  """Mesh axes by logical axis.

  Attributes:
    parameters: of parameters.
    optimizer: of the optimizer's state, and of the gradients that it takes.
  """

  parameters: Mapping[str, tuple[str, ...]]
  optimizer: Mapping[str, tuple[str, ...]]


RULES = {
  # ZeRO stage 3 (arXiv:1910.02054), "fully sharded": parameters, gradients and optimizer state are
  # cut over `fsdp`.
  'fsdp': Rules(TENSOR | {'embed': ('fsdp',)}, TENSOR | {'embed': ('fsdp',)}),
  # ZeRO stage 1: parameters are whole on each device, the optimizer's state is cut over all axes
  # that share out the batch.
  'zero1': Rules(TENSOR, TENSOR | {'embed': BATCH}),
}


def create_mesh(
  data: int = -1,
  fsdp: int = 1,
  sequence: int = 1,
  tensor: int = 1,
  dcn_data: int = 1,
  dcn_fsdp: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh over all devices (or `devices`), neighbours on it close to each other in the machine.

  Args:
    data, fsdp, sequence, tensor: sizes within one slice (or node); one may be -1, and takes what
      the others leave.
    dcn_data, dcn_fsdp: how many times larger `data` and `fsdp` are across slices, over the data
      centre's network.
    devices: all by default.

  Raises:
    ValueError: sizes whose product is not the number of devices.
  """
  found = list(jax.devices() if devices is None else devices)
  within = {'data': data, 'fsdp': fsdp, 'sequence': sequence, 'tensor': tensor}
  across = {'dcn_data': dcn_data, 'dcn_fsdp': dcn_fsdp}
  sizes = _filled_in(within, across, len(found))
  return Mesh(
    _arranged(sizes, [dcn_data, dcn_fsdp, 1, 1], found),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def _filled_in(within: Mapping[str, int], across: Mapping[str, int], devices: int) -> list[int]:
  """The sizes within a slice, the open one (-1) filled in."""
  section = f'config.mesh={dict(within) | dict(across)}'
  open_axes = [axis for axis, size in within.items() if size == -1]
  sizes = [size for size in (*within.values(), *across.values()) if size != -1]
  if any(size < 1 for size in sizes) or -1 in across.values() or len(open_axes) > 1:
    raise ValueError(
      f'{section}: sizes are at least 1, and at most one of {", ".join(within)} is -1 (what is '
      'left).'
    )
  known = math.prod(sizes)
  if devices % known or (not open_axes and known != devices):
    multiple = 'a multiple of ' if open_axes else ''
    raise ValueError(
      f'{section} wants {multiple}{known} devices; there are {devices}. Set one axis to -1 to take '
      'what is left.'
    )
  return [devices // known if axis in open_axes else size for axis, size in within.items()]


def _arranged(
  within: Sequence[int], across: Sequence[int], devices: Sequence[jax.Device]
) -> np.ndarray:
  """Devices by mesh position; slices (or hosts, where no slices are known) are the outer part of
  each axis.
  """
  shape = [a * b for a, b in zip(within, across, strict=True)]
  if math.prod(across) == 1:
    if devices[0].platform != 'tpu':
      return np.array(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  if len({getattr(device, 'slice_index', 0) for device in devices}) > 1:
    return mesh_utils.create_hybrid_device_mesh(
      within, across, devices, allow_split_physical_axes=True
    )
  parts = np.array(devices).reshape(*across, *within)  # one slice, or hosts in order
  order = [axis for i in range(len(AXES)) for axis in (i, i + len(AXES))]
  return parts.transpose(order).reshape(shape)


def create_layout(
  data: int = -1,
  fsdp: int = 1,
  sequence: int = 1,
  tensor: int = 1,
  dcn_data: int = 1,
  dcn_fsdp: int = 1,
  rules: str = 'fsdp',
  *,
  devices: Sequence[jax.Device] | None = None,
) -> 'Layout':
  """The mesh of `create_mesh` with one of the `RULES`; the section `config.mesh` are its arguments.

  Raises:
    ValueError: unknown rules; as `create_mesh`.
  """
  if rules not in RULES:
    raise ValueError(
      f'config.mesh.rules={rules!r} is not known{plugins.nearest(rules, RULES)}; known: '
      f'{", ".join(RULES)}.'
    )
  mesh = create_mesh(data, fsdp, sequence, tensor, dcn_data, dcn_fsdp, devices=devices)
  return Layout(mesh, RULES[rules])


def row_shards(mesh: Mesh) -> int:
  """How many parts the rows of a batch are shared out to."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the batch axes, everything else whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on each device."""
  return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh, and the rules by which arrays lie on it."""

  mesh: Mesh
  rules: Rules

  @property
  def platform(self) -> str:
    """'cpu', 'gpu' or 'tpu', of the mesh's devices, which may be descriptions of absent ones."""
    return self.mesh.devices.flat[0].platform

  def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Where an activation lies, by the logical names of its dimensions."""
    dimensions = zip(names, shape, strict=True)
    return PartitionSpec(
      *(self._cut(_axes(ACTIVATIONS, name), name, size) for name, size in dimensions)
    )

  def parameter_spec(
    self, names: Sequence[str | None], shape: Sequence[int], optimizer: bool = False
  ) -> PartitionSpec:
    """Where a parameter lies, by the logical names of its dimensions.

    Axes that do not divide their own dimension cut `embed` as well, where there is one: an array is
    not kept whole on every device because one of its sizes is odd.

    Args:
      names: of its dimensions.
      shape: of the parameter.
      optimizer: for what the optimizer keeps of it, in place of the parameter itself.
    """
    rules = self.rules.optimizer if optimizer else self.rules.parameters
    axes = [_axes(rules, name) for name in names]
    left: list[str] = []
    for wanted, size in zip(axes, shape, strict=True):
      if size % self._parts(wanted):
        left += wanted
    for i, (name, size) in enumerate(zip(names, shape, strict=True)):
      more = (*axes[i], *left)
      if name == 'embed' and size % self._parts(more) == 0:
        axes[i] = more
    dimensions = zip(axes, names, shape, strict=True)
    return PartitionSpec(*(self._cut(*dimension) for dimension in dimensions))

  def _parts(self, axes: Sequence[str]) -> int:
    return math.prod(self.mesh.shape[axis] for axis in axes)

  def _cut(self, axes: Sequence[str], name: str | None, size: int) -> str | tuple[str, ...] | None:
    """The axes that cut a dimension, as PartitionSpec writes them; the last ones are left out until
    the others divide it.
    """
    kept = tuple(axis for axis in axes if self.mesh.shape[axis] > 1)
    while kept and size % self._parts(kept):
      product = f'{" x ".join(kept)} = {self._parts(kept)}'
      _report(f'{name} of size {size} does not divide by {product} and is not cut by {kept[-1]}')
      kept = kept[:-1]
    if len(kept) == 1:
      return kept[0]
    return kept or None


_CURRENT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar('layout', default=None)


@contextlib.contextmanager
def use(layout: Layout | None) -> Iterator[None]:
  """The layout that `constrain` and `current` use while a function is traced."""
  token = _CURRENT.set(layout)
  try:
    yield
  finally:
    _CURRENT.reset(token)


def current() -> Layout | None:
  """The layout of the program that is being traced; None outside of one."""
  return _CURRENT.get()


def platform() -> str:
  """'cpu', 'gpu' or 'tpu', of the devices that a program is traced for."""
  layout = current()
  return jax.default_backend() if layout is None else layout.platform


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """`x`, laid out by the logical names of its dimensions; unchanged outside of a program."""
  layout = current()
  if layout is None:
    return x
  where = NamedSharding(layout.mesh, layout.spec(names, x.shape))
  return jax.lax.with_sharding_constraint(x, where)


def divisible_heads(x_BSKH: jax.Array, heads: int) -> jax.Array:
  """Key or value heads, repeated until the axes that cut `heads` query heads cut them too;
  unchanged where they do already.

  Query head n reads head n // G before and after, with G query heads per head.
  """
  layout = current()
  K = x_BSKH.shape[2]
  parts = 1 if layout is None else layout.mesh.shape['tensor']
  if heads % parts or K % parts == 0:
    return x_BSKH
  return jnp.repeat(x_BSKH, math.lcm(K, parts) // K, axis=2)


def parameter_shardings(
  layout: Layout, params: PyTree, infos: Mapping[str, Info], optimizer: bool = False
) -> Any:
  """Shardings for parameters, by their logical axes.

  Args:
    layout: mesh and rules.
    params: the parameters, or some of them, as arrays or shapes.
    infos: what each parameter is, by path (`core.params.infos`).
    optimizer: for what the optimizer keeps, in place of the parameters themselves.

  Returns:
    A pytree of NamedSharding, like `params`.
  """

  def sharding(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    spec = layout.parameter_spec(infos[path].names, leaf.shape, optimizer)
    return NamedSharding(layout.mesh, spec)

  return tree.map_with_path(sharding, params)


def optimizer_shardings(mesh: Mesh, params: PyTree, shardings: PyTree, opt_state: PyTree) -> Any:
  """Shardings for an optimizer's state: a leaf that mirrors a parameter (its path ends in that of
  the parameter, and the shape is the same) lies as given, everything else is replicated.

  Args:
    mesh: the mesh.
    params: the parameters' shapes.
    shardings: for each parameter, where what the optimizer keeps for it lies.
    opt_state: the state's shapes.
  """
  mirrored = {}
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for (path, leaf), where in zip(leaves, jax.tree.leaves(shardings), strict=True):
    mirrored[path, leaf.shape] = where

  def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    for start in range(len(path)):
      found = mirrored.get((path[start:], leaf.shape))
      if found is not None:
        return found
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(sharding, opt_state)


def _axes(rules: Mapping[str, tuple[str, ...]], name: str | None) -> tuple[str, ...]:
  return () if name is None else rules.get(name, ())


@functools.cache
def _report(line: str) -> None:
  logging.warning('sharding: %s.', line)
