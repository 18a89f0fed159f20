"""The mesh of devices, and the rules that lay logical axes on it. Models name logical axes only; mesh axes live here.

Mesh axes: `data` (rows of the batch), `fsdp` (rows of the batch, and parameters over the model dimension), `tensor` (heads,
mlp and vocabulary; Megatron-LM, arXiv:1909.08053). A dimension that an axis does not divide stays whole, and is reported.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # mesh axes that share out the rows of a batch
RULES = (
    ('batch', BATCH),
    ('embed', 'fsdp'),
    ('mlp', 'tensor'),
    ('heads', 'tensor'),
    ('kv_heads', 'tensor'),
    ('vocab', 'tensor'),
)


def create_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices (or `devices`); one axis may be -1, and takes what the others leave.

  Raises:
    ValueError: sizes whose product is not the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
    raise ValueError(f'config.mesh={sizes}: sizes are at least 1, and at most one is -1 (what is left).')
  known = math.prod(size for size in sizes.values() if size != -1)
  open_axis = [axis for axis, size in sizes.items() if size == -1]
  if len(devices) % known or (not open_axis and known != len(devices)):
    multiple = 'a multiple of ' if open_axis else ''
    raise ValueError(f'config.mesh={sizes} wants {multiple}{known} devices; there are {len(devices)}. '
                     'Set one axis to -1 to take what is left.')
  if open_axis:
    sizes[open_axis[0]] = len(devices) // known
  return Mesh(np.array(devices).reshape([sizes[axis] for axis in AXES]), AXES)


def row_shards(mesh: Mesh) -> int:
  """How many parts the rows of a batch are shared out to."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the batch axes, everything else whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on each device."""
  return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(mesh: Mesh, boxed_params: Any) -> tuple[Any, list[str]]:
  """Shardings for parameters that carry logical axis names (`flax.linen.with_logical_partitioning`).

  Args:
    mesh: the device mesh.
    boxed_params: a pytree of boxed `jax.ShapeDtypeStruct`; a leaf without names is replicated.

  Returns:
    A pytree of NamedSharding for the unboxed parameters, and a line for each dimension that stays whole though a rule would cut
    it.
  """
  reports = []

  def leaf(path, boxed):
    if not isinstance(boxed, nn.LogicallyPartitioned):
      return replicated(mesh)
    spec = nn.logical_to_mesh_axes(boxed.names, RULES)
    return NamedSharding(mesh, PartitionSpec(*_divisible(mesh, spec, boxed, jax.tree_util.keystr(path), reports)))

  shardings = jax.tree_util.tree_map_with_path(leaf, boxed_params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  return shardings, reports


def optimizer_shardings(mesh: Mesh, params: Any, shardings: Any, opt_state: Any) -> Any:
  """Shardings for an optimizer's state: a leaf that mirrors a parameter (path and shape) lies like it, the rest is replicated."""
  where = jax.tree_util.tree_leaves(shardings)
  mirrored = {(path, leaf.shape): sharding
              for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params), where, strict=True)}

  def leaf(path, array):
    matches = (mirrored[path[i:], array.shape] for i in range(len(path)) if (path[i:], array.shape) in mirrored)
    return next(matches, replicated(mesh))

  return jax.tree_util.tree_map_with_path(leaf, opt_state)


def _divisible(mesh: Mesh, spec: PartitionSpec, boxed: nn.LogicallyPartitioned, path: str, reports: list[str]) -> list[Any]:
  axes = []
  for size, axis, name in zip(boxed.value.shape, spec, boxed.names, strict=True):
    parts = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
    if size % parts:
      reports.append(f'{path}: {name} of size {size} does not divide by {axis}={parts} and stays whole')
      axis = None
    axes.append(axis if parts > 1 else None)
  return axes
