"""Two thin matrices beside a kernel: how they are made, multiplied, and multiplied out."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.adapters import _targets
from llm_jax.core import contracts
from llm_jax.core import params as params_lib
from llm_jax.core.contracts import WeightForm
from llm_jax.core.params import Info
from llm_jax.nn.dropout import dropout as drop
from llm_jax.nn.linear import AXES, Linear, form, multiply, sides
from llm_jax.nn.options import DTYPES

Initializer = Callable[..., jax.Array]


class Pair(NamedTuple):
  """The matrices of one linear map.

  Attributes:
    linear: the map.
    a: [inputs, R], an array or a weight form, and the names of its axes.
    b: [R, outputs], likewise.
    into, out_of: the einsums that multiply by each.
    sizes: of each letter of these.
  """

  linear: Linear
  a: tuple[jax.Array | WeightForm, tuple[str, ...]]
  b: tuple[jax.Array | WeightForm, tuple[str, ...]]
  into: str
  out_of: str
  sizes: Mapping[str, int]

  def narrowed(self, x: jax.Array, rate: float) -> jax.Array:
    """drop(x) A, [..., R]."""
    linear, (a, names) = self.linear, self.a
    if rate and linear.has_rng('dropout'):
      x = drop(x, rate, linear.make_rng('dropout'))
    dtype = linear.options.compute_dtype
    return multiply(a, self.into, x, names, dtype, dtype)

  def widened(self, h: jax.Array, result: Any) -> jax.Array:
    """h B, [..., outputs], of the type `result`."""
    b, names = self.b
    return multiply(b, self.out_of, h, names, self.linear.options.compute_dtype, result)

  def product(self) -> jax.Array:
    """A B with the axes of the kernel, in the type of the parameters."""
    kept = DTYPES[self.linear.options.param_dtype]
    a, b = (
      dense(self.a[0], self.into, self.sizes, kept),
      dense(self.b[0], self.out_of, self.sizes, kept),
    )
    return product(a, b)


class Adapter(contracts.Adapter):
  """Something beside the linear maps of the model that match a pattern, and heads.

  Attributes:
    targets: the pattern (`_targets`).
    heads: those that are trained whole.
  """

  targets: str
  heads: _targets.Heads

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    _targets.check_found('targets', self.targets, infos, base)
    self.heads.check(base)

  def trains(self, path: str, info: Info, base: bool) -> bool:
    return not base or path in self.heads

  def intercept(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    y = next_fun(*args, **kwargs)
    linear = _targets.linear(context, self.targets)
    return y if linear is None else self._adapted(linear, args[0], y)

  def _adapted(self, linear: Linear, x: jax.Array, y: jax.Array) -> jax.Array:
    """The output `y` of a linear map for `x`, with what is learned beside it."""
    raise NotImplementedError


def pair(
  linear: Linear, rank: int, names: tuple[str, str], inits: tuple[Initializer, Initializer]
) -> Pair:
  """The matrices of a linear map, made where they are not there.

  Args:
    linear: the map, from inside of one of its methods.
    rank: R.
    names: of A and B.
    inits: how each begins.

  Raises:
    ValueError: a rank above the smaller dimension of the map.
  """
  inputs, out = sides(linear.spec)
  sizes = dict(zip(inputs + out, linear.shape, strict=True)) | {'R': rank}
  _check_rank(linear, rank, math.prod(sizes[i] for i in inputs), math.prod(sizes[o] for o in out))
  kept = DTYPES[linear.options.param_dtype]

  def matrix(name: str, letters: str, summed: int, init: Initializer) -> Any:
    axes = tuple(AXES[letter] for letter in letters)
    there = form(linear, name)  # generation may keep it transposed
    if there is None:
      made = params_lib.boxed(init, axes, inputs=tuple(range(summed)), decayed=True)
      there = linear.param(name, made, tuple(sizes[letter] for letter in letters), kept)
    return there, axes

  a = matrix(names[0], f'{inputs}R', len(inputs), inits[0])
  b = matrix(names[1], f'R{out}', 1, inits[1])
  into, out_of = f'...{inputs},{inputs}R->...R', f'...R,R{out}->...{out}'
  return Pair(linear, a, b, into, out_of, sizes)


def product(a: jax.Array, b: jax.Array, stacked: bool = False) -> jax.Array:
  """A B with the axes of a kernel; of each layer by itself where they are `stacked`."""
  layers, rank = a.shape[:stacked], a.shape[-1]
  thin, wide = a.reshape(*layers, -1, rank), b.reshape(*layers, rank, -1)
  product = jnp.matmul(thin, wide, precision='highest')
  return product.reshape(*a.shape[:-1], *b.shape[stacked + 1 :])


def dense(
  weight: jax.Array | WeightForm, spec: str, sizes: Mapping[str, int], dtype: jnp.dtype
) -> jax.Array:
  """A weight as an array; of a weight form, its product with the identity."""
  if not params_lib.is_form(weight):
    return weight.astype(dtype)
  letters, out = sides(spec)
  inputs = [sizes[letter] for letter in letters]
  identity = jnp.eye(math.prod(inputs), dtype=dtype).reshape(-1, *inputs)
  product = weight.product(spec, identity, dtype, dtype)
  return product.reshape(*inputs, *[sizes[letter] for letter in out])


def _check_rank(linear: Linear, rank: int, inputs: int, outputs: int) -> None:
  if rank > min(inputs, outputs):
    raise ValueError(
      f'config.adapter.rank={rank} is above the smaller dimension of '
      f'{"/".join(linear.path)}, {min(inputs, outputs)} (of {inputs} x {outputs}); lower it, or '
      'leave this map out of config.adapter.targets.'
    )
