"""Weights in 4 bits, two in a byte: whole numbers from -7 to 7, and a scale for each group of
inputs of an output channel (symmetric, by the largest absolute value of the group; groups as in
GPTQ, arXiv:2210.17323, section 4). Products are taken in the compute type with the array that it
stands for. Where few rows meet it, as in generation, reading it is what takes the time: one CPU
then makes that array block by block (`FewRows`), and TPUs, which know numbers of 4 bits, widen them
as they multiply (`Unpacked`).

    w = scale * values,    |w - scale * values| <= scale / 2
"""

import dataclasses
import math
import string
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.core.params import Info
from llm_jax.nn.forms import _axes
from llm_jax.parallel.cpu import products

LARGEST = 7
_ZERO = 8  # what is added to a value, so that none is negative


@flax.struct.dataclass
class Int4:
  """A kernel, or a table.

  Attributes:
    packed: uint8, of the kernel's shape with half the length on the last axis that is summed over:
      its first half in the lower 4 bits, the second in the upper ones.
    scale: float32, as that of `int8.Int8`.
    inputs: likewise.
  """

  packed: jax.Array
  scale: jax.Array
  inputs: tuple[int, ...] = flax.struct.field(default=(-2,), pytree_node=False)

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """See the contract."""
    return _axes.einsum(spec, x.astype(dtype), self.dense(dtype), result)

  def few_rows(self) -> 'FewRows':
    """For a single CPU, where few rows meet it: outputs first, in blocks."""
    values = _values(self.packed, self.inputs[-1])
    values_OI = _axes.outputs_first(values, self.inputs)
    width, scale_OG = values_OI.shape[-1], _axes.outputs_first(self.scale, self.inputs)
    return FewRows(
      products.blocks(_packed(values_OI, -1), width),
      products.blocks(scale_OG, width),
      _axes.outputs(values, self.inputs),
    )

  def unpacked(self) -> 'Unpacked':
    """For a device that knows numbers of 4 bits."""
    last = self.inputs[-1]
    values = _values(self.packed, last).astype(jnp.int4)
    size = values.shape[last] // self.scale.shape[last]
    return Unpacked(_axes.split(values, last, size), self.scale, self.inputs)

  def dense(self, dtype: DTypeLike) -> jax.Array:
    """The array that it stands for."""
    values = _values(self.packed, self.inputs[-1]).astype(jnp.float32)
    return _axes.grouped(values, self.scale, self.inputs).reshape(values.shape).astype(dtype)

  def rows(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Of a table, the vectors of `ids`."""
    return dataclasses.replace(self, packed=self.packed[ids], scale=self.scale[ids]).dense(dtype)


@flax.struct.dataclass
class FewRows:
  """An `Int4` with its outputs first, as a single CPU is fast at it; see `parallel.cpu.products`.

  Attributes:
    packed_NoI: uint8, two inputs in a byte, in blocks; [L, N, o, I] where it is stacked.
    scale_NoG: float32, of each group of inputs.
    outputs: the sizes that O is made of.
  """

  packed_NoI: jax.Array
  scale_NoG: jax.Array
  outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """See the contract."""
    inputs = products.input_axes(spec)
    x_RI = x.reshape(-1, 2 * self.packed_NoI.shape[-1]).astype(dtype)

    def product(block: tuple[jax.Array, jax.Array]) -> jax.Array:
      wide_oI = _axes.wide(_values(block[0], -1), block[1], dtype)
      return products.matrix_first(x_RI, wide_oI, result)

    kept = self.packed_NoI, self.scale_NoG
    y_RO = products.blockwise(product, kept, math.prod(self.outputs))
    return y_RO.reshape(*x.shape[:-inputs], *self.outputs)


@flax.struct.dataclass
class Unpacked:
  """An `Int4` in numbers of 4 bits, which the compiler of TPUs widens as it multiplies.

  Attributes:
    values: int4, of the kernel's shape with the last axis that is summed over in two: groups, and
      the inputs of a group.
    scale, inputs: as those of `Int4`.
  """

  values: jax.Array
  scale: jax.Array
  inputs: tuple[int, ...] = flax.struct.field(default=(-2,), pytree_node=False)

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """See the contract."""
    given, kernel = spec.split('->')[0].split(',')
    out, last = spec.split('->')[1], given[-1]
    new = next(letter for letter in string.ascii_letters if letter not in spec)
    spec = f'{given[:-1]}{new}{last},{kernel.replace(last, new + last)}->{out}'
    x = x.reshape(*x.shape[:-1], *self._parts)
    return jnp.einsum(spec, x.astype(dtype), self._wide(dtype), preferred_element_type=result)

  def rows(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Of a table, the vectors of `ids`."""
    found = dataclasses.replace(self, values=self.values[ids], scale=self.scale[ids])
    wide = found._wide(dtype)
    return wide.reshape(*wide.shape[:-2], -1)

  @property
  def _parts(self) -> tuple[int, int]:
    """Groups, and the inputs of each."""
    first = self.inputs[-1] - 1
    return self.values.shape[first], self.values.shape[first + 1]

  def _wide(self, dtype: DTypeLike) -> jax.Array:
    scale = jnp.expand_dims(self.scale, self.inputs[-1])
    return (self.values.astype(jnp.float32) * scale).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How arrays are put into 4 bits (`core.contracts.Scheme`).

  Attributes:
    group: inputs that share a scale, of the last axis that is summed over; None: all of a channel.
  """

  group: int | None = 64

  def fits(self, shape: tuple[int, ...], info: Info) -> str | None:
    """See the contract."""
    size = shape[_axes.inputs(info)[-1]]
    if size % 2:
      return f'its {size} inputs are an odd number, and two go into a byte'
    return _axes.refused(shape, info, self.group)

  def form(
    self, kernel: jax.Array, info: Info, seen: Mapping[str, jax.Array] | None = None
  ) -> Int4:
    """See the contract."""
    del seen
    inputs = _axes.inputs(info)
    wide, scale = _axes.scaled(kernel, inputs, self.group, LARGEST)
    values = jnp.clip(jnp.round(wide), -LARGEST, LARGEST).reshape(kernel.shape)
    return Int4(_packed(values, inputs[-1]), scale, inputs)

  def trained(self, kernel: jax.Array, info: Info) -> jax.Array:
    """See the contract."""
    form = self.form(jax.lax.stop_gradient(kernel), info)
    return _axes.straight_through(kernel, form.dense(kernel.dtype))

  def parts(self, info: Info) -> dict[str, Info]:
    """See the contract."""
    return {'packed': info, 'scale': _axes.scale_info(info)}


def _packed(values: jax.Array, axis: int) -> jax.Array:
  """Two numbers in a byte: those of the first half of an axis, and of the second."""
  low, high = jnp.split((values + _ZERO).astype(jnp.uint8), 2, axis=axis)
  return low | (high << 4)


def _values(packed: jax.Array, axis: int) -> jax.Array:
  """The numbers of two in a byte, int8."""
  halves = [packed & 15, packed >> 4]
  return jnp.concatenate(halves, axis=axis).astype(jnp.int8) - _ZERO
