"""An adapter: a vector that is added to what the mlp of each layer gives (BitFit, arXiv:2106.10199,
for one bias). It starts at zero, so that the adapted model starts as the base.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from llm_jax.core import contracts, params


class Adapter(contracts.Adapter):
  """Trains the vectors alone.

  Args:
    after: the name of the modules whose outputs are added to.
  """

  def __init__(self, after: str = 'mlp'):
    self.after = after

  def intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    y_BTD = next_fun(*args, **kwargs)
    if context.method_name != '__call__' or context.module.name != self.after:
      return y_BTD
    init = params.boxed(nn.initializers.zeros, ('norm',))
    vector_D = context.module.param('layer_vector', init, y_BTD.shape[-1:], jnp.float32)
    return y_BTD + vector_D.astype(y_BTD.dtype)[None, None]
