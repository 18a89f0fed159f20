"""A weight form: a kernel as 8-bit integers, and a scale for each output (arXiv:2208.07339,
section 2.1, for the weight alone).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.core.params import Info


@flax.struct.dataclass
class Int8:
  """Stands where the kernel did.

  Attributes:
    values: int8, of the kernel's shape.
    scales: float32, the same with size 1 along the dimensions that are summed over.
  """

  values: jax.Array
  scales: jax.Array

  def product(self, spec: str, x: jax.Array, dtype: Any, result: Any) -> jax.Array:
    y = jnp.einsum(spec, x.astype(dtype), self.values.astype(dtype), preferred_element_type=result)
    letters, out = spec.split(',')[1].replace('...', '').split('->')
    sizes = dict(zip(letters, self.scales.shape, strict=True))
    shape = [1] * (y.ndim - len(out)) + [sizes[letter] for letter in out]
    return y * self.scales.reshape(shape).astype(result)

  def dense(self) -> jax.Array:
    """The kernel that this multiplies as."""
    return self.values * self.scales


def quantized(kernel: jax.Array, info: Info) -> Int8:
  """The nearest form to a kernel, stacked over layers or not."""
  summed = tuple(info.stacked + axis for axis in info.inputs)
  scales = jnp.max(jnp.abs(kernel), axis=summed, keepdims=True) / 127
  values = jnp.round(kernel / jnp.maximum(scales, 1e-12)).astype(jnp.int8)
  return Int8(values, scales)
