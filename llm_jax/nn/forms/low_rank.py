"""Kernels as the product of two thin ones, by their largest singular values:

    W [I, O] = U S V^T  ->  (U_R S_R^1/2) (S_R^1/2 V_R^T),    R (I + O) < I O numbers in place of I
    O

With what is known of the inputs x, the error of the products is made small, not that of the
weights: rows of W are multiplied by the root of the mean square of their input before, and divided
by it afterwards (the diagonal of the whitening in SVD-LLM, arXiv:2403.07378).
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

SQUARE = 'square'  # what it wants to know of a kernel's inputs: the mean of their squares
_LEAST = 1e-6  # of the largest: an input that texts never reach does not vanish


@flax.struct.dataclass
class LowRank:
  """A kernel whose axes that are summed over come first.

  Attributes:
    down: [inputs ..., R]; of a stack [L, inputs ..., R].
    up: [R, outputs ...].
    summed: how many axes are summed over.
  """

  down: jax.Array
  up: jax.Array
  summed: int = flax.struct.field(default=1, pytree_node=False)

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """See the contract."""
    letters, out = spec.split(',')[1].replace('...', '').split('->')
    inputs = letters.removesuffix(out)
    down, up = self.down.astype(dtype), self.up.astype(dtype)
    h = _axes.einsum(f'...{inputs},{inputs}R->...R', x.astype(dtype), down, dtype)
    return _axes.einsum(f'...R,R{out}->...{out}', h, up, result)

  def dense(self, dtype: DTypeLike) -> jax.Array:
    """The array that it stands for."""
    stacked = self.down.ndim - self.summed - 1
    down = self.down.reshape(*self.down.shape[:stacked], -1, self.down.shape[-1])
    up = self.up.reshape(*self.up.shape[: stacked + 1], -1)
    shape = *self.down.shape[:-1], *self.up.shape[stacked + 1 :]
    return jnp.matmul(down, up).reshape(shape).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How kernels are made thin (`core.contracts.Scheme`).

  Attributes:
    rank: R, at most; a kernel with fewer singular values has all of them.
  """

  rank: int

  def fits(self, shape: tuple[int, ...], info: Info) -> str | None:
    """See the contract."""
    if _axes.is_table(info):
      return 'a table of vectors is read row by row'
    inputs, outputs = sides(shape, info)
    if self.rank * (inputs + outputs) >= inputs * outputs:
      return f'two kernels of rank {self.rank} are no smaller than one of {inputs} x {outputs}'
    return None

  def form(
    self, kernel: jax.Array, info: Info, seen: Mapping[str, jax.Array] | None = None
  ) -> LowRank:
    """See the contract."""
    layers, sizes = kernel.shape[: info.stacked], kernel.shape[info.stacked :]
    summed = len(info.inputs)
    inputs, outputs = sides(kernel.shape, info)
    wide = kernel.astype(jnp.float32).reshape(*layers, inputs, outputs)
    weight = jnp.ones((*layers, inputs))
    if seen is not None:
      square = seen[SQUARE].astype(jnp.float32).reshape(*layers, inputs)
      weight = jnp.sqrt(jnp.maximum(square, _LEAST * jnp.max(square, axis=-1, keepdims=True)))
      weight = jnp.where(jnp.max(square, axis=-1, keepdims=True) > 0, weight, 1.0)
    u, s, v = jnp.linalg.svd(wide * weight[..., None], full_matrices=False)
    rank = min(self.rank, inputs, outputs)
    root = jnp.sqrt(s[..., :rank])
    down = u[..., :rank] * root[..., None, :] / weight[..., None]
    up = root[..., None] * v[..., :rank, :]
    return LowRank(
      down.reshape(*layers, *sizes[:summed], rank),
      up.reshape(*layers, rank, *sizes[summed:]),
      summed,
    )

  def trained(self, kernel: jax.Array, info: Info) -> jax.Array:
    """See the contract."""
    raise ValueError(
      'kernels of low rank are not learned as such: compress by it, and train what comes of it on.'
    )

  def parts(self, info: Info) -> dict[str, Info]:
    """See the contract."""
    at = info.stacked + len(info.inputs)
    layers, kind = info.names[: info.stacked], dict(layer=info.layer, period=info.period)
    inputs = tuple(range(len(info.inputs)))
    return {
      'down': Info((*info.names[:at], None), inputs, info.decayed, **kind),
      'up': Info((*layers, None, *info.names[at:]), (0,), info.decayed, **kind),
    }


def sides(shape: tuple[int, ...], info: Info) -> tuple[int, int]:
  """Inputs and outputs of a kernel of this shape."""
  sizes = shape[info.stacked :]
  return math.prod(sizes[: len(info.inputs)]), math.prod(sizes[len(info.inputs) :])
