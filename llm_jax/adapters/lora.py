"""LoRA (arXiv:2106.09685, eq. 3): a product of two thin matrices beside a frozen kernel,

    y = x W + b + s drop(x) A B,    s = alpha / R, or alpha / sqrt(R) (rsLoRA, arXiv:2312.03732)

with A [inputs, R] drawn uniformly from +-1 / sqrt(inputs) and B [R, outputs] zero, as `peft` has
them. DoRA (arXiv:2402.09353, eq. 5) also learns the length m of each column of the kernel,

    y = b + m / |W + s A B| (x W + s drop(x) A B)

where the norm is over the inputs and takes no gradient (section 4.3). m = |W| + d, and d is what is
kept: it starts at zero, whatever base is loaded, and has the gradient of m.

Beside the token table it is  E + s A B  with A [V, R] zero and B [R, D] drawn from N(0, 1), without
dropout, as there. What a tied table gives as the projection on the vocabulary stays the base's.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.adapters import _embedder, _low_rank, _ported, _targets
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.contracts import Piece, Ported
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.nn.embedder import Embedder
from llm_jax.nn.linear import AXES, Embedding, Linear, multiply, sides, with_leading_axes
from llm_jax.nn.options import DTYPES

A, B, MAGNITUDE = 'lora_a', 'lora_b', 'lora_magnitude'
TABLE_A, TABLE_B = 'lora_embedding_a', 'lora_embedding_b'
PEFT_TYPES = ('LORA',)
OUTPUT = 'model/output/kernel'  # of a projection on the vocabulary that is not tied
_OWN = A, B, MAGNITUDE, TABLE_A, TABLE_B
_IN_PEFT = (  # beside what is the same in all methods
  'r lora_alpha lora_dropout use_rslora use_dora megatron_core qalora_group_size'.split()
)
_INITS = (True, False, 'gaussian')  # 'pissa' and others change the base


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
    embeddings: beside the table of tokens too.
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
    embeddings: bool = False,
    heads: str | None = None,
  ):
    if embeddings and dora:
      raise ValueError(
        'config.adapter.dora=True is of the columns of kernels, and tables have none; leave '
        'config.adapter.embeddings or config.adapter.dora out.'
      )
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
    self.embeddings = embeddings

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    if self.targets or not self.embeddings:
      super().check(infos, base)
    self.heads.check(base)
    if self.embeddings and not any(path.endswith(f'/{TABLE_A}') for path in infos):
      raise ValueError(
        'config.adapter.embeddings=True needs `nn.embedder.Embedder`, and this model has none; '
        'leave it out.'
      )

  def intercept(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    module, method = context.module, context.method_name
    if self.embeddings and isinstance(module, Embedding) and method == 'setup':
      next_fun(*args, **kwargs)
      return self._create(module) if module.axis == 'vocab' else None
    if self.embeddings and isinstance(module, Embedder) and method == 'vectors':
      return self._looked_up(module.token, args[0], next_fun(*args, **kwargs))
    return super().intercept(next_fun, args, kwargs, context)

  def rate(self, path: str) -> float:
    return self.ratio if path.endswith(f'/{B}') else 1.0

  def no_gradient(self, path: str) -> str | None:
    if path.endswith(f'/{TABLE_B}'):
      return 'lora_embedding_a is 0'
    return 'lora_b is 0' if path.endswith(f'/{A}') else None

  def merged(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    leaves = tree.flatten(params)
    merged = {path: x for path, x in leaves.items() if path.split('/')[-1] not in _OWN}
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
    for module in _targets.modules(leaves, TABLE_A):
      _check_free(module, leaves)
      a, b = (leaves[f'{module}/{name}'] for name in (TABLE_A, TABLE_B))
      path, added = f'{module}/embedding', jnp.matmul(a, b, precision='highest')
      merged[path] = (leaves[path] + self.scale * added).astype(leaves[path].dtype)
    return tree.nest(merged)

  def ported(self, times: int = 1) -> Ported:
    rank = self.rank * times
    settings = dict(
      peft_type='LORA',
      bias='none',
      r=rank,
      lora_alpha=self.scale * (math.sqrt(rank) if self.rslora else rank),
      lora_dropout=self.dropout,
      use_rslora=self.rslora,
      use_dora=self.dora,
    )
    pieces = Piece(A, '.lora_A.weight', 'RI', 'IR'), Piece(B, '.lora_B.weight', 'OR', 'RO')
    if self.dora:
      pieces += (Piece(MAGNITUDE, '.lora_magnitude_vector', 'O', 'O', fill=None),)
    table = dict(targets='embeddings', beside='embedding')
    pieces += (
      Piece(TABLE_A, '.lora_embedding_A', 'RI', 'IR', **table),
      Piece(TABLE_B, '.lora_embedding_B', 'OR', 'RO', **table),
    )
    return Ported(settings, pieces)

  def to_ported(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    return _with_norms(params, infos, 1)

  def from_ported(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    return _with_norms(params, infos, -1)

  @classmethod
  def ported_options(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
    """See the contract."""
    _ported.check('lora', settings, _IN_PEFT, init_lora_weights=_INITS, bias=('none',))
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

  def _create(self, module: Embedding) -> None:
    """Creates the matrices of a table."""
    V, D, R = module.size, module.options.dim, self.rank
    if R > min(V, D):
      raise ValueError(f'config.adapter.rank={R} is above {min(V, D)}, the smaller of {V} x {D}.')
    zeros, drawn = nn.initializers.zeros, nn.initializers.normal(1.0)
    _embedder.parameter(module, TABLE_A, (V, R), (None, 'rank'), zeros, inputs=(0,))
    _embedder.parameter(module, TABLE_B, (R, D), ('rank', 'embed'), drawn, inputs=(0,))

  def _looked_up(self, module: Embedding, ids_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """The vectors of tokens with what is learned beside the table's."""
    a_VR, b_RD = (_embedder.value(module, name) for name in (TABLE_A, TABLE_B))
    dtype, names = module.options.compute_dtype, ('rank', 'embed')
    h_BTR = a_VR[ids_BT].astype(dtype)
    return x_BTD + self.scale * multiply(b_RD, '...R,RD->...D', h_BTR, names, dtype, x_BTD.dtype)

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


def _check_free(module: str, params: Mapping[str, Any]) -> None:
  """Raises ValueError where a table may be the projection on the vocabulary too, which has no part
  in what is learned.
  """
  heads = {path.split('/')[0] for path in params if path.startswith('heads_')}
  if OUTPUT not in params and (not heads or 'heads_mlm' in heads):
    raise ValueError(
      f'{module} is the projection on the vocabulary too, and only what it is as a table has '
      'learned: merged, it would be two tables. --export=adapter writes it for peft.'
    )


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
