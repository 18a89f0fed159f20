"""Linear maps, norms and tables: the layers that have parameters, and how those are created.

Every parameter says what it is (`core.params.boxed`): the logical axes of its dimensions (`AXES`),
which of them are summed over, and whether it is decayed. Its last path component is `kernel`,
`embedding`, `bias` or `scale`.

`multiply` is the one door to a weight: a kernel as it stands, or a form that an adapter, a
quantizer or a generator has put in its place.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import params as params_lib
from llm_jax.core.contracts import WeightForm
from llm_jax.nn.options import DTYPES, INITIALIZERS, Options
from llm_jax.parallel import fsdp
from llm_jax.parallel.cpu import products

AXES = {
  'D': 'embed',
  'N': 'heads',
  'K': 'kv_heads',
  'H': 'head_dim',
  'F': 'mlp',
  'V': 'vocab',
  'C': 'classes',
  'R': 'rank',  # which no rule cuts
}


class Linear(nn.Module):
  """y = x W + b for the dimensions that `spec` names.

  A weight form may stand in the params tree where the kernel does.

  Attributes:
    spec: the einsum, '...D,DNH->...NH' say; the kernel's letters give its logical axes.
    shape: shape of the kernel.
    options: types and initialisation.
    bias: whether there is one.
    std: standard deviation of the kernel at initialisation; None for `options.init_std`.
    accumulated: the result is in `options.accumulation_dtype` (logits of a few classes).
  """

  spec: str
  shape: tuple[int, ...]
  options: Options
  bias: bool
  std: float | None = None
  accumulated: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    options = self.options
    inputs, out = sides(self.spec)
    letters = inputs + out
    names = tuple(AXES[letter] for letter in letters)
    dtype = options.compute_dtype
    result = options.accumulation_dtype if self.accumulated else dtype
    y = multiply(self._weight(letters, len(inputs)), self.spec, x, names, dtype, result)
    if self.bias:
      sizes = dict(zip(letters, self.shape, strict=True))
      bias = vector(self, 'bias', out, tuple(sizes[letter] for letter in out), options)
      y += with_leading_axes(bias.astype(result), y.ndim)
    return y

  def _weight(self, letters: str, summed: int) -> jax.Array | WeightForm:
    there = form(self, 'kernel')
    if there is not None:
      return there
    inputs = tuple(range(summed))
    return matrix(
      self, 'kernel', letters, self.shape, self.options, inputs, self.std, formable=True
    )


def multiply(
  weight: jax.Array | WeightForm,
  spec: str,
  x: jax.Array,
  names: tuple[str | None, ...],
  dtype: jnp.dtype,
  result: jnp.dtype,
) -> jax.Array:
  """The einsum `spec` of `x` and a weight: every projection of every model comes through here.

  Args:
    weight: a kernel, in the type that it is kept in, or a form that multiplies in its own way.
    spec: as '...D,DNH->...NH'; the axes that are summed over come first in the kernel.
    x: activations; the first dimension is the row.
    names: logical axes of the kernel's dimensions.
    dtype: the type that is multiplied in.
    result: the type to sum in and to return.
  """
  if params_lib.is_form(weight):
    return weight.product(spec, x, dtype, result)
  x, kernel = x.astype(dtype), weight.astype(dtype)
  if products.alone():
    return products.product(spec, x, kernel, result)
  gathering = fsdp.gathering(names, kernel.shape, x.shape[0])
  if gathering is not None:
    return gathering.product(spec, x, kernel, result)
  return jnp.einsum(spec, x, kernel, preferred_element_type=result)


def sides(spec: str) -> tuple[str, str]:
  """The letters of a kernel that are summed over, which come first, and the others.

  Example:
    >>> sides('...NH,NHD->...D')
    ('NH', 'D')
  """
  letters, out = spec.split(',')[1].replace('...', '').split('->')
  return letters.removesuffix(out), out


def form(module: nn.Module, name: str) -> WeightForm | None:
  """The weight form that stands where a parameter of a module does, if one does."""
  if not module.has_variable('params', name):
    return None
  there = nn.meta.unbox(module.get_variable('params', name))
  return there if params_lib.is_form(there) else None


class Norm(nn.Module):
  """LayerNorm or RMSNorm over the last dimension, computed in at least float32; the result is in
  the compute type.
  """

  options: Options

  @nn.compact
  def __call__(self, x_D: jax.Array) -> jax.Array:
    options = self.options
    x = x_D.astype(options.accumulation_dtype)
    if options.norm == 'layernorm':
      x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + options.norm_eps)
    x *= self._vector('scale', x)
    if options.norm_bias:
      x += self._vector('bias', x)
    return x.astype(options.compute_dtype)

  def _vector(self, name: str, x: jax.Array) -> jax.Array:
    found = vector(self, name, 'D', x.shape[-1:], self.options)
    return with_leading_axes(found.astype(x.dtype), x.ndim)


class Embedding(nn.Module):
  """A table of `size` vectors; of the vocabulary, a weight form may stand in its place.

  Attributes:
    size: how many.
    axis: the logical axis that counts them. Tables other than 'vocab', which is the projection on
      the vocabulary too, are whole on each device.
    options: types and initialisation.
    std: standard deviation at initialisation; None for `options.init_std`.
  """

  size: int
  axis: str
  options: Options
  std: float | None = None

  def setup(self):
    vocab = self.axis == 'vocab'
    init = params_lib.boxed(
      initializer(self.options, self.std),
      (self.axis, 'embed' if vocab else 'norm'),
      inputs=(1,) if vocab else (),
      decayed=True,
      formable=vocab,
    )
    shape = self.size, self.options.dim
    there = form(self, 'embedding')
    if there is not None:
      self.embedding = there
      return
    with params_lib.in_layer(params_lib.EMBEDDINGS):
      self.embedding = self.param('embedding', init, shape, DTYPES[self.options.param_dtype])

  def __call__(self, ids: jax.Array) -> jax.Array:
    """Vectors of `ids`, at least float32."""
    return self.embedding[ids].astype(self.options.accumulation_dtype)


class Output(nn.Module):
  """The kernel [D, V] of a projection on the vocabulary that is not tied to the token table, or a
  weight form in its place.
  """

  size: int
  options: Options

  def setup(self):
    there, shape = form(self, 'kernel'), (self.options.dim, self.size)
    if there is not None:
      self.kernel = there
    else:
      self.kernel = matrix(self, 'kernel', 'DV', shape, self.options, inputs=(0,), formable=True)


def matrix(
  module: nn.Module,
  name: str,
  letters: str,
  shape: tuple[int, ...],
  options: Options,
  inputs: tuple[int, ...],
  std: float | None = None,
  formable: bool = False,
) -> jax.Array:
  """Creates a parameter that multiplies activations: drawn at random, and decayed.

  Args:
    module: whose parameter it is.
    name: its name there.
    letters: one of `AXES` for each dimension.
    shape: its shape.
    options: types and distribution.
    inputs: the dimensions that are summed over.
    std: standard deviation; None for `options.init_std`.
    formable: whether a weight form may stand in its place.
  """
  names = tuple(AXES[letter] for letter in letters)
  init = params_lib.boxed(
    initializer(options, std), names, inputs=inputs, decayed=True, formable=formable
  )
  return module.param(name, init, shape, DTYPES[options.param_dtype])


def vector(
  module: nn.Module, name: str, letters: str, shape: tuple[int, ...], options: Options
) -> jax.Array:
  """Creates a `bias`, which starts at 0, or a `scale`, which starts at 1; neither is decayed."""
  init = {'bias': jax.nn.initializers.zeros, 'scale': jax.nn.initializers.ones}[name]
  # Vectors as long as the model is wide are whole on each device.
  names = ('norm',) if letters == 'D' else tuple(AXES[letter] for letter in letters)
  return module.param(name, params_lib.boxed(init, names), shape, DTYPES[options.param_dtype])


def initializer(options: Options, std: float | None = None) -> jax.nn.initializers.Initializer:
  """The distribution that kernels and tables are drawn from."""
  return INITIALIZERS[options.init_distribution](options.init_std if std is None else std)


def with_leading_axes(x: jax.Array, ndim: int) -> jax.Array:
  """`x` with leading axes of size 1 up to `ndim`, so that broadcasting is stated, not implied."""
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)
