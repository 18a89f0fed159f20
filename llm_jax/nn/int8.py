"""Kernels in 8 bits, as a weight form: whole numbers from -127 to 127, and a scale for each output
channel (symmetric, by the largest absolute value of the channel: LLM.int8(), arXiv:2208.07339,
section 2.1, on weights alone).

    w = scale * values,    |w - scale * values| <= scale / 2

Products are taken in the compute type: a value of 8 bits is exact in bfloat16, and the scale comes
after the sum.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.core.params import Info
from llm_jax.nn.linear import with_leading_axes
from llm_jax.parallel.cpu import products

LARGEST = 127


@flax.struct.dataclass
class Int8:
  """A kernel (`core.contracts.WeightForm`).

  Attributes:
    values: int8, of the kernel's shape.
    scale: float32, of the shape of its outputs; [L, ...] where it is stacked.
  """

  values: jax.Array
  scale: jax.Array

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """See the contract."""
    x, values = x.astype(dtype), self.values.astype(dtype)
    if products.alone():
      y = products.product(spec, x, values, result)
    else:
      y = jnp.einsum(spec, x, values, preferred_element_type=result)
    return y * with_leading_axes(self.scale.astype(result), y.ndim)


def quantized(kernel: jax.Array, info: Info) -> Int8:
  """The form of a kernel, whatever type it has.

  Args:
    kernel: the array.
    info: what it is.
  """
  wide = kernel.astype(jnp.float32)
  inputs = _inputs(info)
  most = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True)
  scale = jnp.where(most > 0, most, 1) / LARGEST
  values = jnp.clip(jnp.round(wide / scale), -LARGEST, LARGEST).astype(jnp.int8)
  return Int8(values, jnp.squeeze(scale, inputs))


def dense(form: Int8, info: Info, dtype: DTypeLike) -> jax.Array:
  """The kernel that a form stands for."""
  scale = jnp.expand_dims(form.scale, _inputs(info))
  return (form.values.astype(jnp.float32) * scale).astype(dtype)


def _inputs(info: Info) -> tuple[int, ...]:
  """The axes of a kernel that are summed over."""
  return tuple(info.stacked + axis for axis in info.inputs)
