"""Models of smaller shapes: which heads, channels, layers and ids stay, and the arrays of these.

The layers of a model are one stack, or one for each place in a pattern of layers, or stand by
themselves; a *block* is one of these here, known by the number of its first layer and its period.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import tree
from llm_jax.core.contracts import Seen
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree

Block = tuple[int, int, bool]  # number of the first layer, period, whether it is stacked


def of(params: PyTree) -> dict[str, Any]:
  """The shapes of parameters, by path."""
  return tree.flatten(params)


def block(info: Info) -> Block | None:
  """The block of a parameter; None outside of the layers."""
  if info.layer is None or info.layer < 0:
    return None
  return info.layer, info.period, info.stacked


def size(infos: Mapping[str, Info], shapes: Mapping[str, Any], axis: str) -> int:
  """How long an axis of the layers is.

  Raises:
    ValueError: the layers have none, or of several lengths.
  """
  found = {
    shapes[path].shape[info.names.index(axis)]
    for path, info in infos.items()
    if block(info) and axis in info.names and path in shapes
  }
  if len(found) != 1:
    raise ValueError(
      f'config.compress needs layers that are all alike, and this model has {axis} of '
      f'{sorted(found) or "no"} size.'
    )
  return found.pop()


def rounded(axis: str, whole: int, share: float) -> int:
  """A share of an axis, at least one.

  Raises:
    ValueError: it is all of it.
  """
  count = max(1, round(share * whole))
  if count == whole:
    raise ValueError(f'config.compress: a share of {share} of {whole} {axis} leaves none out.')
  return count


def importance(infos: Mapping[str, Info], seen: Seen, axis: str) -> dict[Block, np.ndarray]:
  """How much the loss changes without each head or channel, [parts] or of a stack [L, parts], by
  block: of the kernel that sums over them (`Seen.gradients`).
  """
  found = {}
  for path, info in infos.items():
    at = info.names.index(axis) if axis in info.names else None
    if at is not None and block(info) and at - info.stacked in info.inputs:
      found[block(info)] = np.asarray(seen.gradients[path], np.float64)
  return found


def best(matters: np.ndarray, count: int) -> np.ndarray:
  """The indices of the `count` largest of each layer, in their order."""
  order = np.argsort(-matters, axis=-1, kind='stable')[..., :count]
  return np.sort(order, axis=-1)


def taken(
  params: PyTree, infos: Mapping[str, Info], axis: str, kept: Mapping[Block, np.ndarray]
) -> dict[str, Any]:
  """Parameters with some heads or channels of each layer.

  Args:
    params: nested.
    infos: what each of them is.
    axis: heads, kv_heads or mlp.
    kept: indices that stay, [count] or of a stack [L, count], by block.
  """

  def leaf(path: str, x: jax.Array) -> jax.Array:
    info = infos[path]
    if axis not in info.names or not block(info):
      return x
    at, indices = info.names.index(axis), kept[block(info)]
    shape = [1] * x.ndim
    shape[at] = indices.shape[-1]
    if info.stacked:
      shape[0] = len(indices)
    return jnp.take_along_axis(x, jnp.asarray(indices).reshape(shape), axis=at)

  return tree.map_with_path(leaf, params)


def ids_taken(params: PyTree, infos: Mapping[str, Info], ids: np.ndarray) -> dict[str, Any]:
  """Parameters with some ids of the vocabulary."""

  def leaf(path: str, x: jax.Array) -> jax.Array:
    names = infos[path].names
    return jnp.take(x, jnp.asarray(ids), axis=names.index('vocab')) if 'vocab' in names else x

  return tree.map_with_path(leaf, params)


def layers_left(infos: Mapping[str, Info], shapes: Mapping[str, Any], count: int) -> list[int]:
  """The numbers of the layers that stay, evenly over the depth: whole periods of their pattern, and
  layers that stand by themselves.

  Raises:
    ValueError: as many as there are, or more; a number of layers that breaks the pattern.
  """
  alone, stacked = set(), set()
  period = 1
  for path, info in infos.items():
    if path in shapes and (depths := info.depths(shapes[path].shape)) is not None:
      if info.stacked:
        stacked.update(depths.tolist())
        period = info.period
      elif block(info):
        alone.add(int(depths))
  every = sorted(alone | stacked)
  if not 0 < count < len(every):
    raise ValueError(
      f'config.compress.layers={count} must be at least 1 and fewer than the {len(every)} layers '
      'of the model.'
    )
  groups, left = len(stacked) // period, count - len(alone)
  if left < period or left % period:
    known = [len(alone) + period * n for n in range(1, groups)]
    raise ValueError(
      f'config.compress.layers={count} breaks the pattern of the layers; it may be one of {known}.'
    )
  first, chosen = min(stacked), left // period
  starts = [first + period * (i * groups // chosen) for i in range(chosen)]
  return sorted([*alone, *(start + i for start in starts for i in range(period))])


def layers_taken(params: PyTree, infos: Mapping[str, Info], kept: list[int]) -> dict[str, Any]:
  """Parameters of some of the layers."""

  def leaf(path: str, x: jax.Array) -> jax.Array:
    if not infos[path].stacked:
      return x
    return x[np.flatnonzero(np.isin(infos[path].depths(x.shape), kept))]

  return tree.map_with_path(leaf, params)
