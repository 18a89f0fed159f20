"""LoRA (arXiv:2106.09685, eq. 3): a product of two thin matrices beside a frozen kernel,

    y = x W + b + s drop(x) A B,    s = alpha / R, or alpha / sqrt(R) (rsLoRA, arXiv:2312.03732)

with A [inputs, R] drawn uniformly from +-1 / sqrt(inputs) and B [R, outputs] zero, as `peft` has
them. DoRA (arXiv:2402.09353, eq. 5) also learns the length m of each column of the kernel,

    y = b + m / |W + s A B| (x W + s drop(x) A B)

where the norm is over the inputs and takes no gradient (section 4.3). m = |W| + d, and d is what is
kept: it starts at zero, whatever base is loaded, and has the gradient of m.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.adapters import _low_rank, _targets
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.contracts import Piece, Ported
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.nn.linear import AXES, Linear, sides, with_leading_axes
from llm_jax.nn.options import DTYPES

A, B, MAGNITUDE = 'lora_a', 'lora_b', 'lora_magnitude'
PEFT_TYPE = 'LORA'
_SAME_IN_PEFT = frozenset(  # what changes nothing of what is computed, or is read elsewhere
  'peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version '
  'target_modules exclude_modules modules_to_save fan_in_fan_out init_lora_weights r lora_alpha '
  'lora_dropout use_rslora use_dora bias layers_pattern layers_to_transform megatron_core '
  'qalora_group_size'.split()
)
_INITS = (True, False, 'gaussian')


class Adapter(_low_rank.Adapter):
  """Trains `lora_a` and `lora_b` beside the kernels of linear maps, and the heads.

  Args:
    rank: R.
    alpha: as in s.
    dropout: rate on the input of A.
    targets: of the maps, a regular expression for the end of their paths (`_targets`).
    rslora: s = alpha / sqrt(R).
    dora: learns `lora_magnitude`, d, as well.
    loraplus_lr_ratio: how many times the learning rate of A that of B is (LoRA+, arXiv:2402.12354,
      section 4, who take 16).
    heads: the heads that are trained whole, a regular expression for their names; '' for none,
      None for all but the masked-LM head.

  Raises:
    ValueError: a value that is not possible.

  Example:
    >>> adapter = Adapter(rank=4, alpha=8.0, targets='attention/.*')
    >>> adapter.scale
    2.0
  """

  def __init__(
    self,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str = 'query|value',
    rslora: bool = False,
    dora: bool = False,
    loraplus_lr_ratio: float = 1.0,
    heads: str | None = None,
  ):
    if not 0 < loraplus_lr_ratio < math.inf:
      raise ValueError(
        f'config.adapter.loraplus_lr_ratio={loraplus_lr_ratio} must be above 0; 1 is LoRA itself.'
      )
    if rank < 1:
      raise ValueError(f'config.adapter.rank={rank} must be at least 1.')
    if not 0 < alpha < math.inf:
      raise ValueError(f'config.adapter.alpha={alpha} must be above 0.')
    _targets.check_rate('dropout', dropout)
    _targets.check_pattern('targets', targets)
    self.rank, self.dropout, self.targets, self.dora = rank, dropout, targets, dora
    self.rslora, self.scale = rslora, alpha / (math.sqrt(rank) if rslora else rank)
    self.ratio, self.heads = loraplus_lr_ratio, _targets.Heads(heads)

  def rate(self, path: str) -> float:
    return self.ratio if path.endswith(f'/{B}') else 1.0

  def no_gradient(self, path: str) -> str | None:
    return 'lora_b is 0' if path.endswith(f'/{A}') else None

  def merged(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    leaves = tree.flatten(params)
    merged = {path: x for path, x in leaves.items() if path.split('/')[-1] not in (A, B, MAGNITUDE)}
    for module in _targets.modules(leaves, A):
      path = f'{module}/kernel'
      _targets.check_dense(leaves, path)
      info, kernel = infos[path], leaves[path]
      inputs = tuple(info.stacked + axis for axis in info.inputs)
      a, b = leaves[f'{module}/{A}'], leaves[f'{module}/{B}']
      whole = kernel + self.scale * _low_rank.product(a, b, info.stacked)
      if self.dora:
        ratio = _ratio(kernel, whole, leaves[f'{module}/{MAGNITUDE}'], inputs)
        whole *= jnp.expand_dims(ratio, inputs)
      merged[path] = whole.astype(kernel.dtype)
    return tree.nest(merged)

  def ported(self, times: int = 1) -> Ported:
    rank = self.rank * times
    settings = dict(
      peft_type=PEFT_TYPE,
      r=rank,
      lora_alpha=self.scale * (math.sqrt(rank) if self.rslora else rank),
      lora_dropout=self.dropout,
      use_rslora=self.rslora,
      use_dora=self.dora,
    )
    pieces = Piece(A, '.lora_A.weight', 'RI', 'IR'), Piece(B, '.lora_B.weight', 'OR', 'RO')
    if self.dora:
      pieces += (Piece(MAGNITUDE, '.lora_magnitude_vector', 'O', 'O', fills=False),)
    return Ported(settings, pieces)

  def to_ported(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    return _with_norms(params, infos, 1)

  def from_ported(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    return _with_norms(params, infos, -1)

  @classmethod
  def ported_options(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
    """See the contract."""
    other = {k: v for k, v in settings.items() if k not in _SAME_IN_PEFT and v}
    if settings.get('init_lora_weights', True) not in _INITS:  # 'pissa' and others change the base
      other['init_lora_weights'] = settings['init_lora_weights']
    if settings.get('bias', 'none') != 'none':
      other['bias'] = settings['bias']
    if other:
      shown = ', '.join(f'{key}={value!r}' for key, value in other.items())
      raise ValueError(
        f'{shown}: lora does not have it here; merge the adapter by peft (merge_and_unload) and '
        'open the result.'
      )
    return dict(
      rank=settings.get('r', 8),  # peft's defaults
      alpha=float(settings.get('lora_alpha', 8)),
      dropout=float(settings.get('lora_dropout', 0)),
      rslora=bool(settings.get('use_rslora')),
      dora=bool(settings.get('use_dora')),
    )

  def _adapted(self, linear: Linear, x: jax.Array, y: jax.Array) -> jax.Array:
    """The output `y` of a linear map for `x`, with what is learned beside it."""
    pair = _low_rank.pair(linear, self.rank, (A, B), (_uniform, nn.initializers.zeros))
    added = self.scale * pair.widened(pair.narrowed(x, self.dropout), y.dtype)
    return self._rescaled(linear, pair.product(), y, added) if self.dora else y + added

  def _rescaled(
    self, linear: Linear, product: jax.Array, y: jax.Array, added: jax.Array
  ) -> jax.Array:
    """DoRA's output, where `product` is A B, `y` the base's output and `added` LoRA's."""
    options = linear.options
    kernel = nn.meta.unbox(linear.get_variable('params', 'kernel'))
    letters, out = sides(linear.spec)
    sizes, inputs = dict(zip(letters + out, linear.shape, strict=True)), tuple(range(len(letters)))
    kernel = _low_rank.dense(kernel, linear.spec, sizes, options.accumulation_dtype)
    names = ('norm',) if out == 'D' else tuple(AXES[letter] for letter in out)
    init = params_lib.boxed(nn.initializers.zeros, names)
    shape, kept = kernel.shape[len(inputs) :], DTYPES[options.param_dtype]
    magnitude = linear.param(MAGNITUDE, init, shape, kept)
    ratio = _ratio(kernel, kernel + self.scale * product, magnitude, inputs)
    # As a difference before it is rounded to the compute type, so that small ones are not lost.
    more, ratio = (with_leading_axes(x.astype(y.dtype), y.ndim) for x in (ratio - 1, ratio))
    without_bias = y
    if linear.bias:
      bias = nn.meta.unbox(linear.get_variable('params', 'bias'))
      without_bias = y - with_leading_axes(bias.astype(y.dtype), y.ndim)
    return y + (more * without_bias + ratio * added)  # y itself at the start


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """+-1 / sqrt(inputs), the last dimension being R."""
  bound = 1 / math.sqrt(math.prod(shape[:-1]))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def _with_norms(params: PyTree, infos: Mapping[str, Info], sign: int) -> dict[str, Any]:
  """The parameters with the norms of the kernels' columns added to what is learned of DoRA's
  magnitudes, or subtracted.
  """
  leaves = tree.flatten(params)
  for module in _targets.modules(leaves, MAGNITUDE):
    path = f'{module}/kernel'
    _targets.check_dense(leaves, path)
    inputs = tuple(infos[path].stacked + axis for axis in infos[path].inputs)
    norm = jnp.sqrt(jnp.sum(jnp.square(leaves[path].astype(jnp.float32)), axis=inputs))
    leaves[f'{module}/{MAGNITUDE}'] += sign * norm.astype(leaves[f'{module}/{MAGNITUDE}'].dtype)
  return tree.nest(leaves)


def _ratio(
  kernel: jax.Array, whole: jax.Array, magnitude: jax.Array, inputs: tuple[int, ...]
) -> jax.Array:
  """(|W| + d) / |W + s A B|: 1 to the bit where d and B are zero."""
  before, after = (jnp.sqrt(jnp.sum(jnp.square(x), axis=inputs)) for x in (kernel, whole))
  tiny = jnp.finfo(after.dtype).tiny  # of a column of zeros
  return (before + magnitude) / jax.lax.stop_gradient(jnp.maximum(after, tiny))
