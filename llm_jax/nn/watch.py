"""What the layers of a model pass on, for losses that look inside: hidden states, and the queries,
keys and values of attention.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import tree
from llm_jax.core.params import LAYERS
from llm_jax.core.tree import PyTree
from llm_jax.nn.block import Attention, Block, CrossAttention
from llm_jax.nn.linear import Linear

WATCHED = 'watched'  # the collection that they are sown into
HIDDEN, PROJECTED = 'hidden', ('query', 'key', 'value')


def watching(
  next_fun: Callable[..., Any],
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  context: nn.module.InterceptorContext,
) -> Any:
  """Stands around every method of every module (`flax.linen.intercept_methods`)."""
  module, found = context.module, next_fun(*args, **kwargs)
  if context.method_name != '__call__':
    return found
  if isinstance(module, Block):
    _sow(module, HIDDEN, found[0])
  elif isinstance(module, Linear) and module.name in PROJECTED:
    if isinstance(module.parent, Attention) and not isinstance(module.parent, CrossAttention):
      _sow(module, module.name, found)
  return found


def layers(collected: PyTree) -> dict[str, jax.Array]:
  """What was sown, by name, the layers in front: `hidden` [L, B, T, D], `query` [L, B, T, N, H] and
  so on. Layer g P + j of a pattern of P layers is index g of the j-th.
  """
  by_name: dict[str, dict[str, jax.Array]] = {}
  for path, leaf in tree.flatten(collected).items():
    where, _, name = path.rpartition('/')
    by_name.setdefault(name, {})[where] = leaf
  return {name: _in_order(found) for name, found in by_name.items()}


def _in_order(found: Mapping[str, jax.Array]) -> jax.Array:
  stacked = sorted((path for path in found if f'/{LAYERS}/' in path), key=lambda x: (len(x), x))
  alone = [found[path] for path in sorted(found.keys() - set(stacked))]
  if not stacked:
    return jnp.stack(alone)
  groups = jnp.stack([found[path] for path in stacked], axis=1)  # [groups, P, ...]
  whole = groups.reshape(-1, *groups.shape[2:])
  return jnp.concatenate([jnp.stack(alone), whole]) if alone else whole


def _sow(module: nn.Module, name: str, value: jax.Array) -> None:
  module.sow(WATCHED, name, value, lambda _, new: new, lambda: None)
