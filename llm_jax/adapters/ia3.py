"""(IA)3 (arXiv:2205.05638, section 3.3): vectors that scale the keys, the values, and the hidden
layer of each mlp. They start at one.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.adapters import _ported, _targets
from llm_jax.core import contracts, tree
from llm_jax.core import params as params_lib
from llm_jax.core.contracts import Piece, Ported
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.nn.linear import AXES, Linear, sides, with_leading_axes
from llm_jax.nn.options import DTYPES

INPUT, OUTPUT = 'ia3_input', 'ia3_output'
PEFT_TYPES = ('IA3',)


class Adapter(contracts.Adapter):
  """Trains `ia3_output` of some linear maps, `ia3_input` of others, and the heads.

  Args:
    outputs: the maps whose outputs, bias included, are scaled: a regular expression for the end of
      their paths (`_targets`).
    inputs: the maps whose inputs are scaled. Either may be '' for none, not both.
    heads: the heads that are trained whole, a regular expression for their names; '' for none,
      None for all but the masked-LM head.

  Raises:
    ValueError: no regular expression, or nothing to scale.
  """

  def __init__(
    self, outputs: str = 'attention/(key|value)', inputs: str = 'mlp/down', heads: str | None = None
  ):
    _targets.check_pattern('outputs', outputs)
    _targets.check_pattern('inputs', inputs)
    if not outputs and not inputs:
      raise ValueError("config.adapter.outputs='' and inputs='' scale nothing; give one of them.")
    self.outputs, self.inputs, self.heads = outputs, inputs, _targets.Heads(heads)

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    for option, pattern in (('outputs', self.outputs), ('inputs', self.inputs)):
      if pattern:
        _targets.check_found(option, pattern, infos, base)
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
    linear = _targets.linear(context, self.inputs)
    if linear is not None:
      args = (_scaled(linear, INPUT, args[0]), *args[1:])
    y = next_fun(*args, **kwargs)
    linear = _targets.linear(context, self.outputs)
    return y if linear is None else _scaled(linear, OUTPUT, y)

  def merged(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    leaves = tree.flatten(params)
    merged = {path: x for path, x in leaves.items() if path.split('/')[-1] not in (INPUT, OUTPUT)}
    for name in (INPUT, OUTPUT):
      for module in _targets.modules(leaves, name):
        path, scale = f'{module}/kernel', leaves[f'{module}/{name}']
        _targets.check_dense(leaves, path)
        info = infos[path]
        others = info.outputs if name == INPUT else info.inputs
        axes = tuple(info.stacked + axis for axis in others)
        merged[path] = merged[path] * jnp.expand_dims(scale, axes)
        bias = f'{module}/bias'
        if name == OUTPUT and bias in merged:
          merged[bias] = merged[bias] * scale
    return tree.nest(merged)

  def ported(self, times: int = 1) -> Ported:
    scale = dict(suffix='.ia3_l', fill=1.0)
    outputs = Piece(OUTPUT, theirs='O1', ours='O', targets='outputs', **scale)
    inputs = Piece(
      INPUT, theirs='1I', ours='I', targets='inputs', listed='feedforward_modules', **scale
    )
    return Ported(dict(peft_type='IA3'), (outputs, inputs))

  @classmethod
  def ported_options(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
    """See the contract; that a map scales its inputs, the shape of its vector says."""
    _ported.check('ia3', settings, ('feedforward_modules', 'init_ia3_weights'))
    return {}


def _scaled(linear: Linear, name: str, x: jax.Array) -> jax.Array:
  """The input or the output of a linear map times its vector."""
  inputs, out = sides(linear.spec)
  sizes = dict(zip(inputs + out, linear.shape, strict=True))
  own = out if name == OUTPUT else inputs
  names = ('norm',) if own == 'D' else tuple(AXES[letter] for letter in own)
  init = params_lib.boxed(nn.initializers.ones, names)
  shape = tuple(sizes[letter] for letter in own)
  scale = linear.param(name, init, shape, DTYPES[linear.options.param_dtype])
  return x * with_leading_axes(scale.astype(x.dtype), x.ndim)
