"""Products with weights as XLA is fast at them on a CPU.

There it copies the operands of an einsum to transpose them; products of two matrices are taken as
they are. Where few rows meet a weight, as in generation, the weight goes first and is kept
transposed (`Transposed`).

Letters are those of `llm_jax.nn.options`; R rows, I inputs of a weight, O its outputs.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.parallel import sharding

# Numbers of a block that is widened at once: a megabyte of float32, which a core's cache holds.
BLOCK = 2**18


def alone() -> bool:
  """Whether the program that is being traced has a layout of one CPU."""
  layout = sharding.current()
  return layout is not None and layout.mesh.size == 1 and layout.platform == 'cpu'


def product(spec: str, x: jax.Array, kernel: jax.Array, result: jnp.dtype) -> jax.Array:
  """The einsum '...D,DNH->...NH' as a product of two matrices, and so are its derivatives."""
  inputs = input_axes(spec)
  width = math.prod(kernel.shape[:inputs])
  y_RO = jnp.dot(x.reshape(-1, width), kernel.reshape(width, -1), preferred_element_type=result)
  return y_RO.reshape(*x.shape[:-inputs], *kernel.shape[inputs:])


def input_axes(spec: str) -> int:
  """How many of a kernel's axes are summed over: its first ones; 2 in '...NH,NHD->...D'."""
  letters, _, out = spec.partition(',')[2].replace('...', '').partition('->')
  return len(letters) - len(out)


def inputs_first(spec: str) -> bool:
  """Whether the axes of the kernel that are summed over come first, as `product` wants it."""
  letters, _, out = spec.partition(',')[2].replace('...', '').partition('->')
  return letters.endswith(out)


@flax.struct.dataclass
class Transposed:
  """A kernel for few rows, as a weight form (`core.contracts.WeightForm`).

  Attributes:
    weight_OI: the kernel as a matrix, outputs first; [L, O, I] where it is stacked.
    outputs: the sizes that O is made of.
  """

  weight_OI: jax.Array
  outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

  def product(self, spec: str, x: jax.Array, dtype: jnp.dtype, result: jnp.dtype) -> jax.Array:
    """The einsum of the kernel that this was; see the contract."""
    inputs = input_axes(spec)
    x_RI = x.reshape(-1, math.prod(x.shape[-inputs:])).astype(dtype)
    y_RO = matrix_first(x_RI, self.weight_OI, result)
    return y_RO.reshape(*x.shape[:-inputs], *self.outputs)


def transposed(params: PyTree, infos: Mapping[str, Info]) -> Any:
  """Parameters with the kernels of the layers `Transposed`.

  Args:
    params: of a model, or a part of them, stacked as they were created (`nn.stack.unstacked` takes
      the result).
    infos: what each of them is, by its path in `params`.

  Returns:
    The same; what multiplies nothing, what stands outside of the layers (the vocabulary), and forms
    that have none for few rows (`few_rows`), as they were.
  """

  def chosen(path: str, leaf: Any) -> Any:
    if params_lib.is_form(leaf):
      return leaf.few_rows() if hasattr(leaf, 'few_rows') else leaf
    multiplies = path in infos and _multiplies(infos[path])
    return _transposed(leaf, infos[path]) if multiplies else leaf

  leaves = params_lib.leaves(params)
  return tree.nest({path: chosen(path, leaf) for path, leaf in leaves.items()})


def _multiplies(info: Info) -> bool:
  inside = info.layer is not None and info.layer >= 0
  return inside and bool(info.inputs) and info.inputs == tuple(range(len(info.inputs)))


def _transposed(kernel: jax.Array, info: Info) -> Transposed:
  layers = kernel.shape[: info.stacked]
  sizes = kernel.shape[info.stacked :]
  width = math.prod(sizes[: len(info.inputs)])
  matrix_IO = kernel.reshape(*layers, width, -1)
  return Transposed(matrix_IO.swapaxes(-1, -2), sizes[len(info.inputs) :])


def blocks(x_OI: jax.Array, width: int) -> jax.Array:
  """Rows of a matrix [..., O, I] in blocks, [..., N, o, I], the last of which is filled up with 0.

  Args:
    x_OI: what is kept of it.
    width: how many numbers a row has when it is widened.
  """
  *layers, outputs, inputs = x_OI.shape
  count = -(-outputs * width // BLOCK)
  size = -(-outputs // count)
  fill = [(0, 0)] * len(layers) + [(0, count * size - outputs), (0, 0)]
  return jnp.pad(x_OI, fill).reshape(*layers, count, size, inputs)


def blockwise(product: Callable[[PyTree], jax.Array], kept_No: PyTree, outputs: int) -> jax.Array:
  """Products with a matrix that is made of what is kept of it, [R, O]: block by block, so that what
  is made stays in the cache of a core; XLA would write all of it to memory, and read it again.

  Args:
    product: `blocks` of what is kept, one of each, to products with its rows, [R, o].
    kept_No: arrays that begin with [N, o].
    outputs: O.
  """
  _, y_NRo = jax.lax.scan(lambda _, block: (None, product(block)), None, kept_No)
  return jnp.moveaxis(y_NRo, 0, 1).reshape(y_NRo.shape[1], -1)[:, :outputs]


def matrix_first(x_RI: jax.Array, w_OI: jax.Array, result: jnp.dtype) -> jax.Array:
  """x W^T, [R, O] in the type `result`, for few rows on a CPU: as (W x^T)^T it takes XLA half the
  time, up to some 32 rows.

  The barriers keep XLA from transposing the product back again.
  """
  x_IR = jax.lax.optimization_barrier(x_RI.T)
  y_OR = jnp.einsum('OI,IR->OR', w_OI.astype(x_RI.dtype), x_IR, preferred_element_type=result)
  return jax.lax.optimization_barrier(y_OR).T
