"""Prompt tuning (arXiv:2104.08691): `length` virtual tokens before each text, whose vectors are all
that is learned of the network. They are ids above the vocabulary (`data.prompted`), which stand in
rows as other tokens do, and see and are seen as these are. They start as small as the vectors of
the vocabulary do; what stands before a text cannot be merged into a kernel.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.adapters import _targets
from llm_jax.core import contracts
from llm_jax.core import params as params_lib
from llm_jax.core.params import Info
from llm_jax.nn.embedder import Embedder
from llm_jax.nn.options import DTYPES

TABLE = 'prompt_embedding'


class Adapter(contracts.Adapter):
  """Trains the vectors of the virtual tokens, and the heads.

  Args:
    length: P, how many there are.
    heads: the heads that are trained whole, a regular expression for their names; '' for none,
      None for all but the masked-LM head.

  Raises:
    ValueError: a value that is not possible.
  """

  def __init__(self, length: int = 20, heads: str | None = None):
    if length < 1:
      raise ValueError(f'config.adapter.length={length} must be at least 1.')
    self.tokens, self.heads = length, _targets.Heads(heads)

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    self.heads.check(base)
    if not any(path.endswith(f'/{TABLE}') for path in infos):
      raise ValueError(
        'virtual tokens need `nn.embedder.Embedder`, which gives tokens their vectors, and this '
        'model has none.'
      )

  def trains(self, path: str, info: Info, base: bool) -> bool:
    return not base or path in self.heads

  def intercept(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    module = context.module
    if not isinstance(module, Embedder) or context.method_name not in ('setup', 'vectors'):
      return next_fun(*args, **kwargs)
    if context.method_name == 'setup':
      next_fun(*args, **kwargs)
      return self.create(module)
    (ids_BT,) = args
    number_BT = ids_BT - module.vocab_size
    virtual_BT = number_BT >= 0
    x_BTD = next_fun(jnp.where(virtual_BT, 0, ids_BT))
    prompt_PD = self.vectors(module).astype(x_BTD.dtype)
    prompt_BTD = prompt_PD[jnp.clip(number_BT, 0, self.tokens - 1)]
    return jnp.where(virtual_BT[..., None], prompt_BTD, x_BTD)

  def create(self, module: Embedder) -> None:
    """Creates what is learned, in an embedder."""
    std = nn.initializers.normal(module.options.init_std)
    parameter(module, TABLE, (self.tokens, module.options.dim), (None, 'embed'), std)

  def vectors(self, module: Embedder) -> jax.Array:
    """The vectors of the virtual tokens, [P, D]."""
    return value(module, TABLE)


def parameter(
  module: Embedder,
  name: str,
  shape: tuple[int, ...],
  names: tuple[str | None, ...],
  init: nn.initializers.Initializer,
  inputs: tuple[int, ...] = (),
) -> None:
  """Creates a parameter in an embedder; one that multiplies is decayed."""
  with params_lib.in_layer(params_lib.EMBEDDINGS):
    made = params_lib.boxed(init, names, inputs=inputs, decayed=bool(inputs))
    module.param(name, made, shape, DTYPES[module.options.param_dtype])


def value(module: Embedder, name: str) -> jax.Array:
  """A parameter of an embedder."""
  return nn.meta.unbox(module.get_variable('params', name))
