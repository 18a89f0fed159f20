"""Parameters that an adapter has in the module of the token vectors."""

import flax.linen as nn
import jax

from llm_jax.core import params as params_lib
from llm_jax.nn.options import DTYPES


def parameter(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  names: tuple[str | None, ...],
  init: nn.initializers.Initializer,
  inputs: tuple[int, ...] = (),
) -> None:
  """Creates a parameter there; one that multiplies is decayed."""
  with params_lib.in_layer(params_lib.EMBEDDINGS):
    made = params_lib.boxed(init, names, inputs=inputs, decayed=bool(inputs))
    module.param(name, made, shape, DTYPES[module.options.param_dtype])


def value(module: nn.Module, name: str) -> jax.Array:
  """A parameter there."""
  return nn.meta.unbox(module.get_variable('params', name))
