"""What the forms share: the axes of a kernel that are summed over, counted from the end so that a
stack has the same, and the scales that stand beside whole numbers.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.core.params import Info
from llm_jax.parallel.cpu import products


def inputs(info: Info) -> tuple[int, ...]:
  """The axes that are summed over: (-3,) of a kernel [D, N, H]."""
  rank = len(info.names) - info.stacked
  return tuple(axis - rank for axis in info.inputs)


def is_table(info: Info) -> bool:
  """Whether it is a table of vectors, which are summed over in products with all of it."""
  return info.inputs == (len(info.names) - info.stacked - 1,)


def scaled(
  kernel: jax.Array, axes: tuple[int, ...], group: int | None, largest: int
) -> tuple[jax.Array, jax.Array]:
  """A kernel in units of its scales, the last axis that is summed over in two (groups, inputs of a
  group), float32; and the scales, as `Int8` has them.
  """
  last, wide = axes[-1], kernel.astype(jnp.float32)
  size = wide.shape[last]
  parts = split(wide, last, group or size)
  over = (last,) if group else (*(axis - 1 for axis in axes[:-1]), last - 1, last)
  most = jnp.max(jnp.abs(parts), axis=over, keepdims=True)
  scale = jnp.where(most > 0, most, 1) / largest
  return parts / scale, jnp.squeeze(scale, last)


def grouped(values: jax.Array, scale: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Values times their scales, the last axis that is summed over in two."""
  last = axes[-1]
  parts = split(values, last, values.shape[last] // scale.shape[last])
  return parts * jnp.expand_dims(scale, last)


def groups(scale: jax.Array, axes: tuple[int, ...]) -> int:
  """How many scales a channel has."""
  return math.prod(scale.shape[axis] for axis in axes)


def of_outputs(scale: jax.Array, axes: tuple[int, ...], ndim: int) -> jax.Array:
  """The scales of channels, to be multiplied with a product of `ndim` axes."""
  scale = jnp.squeeze(scale, axes)
  return scale.reshape((1,) * (ndim - scale.ndim) + scale.shape)


def einsum(spec: str, x: jax.Array, w: jax.Array, result: DTypeLike) -> jax.Array:
  """The einsum, as one CPU is fast at it where it is one."""
  if products.alone() and products.inputs_first(spec):
    return products.product(spec, x, w, result)
  return jnp.einsum(spec, x, w, preferred_element_type=result)


def outputs(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
  """The sizes of the axes within one layer that are not summed over: those behind the first that
  is, or of a table before it.
  """
  first = axes[0] if axes[-1] != -1 else -2
  return tuple(x.shape[axis] for axis in range(first, 0) if axis not in axes)


def outputs_first(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """A kernel, or its scales, as a matrix [O, I]; of a stack [L, O, I]."""
  others = [axis for axis in range(axes[0] if axes[-1] != -1 else -2, 0) if axis not in axes]
  rank = len(others) + len(axes)
  layers = tuple(range(x.ndim - rank))
  moved = x.transpose(*layers, *(x.ndim + axis for axis in (*others, *axes)))
  size = math.prod(x.shape[axis] for axis in others)
  return moved.reshape(*x.shape[: len(layers)], size, -1)


def wide(values_OI: jax.Array, scale_OG: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Rows of a matrix with its outputs first: values times the scales of their groups."""
  count, groups = scale_OG.shape
  parts = values_OI.reshape(count, groups, -1).astype(dtype) * scale_OG[..., None].astype(dtype)
  return parts.reshape(values_OI.shape)


def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
  """`rounded`, whose gradient is that of x."""
  return x + jax.lax.stop_gradient(rounded - x)


def refused(shape: tuple[int, ...], info: Info, group: int | None) -> str | None:
  """Why an array of this shape cannot have groups of this size; None where it can."""
  size = shape[inputs(info)[-1]]
  if group is not None and size % group:
    return f'its {size} inputs do not divide into groups of {group}'
  return None


def scale_info(info: Info) -> Info:
  """What the scales are: no axis that is summed over is cut."""
  summed = {info.stacked + axis for axis in info.inputs}
  names = tuple(None if i in summed else name for i, name in enumerate(info.names))
  return Info(names, layer=info.layer, period=info.period)


def layer_info(info: Info) -> Info:
  """What one number of each layer is."""
  return Info(info.names[: info.stacked], layer=info.layer, period=info.period)


def split(x: jax.Array, axis: int, size: int) -> jax.Array:
  """An axis, counted from the end, in two: groups, and `size` in each."""
  at = x.ndim + axis
  return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])
