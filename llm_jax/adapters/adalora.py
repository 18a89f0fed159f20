"""AdaLoRA (arXiv:2303.10512): LoRA in the form of a singular value decomposition,

    y = x W + b + alpha / R (drop(x) A * e) B

with A and B drawn from N(0, 0.02^2) and e [R] zero, and a budget of ranks that falls by a cubic
schedule from R to `target_rank` a map on average (eq. 12). After a step each rank of each map has a
score, from sensitivity |w dL/dw|, smoothed, times its uncertainty (eqs. 9 to 11), summed as in
eq. 8; the e of ranks beyond the budget are set to zero, and may come back until the budget is
final. A and B are kept near orthogonal by a term of the loss (eq. 4).

The schedule, the scores and the term are those of `peft` 0.21.2, which takes the mean over maps of
the norms of A A' - I and B' B - I, not of their squares.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.adapters import _low_rank, _ported, _targets
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.contracts import Metrics, Piece, Ported
from llm_jax.core.params import Info
from llm_jax.core.state import TrainState
from llm_jax.core.tree import PyTree
from llm_jax.nn.linear import Linear
from llm_jax.nn.options import DTYPES

A, VALUES, B = 'adalora_a', 'adalora_values', 'adalora_b'
TERM = 'orthogonality'
PEFT_TYPES = ('ADALORA',)
_SMALL = 1e-5  # added to the rank in the scale, as there
_IN_PEFT = (  # a schedule there is for a run here to say anew, and rsLoRA's scale is not read there
  'r init_r target_r lora_alpha lora_dropout rank_pattern total_step tinit tfinal deltaT beta1 '
  'beta2 orth_reg_weight init_lora_weights use_rslora megatron_core qalora_group_size'.split()
)


class Adapter(_low_rank.Adapter):
  """Trains `adalora_a`, `adalora_values` and `adalora_b` beside the kernels of linear maps, and the
  heads.

  Args:
    steps: of the whole run.
    rank: R, of each map at the start.
    target_rank: ranks per map at the end, on average.
    alpha: as above.
    dropout: rate on the input of A.
    targets: of the maps, a regular expression for the end of their paths (`_targets`).
    warmup_steps: how many steps keep all ranks.
    final_steps: how many last steps train the ranks that are left.
    every: after how many steps ranks are chosen anew.
    beta1, beta2: the smoothing of sensitivity and uncertainty.
    orthogonality: the coefficient of the term.
    heads: the heads that are trained whole, a regular expression for their names; '' for none,
      None for all but the masked-LM head.

  Raises:
    ValueError: a value that is not possible.
  """

  def __init__(
    self,
    steps: int,
    rank: int = 12,
    target_rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str = 'query|value',
    warmup_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.5,
    heads: str | None = None,
  ):
    if not 1 <= target_rank <= rank:
      raise ValueError(
        f'config.adapter.target_rank={target_rank} must be at least 1 and at most '
        f'config.adapter.rank={rank}.'
      )
    for name, count, least in (
      ('warmup_steps', warmup_steps, 0),
      ('final_steps', final_steps, 0),
      ('every', every, 1),
    ):
      if count < least:
        raise ValueError(f'config.adapter.{name}={count} must be at least {least}.')
    for name, beta in (('beta1', beta1), ('beta2', beta2)):
      if not 0 < beta < 1:
        raise ValueError(f'config.adapter.{name}={beta} must be above 0 and below 1.')
    for name, number in (('alpha', alpha), ('orthogonality', orthogonality)):
      if not 0 < number < math.inf:
        raise ValueError(f'config.adapter.{name}={number} must be above 0.')
    _targets.check_rate('dropout', dropout)
    _targets.check_pattern('targets', targets)
    self.steps, self.rank, self.target_rank = steps, rank, target_rank
    self.dropout, self.targets = dropout, targets
    self.warmup_steps, self.final_steps, self.every = warmup_steps, final_steps, every
    self.beta1, self.beta2, self.terms = beta1, beta2, {TERM: orthogonality}
    self.scale = alpha / (rank + _SMALL)
    self.heads = _targets.Heads(heads)

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    super().check(infos, base)
    if self.warmup_steps + self.final_steps >= self.steps:
      raise ValueError(
        f'config.adapter.warmup_steps={self.warmup_steps} and final_steps={self.final_steps} leave '
        f'none of the {self.steps} steps of the run to choose ranks in; lower them.'
      )

  def merged(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    leaves = tree.flatten(params)
    merged = {path: x for path, x in leaves.items() if path.split('/')[-1] not in (A, VALUES, B)}
    for module in _targets.modules(leaves, A):
      path = f'{module}/kernel'
      _targets.check_dense(leaves, path)
      kernel, stacked = leaves[path], infos[path].stacked
      a, b, values = (leaves[f'{module}/{name}'] for name in (A, B, VALUES))
      added = _low_rank.product(a * _beside(values, a, stacked), b, stacked)
      merged[path] = (kernel + self.scale * added).astype(kernel.dtype)
    return tree.nest(merged)

  def ported(self, times: int = 1) -> Ported:
    rank = self.rank * times
    settings = dict(
      peft_type='ADALORA',
      bias='none',
      init_r=rank,
      target_r=self.target_rank * times,
      lora_alpha=self.scale * (rank + _SMALL),
      lora_dropout=self.dropout,
      total_step=self.steps,
      tinit=self.warmup_steps,
      tfinal=self.final_steps,
      deltaT=self.every,
      beta1=self.beta1,
      beta2=self.beta2,
      orth_reg_weight=self.terms[TERM],
    )
    a, b = Piece(A, '.lora_A', 'RI', 'IR'), Piece(B, '.lora_B', 'OR', 'RO')
    return Ported(settings, (a, b, Piece(VALUES, '.lora_E', 'R1', 'R')))

  @classmethod
  def ported_options(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
    """See the contract; the schedule of ranks is not among them."""
    _ported.check('adalora', settings, _IN_PEFT, bias=('none',))
    rank = settings.get('init_r', 12)  # peft's defaults
    return dict(
      rank=rank,
      target_rank=min(settings.get('target_r', 8), rank),
      alpha=float(settings.get('lora_alpha', 8)),
      dropout=float(settings.get('lora_dropout', 0)),
    )

  def loss(self, params: PyTree) -> Metrics:
    """How far A and B are from orthogonal, a mean over all of them."""
    leaves, total, count = tree.flatten(params), jnp.zeros(()), 0
    for module, name in ((m, n) for m in _targets.modules(leaves, VALUES) for n in (A, B)):
      x_LIR = _columns(leaves, module, name)
      gram_LRR = jnp.einsum('lir,lis->lrs', x_LIR, x_LIR, precision='highest')
      square_L = jnp.sum(jnp.square(gram_LRR - jnp.eye(self.rank)), axis=(1, 2))
      # The norm has no gradient at zero, where nothing is to be learned.
      total += jnp.sum(jnp.where(square_L > 0, jnp.sqrt(jnp.where(square_L > 0, square_L, 1)), 0))
      count += len(square_L)
    return {TERM: (total / max(count, 1), jnp.ones(()))}

  def extras(self, params: PyTree) -> dict[str, Any]:
    """Smoothed sensitivity and uncertainty of each entry, and which ranks are left at the end."""
    own = {
      path: leaf
      for path, leaf in tree.flatten(params).items()
      if path.split('/')[-1] in (A, VALUES, B)
    }
    zeros = lambda: tree.nest({path: jnp.zeros(x.shape, jnp.float32) for path, x in own.items()})
    kept = {
      path: jnp.ones(x.shape, jnp.float32) for path, x in own.items() if path.endswith(VALUES)
    }
    return {'sensitivity': zeros(), 'uncertainty': zeros(), 'kept': tree.nest(kept)}

  def after_update(self, state: TrainState, grads: PyTree) -> TrainState:
    """Chooses ranks; inside the jitted step."""
    leaves, slopes = tree.flatten(state.params), tree.flatten(grads)
    before = {name: tree.flatten(state.extras[name]) for name in ('sensitivity', 'uncertainty')}
    last = self.steps - self.final_steps  # the step after which the ranks are final
    open_ = state.step < last
    sensitivity, uncertainty = {}, {}
    for path, old in before['sensitivity'].items():
      now = jnp.abs(leaves[path] * slopes[path]).astype(jnp.float32)
      new = self.beta1 * old + (1 - self.beta1) * now
      off = before['uncertainty'][path]
      unsure = self.beta2 * off + (1 - self.beta2) * jnp.abs(now - new)
      sensitivity[path] = jnp.where(open_, new, old)
      uncertainty[path] = jnp.where(open_, unsure, off)
    scores = self._scores({path: sensitivity[path] * uncertainty[path] for path in sensitivity})
    chosen = self._chosen(scores, state.step, last)
    kept, values = {}, {}
    for path, old in tree.flatten(state.extras['kept']).items():
      kept[path] = jnp.where(state.step == last, chosen[path], old)
      alive = jnp.where(open_, chosen[path], kept[path])
      values[path] = jnp.where(alive > 0, leaves[path], jnp.zeros_like(leaves[path]))
    extras = {'sensitivity': sensitivity, 'uncertainty': uncertainty, 'kept': kept}
    return state.replace(
      params=tree.nest(leaves | values),
      extras=dict(state.extras) | {name: tree.nest(found) for name, found in extras.items()},
    )

  def _scores(self, scores: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """By the path of its values, the score of each rank of each map."""
    found = {}
    for module in _targets.modules(scores, VALUES):
      path = f'{module}/{VALUES}'
      means = (jnp.mean(_columns(scores, module, name), axis=1) for name in (A, B))
      found[path] = scores[path] + sum(mean_LR.reshape(scores[path].shape) for mean_LR in means)
    return found

  def _chosen(
    self, scores: Mapping[str, jax.Array], step: jax.Array, last: int
  ) -> dict[str, jax.Array]:
    """1 for ranks that the budget of a step has room for, else 0; all, where none are chosen."""
    everything = jnp.sort(jnp.concatenate([x.reshape(-1) for x in scores.values()]))
    cut = jnp.asarray(self._cuts(everything.size))[jnp.clip(step, 0, last)]
    threshold = jnp.where(cut > 0, everything[jnp.maximum(cut - 1, 0)], -jnp.inf)
    return {path: (x > threshold).astype(jnp.float32) for path, x in scores.items()}

  def _cuts(self, ranks: int) -> np.ndarray:
    """[steps + 1] int32: how many of all ranks are left out after each step; 0 for no choice."""
    last = self.steps - self.final_steps
    least = ranks // self.rank * self.target_rank
    cuts = np.zeros(max(last, 0) + 1, np.int32)
    for step in range(self.warmup_steps + 1, last + 1):
      if step % self.every == 0 or step == last:
        left = 1 - (step - self.warmup_steps) / (last - self.warmup_steps)
        cuts[step] = ranks - int((ranks - least) * left**3 + least)
    return cuts

  def _adapted(self, linear: Linear, x: jax.Array, y: jax.Array) -> jax.Array:
    drawn = nn.initializers.normal(0.02)
    pair = _low_rank.pair(linear, self.rank, (A, B), (drawn, drawn))
    made = params_lib.boxed(nn.initializers.zeros, ('rank',))
    values_R = linear.param(VALUES, made, (self.rank,), DTYPES[linear.options.param_dtype])
    h = pair.narrowed(x, self.dropout)
    return y + self.scale * pair.widened(h * values_R.astype(h.dtype), y.dtype)


def _columns(leaves: Mapping[str, jax.Array], module: str, name: str) -> jax.Array:
  """A or B of a map, of one layer or of a stack, as [layers, inputs or outputs, R]."""
  values, x = leaves[f'{module}/{VALUES}'], leaves[f'{module}/{name}']
  rank, layers = values.shape[-1], values.size // values.shape[-1]
  if name == A:
    return x.reshape(layers, -1, rank)
  return jnp.swapaxes(x.reshape(layers, rank, -1), 1, 2)


def _beside(values: jax.Array, a: jax.Array, stacked: int) -> jax.Array:
  """The values of each rank with the axes of A."""
  shape = (*values.shape[:stacked], *(1,) * (a.ndim - stacked - 1), values.shape[-1])
  return values.reshape(shape)
