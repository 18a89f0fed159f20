"""Weights in 8 bits: whole numbers from -127 to 127, and a scale for each output channel, or for
each group of inputs of a channel (symmetric, by the largest absolute value: LLM.int8(),
arXiv:2208.07339, section 2.1).

    w = scale * values,    |w - scale * values| <= scale / 2

Of weights alone, products are taken in the compute type: a value of 8 bits is exact in bfloat16,
and the scale of a channel comes after the sum. With activations in 8 bits too (`activations`),
products are those of whole numbers, summed in 32 bits, exactly; the scale of what is multiplied is
that of each token (the largest absolute value of its inputs), or one for all that was found on
texts.
"""

import dataclasses
import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.core.params import Info
from llm_jax.nn.forms import _axes
from llm_jax.parallel.cpu import products

LARGEST = 127
ACTIVATIONS = ('none', 'token', 'tensor')
MOST = 'most'  # what `tensor` wants to know of a kernel's inputs: their largest absolute value


@flax.struct.dataclass
class Int8:
  """A kernel, or a table.

  Attributes:
    values: int8, of the kernel's shape.
    scale: float32, of that shape, but that the axes that are summed over have 1; with groups, the
      last of them as many as there are groups.
    reach: float32, the largest absolute value of an activation, for all tokens; None where each
      token has its own, or where activations are not in 8 bits.
    inputs: the axes that are summed over, counted from the end: -2 in [D, F]. A stack has the same.
    activations: one of `ACTIVATIONS`.
  """

  values: jax.Array
  scale: jax.Array
  reach: jax.Array | None = None
  inputs: tuple[int, ...] = flax.struct.field(default=(-2,), pytree_node=False)
  activations: str = flax.struct.field(default='none', pytree_node=False)

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """See the contract."""
    if self.activations != 'none':
      return self._whole_numbers(spec, x.astype(dtype), result)
    if _axes.groups(self.scale, self.inputs) > 1:
      return _axes.einsum(spec, x.astype(dtype), self.dense(dtype), result)
    y = _axes.einsum(spec, x.astype(dtype), self.values.astype(dtype), result)
    return y * _axes.of_outputs(self.scale.astype(result), self.inputs, y.ndim)

  def dense(self, dtype: DTypeLike) -> jax.Array:
    """The array that it stands for."""
    wide = _axes.grouped(self.values.astype(jnp.float32), self.scale, self.inputs)
    return wide.reshape(self.values.shape).astype(dtype)

  def rows(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Of a table, the vectors of `ids`."""
    return dataclasses.replace(self, values=self.values[ids], scale=self.scale[ids]).dense(dtype)

  def few_rows(self) -> 'FewRows':
    """For a single CPU, where few rows meet it: outputs first, in blocks."""
    values_OI = _axes.outputs_first(self.values, self.inputs)
    width, scale_OG = values_OI.shape[-1], _axes.outputs_first(self.scale, self.inputs)
    return FewRows(
      products.blocks(values_OI, width),
      products.blocks(scale_OG, width),
      self.reach,
      _axes.outputs(self.values, self.inputs),
      self.activations,
    )

  def _whole_numbers(self, spec: str, x: jax.Array, result: DTypeLike) -> jax.Array:
    axes = tuple(range(-len(self.inputs), 0))
    step = _steps(x, axes, self.reach)
    x = _rounded(x, step)
    y = _axes.einsum(spec, x, self.values, jnp.int32).astype(jnp.float32)
    if self.reach is None:
      step = step.reshape(step.shape[: -len(axes)] + (1,) * (y.ndim - step.ndim + len(axes)))
    return (y * step * _axes.of_outputs(self.scale, self.inputs, y.ndim)).astype(result)


@flax.struct.dataclass
class FewRows:
  """An `Int8` with its outputs first, as a single CPU is fast at it; see `parallel.cpu.products`.

  Attributes:
    values_NoI: int8, in blocks; [L, N, o, I] where it is stacked.
    scale_NoG: float32, of each group of inputs.
    reach, activations: as of `Int8`.
    outputs: the sizes that O is made of.
  """

  values_NoI: jax.Array
  scale_NoG: jax.Array
  reach: jax.Array | None
  outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)
  activations: str = flax.struct.field(default='none', pytree_node=False)

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """See the contract."""
    inputs = products.input_axes(spec)
    x_RI = x.reshape(-1, self.values_NoI.shape[-1]).astype(dtype)
    step: jax.Array | float = 1.0
    if self.activations != 'none':
      step = _steps(x_RI, (-1,), self.reach)
      x_RI = _rounded(x_RI, step)

    def product(block: tuple[jax.Array, jax.Array]) -> jax.Array:
      values_oI, scale_oG = block
      if self.activations != 'none':
        return _exact(x_RI, values_oI).astype(jnp.float32) * scale_oG.T
      if scale_oG.shape[-1] > 1:
        return products.matrix_first(x_RI, _axes.wide(values_oI, scale_oG, dtype), result)
      return products.matrix_first(x_RI, values_oI, result) * scale_oG.T.astype(result)

    kept = self.values_NoI, self.scale_NoG
    y_RO = products.blockwise(product, kept, math.prod(self.outputs)) * step
    return y_RO.astype(result).reshape(*x.shape[:-inputs], *self.outputs)


@flax.struct.dataclass
class Rounded:
  """A kernel in training, whose inputs are rounded as those of an `Int8` with
  `activations='token'`.

  Attributes:
    kernel: with rounded values, in its own type.
    inputs: as those of `Int8`.
  """

  kernel: jax.Array
  inputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """See the contract."""
    axes = tuple(range(-len(self.inputs), 0))
    still = jax.lax.stop_gradient(x).astype(jnp.float32)
    step = _step(jnp.max(jnp.abs(still), axis=axes, keepdims=True))
    rounded = _rounded(still, step).astype(jnp.float32) * step
    x = _axes.straight_through(x, rounded.astype(x.dtype))
    return _axes.einsum(spec, x.astype(dtype), self.kernel.astype(dtype), result)


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How arrays are put into 8 bits (`core.contracts.Scheme`).

  Attributes:
    group: inputs that share a scale, of the last axis that is summed over; None: all of a channel.
    activations: one of `ACTIVATIONS`.
  """

  group: int | None = None
  activations: str = 'none'

  def fits(self, shape: tuple[int, ...], info: Info) -> str | None:
    """See the contract."""
    return _axes.refused(shape, info, self.group)

  def form(
    self, kernel: jax.Array, info: Info, seen: Mapping[str, jax.Array] | None = None
  ) -> Int8:
    """See the contract."""
    inputs, reach = _axes.inputs(info), None
    wide, scale = _axes.scaled(kernel, inputs, self.group, LARGEST)
    values = _rounded(wide, 1.0).reshape(kernel.shape)
    activations = 'none' if 'vocab' in info.names else self.activations
    if activations == 'tensor':
      most = jnp.ones(kernel.shape[: info.stacked]) if seen is None else seen[MOST]
      reach = most.astype(jnp.float32)
    return Int8(values, scale, reach, inputs, activations)

  def trained(self, kernel: jax.Array, info: Info) -> 'jax.Array | Rounded':
    """See the contract."""
    form = self.form(jax.lax.stop_gradient(kernel), info)
    through = _axes.straight_through(kernel, form.dense(kernel.dtype))
    if form.activations == 'none':
      return through
    if form.activations == 'tensor':
      raise ValueError(
        "config.compress.activations='tensor' goes by what texts lead to in the end; train with "
        "'token', and compress by it afterwards."
      )
    return Rounded(through, form.inputs)

  def parts(self, info: Info) -> dict[str, Info]:
    """See the contract."""
    return {'values': info, 'scale': _axes.scale_info(info), 'reach': _axes.layer_info(info)}


def _exact(x_RI: jax.Array, w_OI: jax.Array) -> jax.Array:
  """The product of whole numbers of 8 bits, int32: sums of so few of them are exact in float32, in
  which a CPU multiplies faster.
  """
  most = (1 << 24) // LARGEST**2
  parts = range(0, x_RI.shape[-1], most)
  wide = lambda x, start: x[:, start : start + most].astype(jnp.float32)
  return sum(
    products.matrix_first(wide(x_RI, i), wide(w_OI, i), jnp.float32).astype(jnp.int32)
    for i in parts
  )


def _steps(x: jax.Array, axes: tuple[int, ...], reach: jax.Array | None) -> jax.Array:
  """The scale of each token, or that of all."""
  if reach is not None:
    return _step(reach)
  return _step(jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32))


def _step(most: jax.Array) -> jax.Array:
  return jnp.where(most > 0, most, 1) / LARGEST


def _rounded(x: jax.Array, step: jax.Array | float) -> jax.Array:
  return jnp.clip(jnp.round(x / step), -LARGEST, LARGEST).astype(jnp.int8)
