"""Bottleneck adapters: small mlps, `size` wide in the middle, that add to what the halves of a
layer add to the residual stream x,

    y + s (activation(z D + d) U + u)

with z = y after attention and after the mlp (Houlsby et al., arXiv:1902.00751, figure 2); after the
mlp alone with z = norm(x + y), the norm being the layer's own where it comes after the sum
(Pfeiffer et al., arXiv:2005.00247, figure 5); or beside the mlp with z = x (parallel: He et al.,
arXiv:2110.04366, table 5, who take s = 4). They compute what the library `adapters` does, also for
models with norms before the sum, where z is never normed. U and u start at zero, so that the
network starts as its base; Houlsby draws them near zero. They are not linear, and cannot be merged.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax

from llm_jax.adapters import _targets
from llm_jax.core import contracts
from llm_jax.core import params as params_lib
from llm_jax.core.contracts import WeightForm
from llm_jax.core.params import Info
from llm_jax.nn.block import Block
from llm_jax.nn.linear import form, multiply, with_leading_axes
from llm_jax.nn.options import ACTIVATIONS, DTYPES, Options, check_known

HALVES = {'after_attention': 'attention', 'after_mlp': 'mlp'}  # methods of a block
PLACEMENTS = {'houlsby': tuple(HALVES), 'pfeiffer': ('after_mlp',), 'parallel': ('after_mlp',)}
DOWN, UP = 'bottleneck_down', 'bottleneck_up'


class Adapter(contracts.Adapter):
  """Trains the small mlps, and the heads.

  Args:
    size: their width.
    placement: 'houlsby', 'pfeiffer' or 'parallel'.
    activation: one of `nn.options.ACTIVATIONS`.
    scale: s.
    heads: the heads that are trained whole, a regular expression for their names; '' for none,
      None for all but the masked-LM head.

  Raises:
    ValueError: a value that is not possible.
  """

  def __init__(
    self,
    size: int = 64,
    placement: str = 'houlsby',
    activation: str = 'relu',
    scale: float = 1.0,
    heads: str | None = None,
  ):
    if size < 1:
      raise ValueError(f'config.adapter.size={size} must be at least 1.')
    if not 0 < scale < math.inf:
      raise ValueError(f'config.adapter.scale={scale} must be above 0.')
    check_known('config.adapter.placement', placement, PLACEMENTS)
    check_known('config.adapter.activation', activation, ACTIVATIONS)
    self.size, self.placement, self.scale = size, placement, scale
    self.activation, self.heads = activation, _targets.Heads(heads)

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    self.heads.check(base)
    if not any(path.endswith(f'_{DOWN}') for path in infos):
      raise ValueError(
        "config.adapter.name='bottleneck' stands after the attention and the mlp of "
        '`nn.block.Block`, and this model has none.'
      )

  def trains(self, path: str, info: Info, base: bool) -> bool:
    return not base or path in self.heads

  def no_gradient(self, path: str) -> str | None:
    before = (f'_{DOWN}', f'_{DOWN}_bias')
    return 'bottleneck_up is 0' if path.endswith(before) else None

  def intercept(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    method = context.method_name
    if not isinstance(context.module, Block) or method not in PLACEMENTS[self.placement]:
      return next_fun(*args, **kwargs)
    x_BTD, y_BTD, *norm = args
    if self.placement == 'houlsby':
      z_BTD = y_BTD
    elif self.placement == 'parallel':
      z_BTD = x_BTD
    else:
      z_BTD = next_fun(*args)
    y_BTD = y_BTD + self._added(context.module, HALVES[method], z_BTD)
    return next_fun(x_BTD, y_BTD, *norm)

  def _added(self, block: Block, half: str, z_BTD: jax.Array) -> jax.Array:
    options, size = block.options, self.size
    if size > options.dim:
      raise ValueError(
        f'config.adapter.size={size} is above the width of the model, {options.dim}; lower it.'
      )
    dtype = options.compute_dtype
    std = nn.initializers.normal(options.init_std)
    down, up = f'{half}_{DOWN}', f'{half}_{UP}'
    down_DR = _parameter(block, down, (options.dim, size), ('embed', 'rank'), std)
    up_RD = _parameter(block, up, (size, options.dim), ('rank', 'embed'), nn.initializers.zeros)
    h_BTR = multiply(down_DR, '...D,DR->...R', z_BTD, ('embed', 'rank'), dtype, dtype)
    h_BTR = ACTIVATIONS[self.activation](h_BTR + _bias(block, f'{down}_bias', 'rank', size, h_BTR))
    y_BTD = multiply(up_RD, '...R,RD->...D', h_BTR, ('rank', 'embed'), dtype, dtype)
    return self.scale * (y_BTD + _bias(block, f'{up}_bias', 'norm', options.dim, y_BTD))


def _parameter(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  names: tuple[str, ...],
  init: Callable[..., jax.Array],
) -> jax.Array | WeightForm:
  there = form(module, name)  # generation may keep it transposed
  if there is not None:
    return there
  options: Options = module.options
  made = params_lib.boxed(init, names, inputs=(0,), decayed=True)
  return module.param(name, made, shape, DTYPES[options.param_dtype])


def _bias(module: nn.Module, name: str, axis: str, size: int, x: jax.Array) -> jax.Array:
  made = params_lib.boxed(nn.initializers.zeros, (axis,))
  bias = module.param(name, made, (size,), DTYPES[module.options.param_dtype])
  return with_leading_axes(bias.astype(x.dtype), x.ndim)
