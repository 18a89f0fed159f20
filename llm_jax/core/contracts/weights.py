"""Weights that are no arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import jax
from jax.typing import DTypeLike

if TYPE_CHECKING:
  from llm_jax.core.params import Info


class WeightForm(Protocol):
  """A pytree that stands where a kernel does, and multiplies in its own way.

  Transposed, quantized or low-rank forms are of this kind. `nn.linear.multiply` is where every
  projection meets one, in training, generation and plans.
  """

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """The einsum `spec` ('...D,DF->...F') of x and the weight.

    Args:
      spec: the einsum of the dense kernel.
      x: activations.
      dtype: the type to multiply in.
      result: the type to sum in and to return.
    """
    ...


class StoredForm(WeightForm, Protocol):
  """A form in which a folder keeps a kernel, or a table: its arrays are all that is written of it.

  It is a flax dataclass. What its fields are follows from the scheme that makes it.
  """

  def dense(self, dtype: DTypeLike) -> jax.Array:
    """The array that it stands for."""
    ...

  def rows(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Of a table [V, D], the vectors of `ids`; only forms that fit a table have it."""
    ...


class Scheme(Protocol):
  """How an array is put into a form. Equal schemes make equal forms, and it can be hashed."""

  def fits(self, shape: tuple[int, ...], info: 'Info') -> str | None:
    """Why an array cannot have the form, None where it can: 'its 3 inputs are an odd number'."""
    ...

  def form(
    self, kernel: jax.Array, info: 'Info', seen: Mapping[str, jax.Array] | None = None
  ) -> StoredForm:
    """The form of an array; traced.

    Args:
      kernel: the array, stacked or not, of any float type.
      info: what it is.
      seen: what is known of what it multiplies (`Compression.looks_at`); None where nothing is.
    """
    ...

  def trained(self, kernel: jax.Array, info: 'Info') -> 'jax.Array | WeightForm':
    """What stands for a kernel while it is trained: it multiplies as the form does, and its
    gradient goes to the kernel (arXiv:1308.3432: straight through what rounds).

    Raises:
      ValueError: the form is not learned.
    """
    ...

  def parts(self, info: 'Info') -> dict[str, 'Info']:
    """What each array of the form is, by its field; one that a form lacks may be among them."""
    ...
