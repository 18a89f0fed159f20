"""Prefix-tuning (arXiv:2101.00190): keys and values of `length` positions in each layer, which all
tokens see before their own. The tokens' positions begin behind them.

    softmax(q [K_p; K]^T / sqrt(H)) [V_p; V]

With `hidden` they are what an mlp gives of one table for all layers (section 4.3), which trains
more steadily:  [K_p; V_p] of layer l = tanh(E W + w) U_l + u_l.  They start near zero, which is not
nothing: the network does not start as its base. What is seen before a text cannot be merged into a
kernel.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.adapters import _ported, _targets
from llm_jax.core import contracts, tree
from llm_jax.core import params as params_lib
from llm_jax.core.contracts import Piece, Ported
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.nn.attention.masks import Prefix
from llm_jax.nn.block import Attention
from llm_jax.nn.linear import form
from llm_jax.nn.options import DTYPES, Options
from llm_jax.nn.stack import Stack

PREFIX, UP, UP_BIAS = 'prefix', 'prefix_up', 'prefix_up_bias'
TABLE, HIDDEN, HIDDEN_BIAS = 'prefix_embedding', 'prefix_hidden', 'prefix_hidden_bias'
PEFT_TYPES = ('PREFIX_TUNING',)
_HEADS = (None, 'kv_heads', 'head_dim')
_IN_PEFT = (
  'num_virtual_tokens token_dim num_attention_heads num_layers init_weights encoder_hidden_size '
  'prefix_projection'.split()
)


@flax.struct.dataclass
class Made:
  """Keys and values that the mlp gave, [P, 2, K, H], in the form of a weight, which multiplies
  nothing.
  """

  prefix: jax.Array

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """Not possible."""
    raise TypeError('a prefix multiplies nothing.')


class Adapter(contracts.Adapter):
  """Trains the prefix, and the heads.

  Args:
    length: P, its positions.
    hidden: R, the width of the mlp that makes it of a table; None for none.
    heads: the heads that are trained whole, a regular expression for their names; '' for none,
      None for all but the masked-LM head.

  Raises:
    ValueError: a value that is not possible.
  """

  def __init__(self, length: int = 20, hidden: int | None = None, heads: str | None = None):
    if length < 1:
      raise ValueError(f'config.adapter.length={length} must be at least 1.')
    if hidden is not None and hidden < 1:
      raise ValueError(f'config.adapter.hidden={hidden} must be at least 1, or None for no mlp.')
    self.positions, self.hidden, self.heads = length, hidden, _targets.Heads(heads)

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    self.heads.check(base)
    if not any(path.split('/')[-1] in (PREFIX, UP) for path in infos):
      raise ValueError(
        "config.adapter.name='prefix' stands before the keys and values of `nn.block.Attention`, "
        'and this model has none.'
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
    module, method = context.module, context.method_name
    found = next_fun(*args, **kwargs)
    if isinstance(module, contracts.Model) and method == 'before':
      return found + self.positions
    if isinstance(module, Attention) and method == 'prefix':
      x_P2KH = self._whole(module) if self.hidden is None else self._of_mlp(module)
      return Prefix(x_P2KH[:, 0], x_P2KH[:, 1])
    if isinstance(module, Stack) and method == 'setup' and self.hidden is not None:
      D, R = module.options.dim, self.hidden
      _matrix(module, TABLE, (self.positions, D), (None, 'embed'), ())
      _matrix(module, HIDDEN, (D, R), ('embed', 'rank'), (0,))
      _bias(module, HIDDEN_BIAS, (R,), ('rank',))
    return found

  def weights(self, params: PyTree) -> PyTree:
    if self.hidden is None:
      return params
    leaves = tree.flatten(params)
    for path in [path for path in leaves if path.endswith(f'/{TABLE}')]:
      stack = path.removesuffix(TABLE)
      hidden_PR = jnp.tanh(leaves[path] @ leaves[stack + HIDDEN] + leaves[stack + HIDDEN_BIAS])
      for up in [path for path in leaves if path.startswith(stack) and path.endswith(f'/{UP}')]:
        bias_2KH = leaves[up.removesuffix(UP) + UP_BIAS]
        made = jnp.einsum('PR,...RCKH->...PCKH', hidden_PR, leaves[up])
        leaves[up] = Made(made + jnp.expand_dims(bias_2KH, -4))
    return tree.nest(leaves)

  def ported(self, times: int = 1) -> Ported:
    settings = dict(
      peft_type='PREFIX_TUNING',
      num_virtual_tokens=self.positions,
      num_transformer_submodules=1,
      prefix_projection=False,
    )
    name = PREFIX if self.hidden is None else UP
    prompt = Piece(name, 'prompt_embeddings', 'P(LCKH)', 'LPCKH')
    return Ported(settings, prompt=prompt, tasks=('CAUSAL_LM',))

  def to_ported(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    """See the contract: what the mlp gives, where there is one."""
    leaves = tree.flatten(self.weights(params))
    return tree.nest({path.replace(f'/{UP}/{PREFIX}', f'/{UP}'): x for path, x in leaves.items()})

  @classmethod
  def ported_options(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
    """See the contract; whatever made the prefix, it is what is learned here."""
    _ported.check('prefix', settings, _IN_PEFT, num_transformer_submodules=(None, 1))
    return dict(length=settings.get('num_virtual_tokens'))

  def _whole(self, module: Attention) -> jax.Array:
    shape = self.positions, *_sizes(module.options)
    return _matrix(module, PREFIX, shape, (None, *_HEADS), ())

  def _of_mlp(self, module: Attention) -> jax.Array:
    made = form(module, UP)
    if made is not None:
      return made.prefix
    sizes = _sizes(module.options)
    up_R2KH = _matrix(module, UP, (self.hidden, *sizes), ('rank', *_HEADS), (0,))
    _bias(module, UP_BIAS, sizes, _HEADS)
    return jnp.zeros((self.positions, *sizes), up_R2KH.dtype)  # where parameters are created


def _sizes(options: Options) -> tuple[int, int, int]:
  """2, for keys and values; K; H."""
  return 2, options.kv_heads or options.heads, options.head_dim


def _matrix(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  names: tuple[str | None, ...],
  inputs: tuple[int, ...],
) -> jax.Array:
  options: Options = module.options
  init = params_lib.boxed(
    nn.initializers.normal(options.init_std), names, inputs=inputs, decayed=bool(inputs)
  )
  return module.param(name, init, shape, DTYPES[options.param_dtype])


def _bias(
  module: nn.Module, name: str, shape: tuple[int, ...], names: tuple[str | None, ...]
) -> None:
  init = params_lib.boxed(nn.initializers.zeros, names)
  module.param(name, init, shape, DTYPES[module.options.param_dtype])
