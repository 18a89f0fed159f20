"""Optimizers: schedules and optax chains over parameters that are stacked over layers.

A section of the config is the fields of one optimizer's class, `parse` makes it; `create` gives the
gradient transformation:

    clip by global norm -> the optimizer's own direction, with decoupled weight decay -> rate of the
    layer -> schedule

Every parameter is covered exactly once, by the name of its leaf (LEAVES): kernels and embeddings
are decayed, biases and scales of norms are not, any other name is an error. A leaf with a component
`layers` in its path is a stack: its first axis counts layers. Whatever an optimizer measures on a
parameter (LAMB's and Adafactor's norms, Muon's orthogonalization) it measures on each layer of the
stack by itself, so that a stacked model and a model of separate layers take the same step.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from llm_jax.core import plugins, tree

LEAVES = {
  'kernel': True,
  'embedding': True,
  'bias': False,
  'scale': False,
}  # name of a leaf -> is it decayed
# Layer g P + j is index g of layers/block_j (layers/block where P = 1); a layer before all groups
# is called `first`.
_LAYER = re.compile(r'(?P<stack>.*?)(layers/(block_(?P<place>\d+)/)?|(?P<first>first)/)')
Schedule = Callable[[Any], jax.Array]  # step -> learning rate
SCHEDULES = ('linear', 'cosine', 'inverse_sqrt', 'wsd', 'constant')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
  """What all optimizers share.

  Attributes:
    learning_rate: the peak rate.
    schedule: 'linear' or 'cosine' decay to the end, 'inverse_sqrt' (arXiv:1804.04235, section 8),
      'wsd' (warmup, stable, decay by 1 - sqrt: arXiv:2405.18392, eq. 1), 'constant'.
    warmup_steps: steps of linear warmup; the first has rate learning_rate / warmup_steps, the last
      the peak rate.
    warmup_fraction: the same as a share of all steps, for runs whose length changes; only one of
      the two.
    decay_fraction: share of all steps that 'wsd' decays in; a fifth by default.
    final_fraction: the rate at the very end as a share of the peak rate (linear, cosine, wsd).
    weight_decay: decoupled (arXiv:1711.05101): rate * weight_decay * parameter is taken away, for
      kernels and embeddings.
    clip_norm: the gradient's largest global norm, before anything else; 0 clips nothing.
    layer_decay: layer l of L learns at rate * layer_decay ** (L - 1 - l), embeddings at rate *
      layer_decay ** L, whatever comes after the layers at the full rate (arXiv:1801.06146, section
      3.2; ELECTRA's and BEiT's fine-tuning).
  """

  learning_rate: float
  schedule: str = 'linear'
  warmup_steps: int | None = None
  warmup_fraction: float | None = None
  decay_fraction: float | None = None
  final_fraction: float = 0.0
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  layer_decay: float = 1.0

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f'config.optimizer.schedule={self.schedule!r} is not '
        f'known{plugins.nearest(self.schedule, SCHEDULES)}; '
        f'known: {", ".join(SCHEDULES)}.'
      )
    if self.warmup_steps is not None and self.warmup_fraction is not None:
      raise ValueError(
        f'config.optimizer has warmup_steps={self.warmup_steps} and '
        f'warmup_fraction={self.warmup_fraction}; '
        f'set one of them to None.'
      )
    if self.decay_fraction is not None and self.schedule != 'wsd':
      raise ValueError(
        f'config.optimizer.decay_fraction={self.decay_fraction} is for the schedule wsd, not '
        f'{self.schedule}; '
        f'unset it.'
      )
    if self.final_fraction and self.schedule in ('constant', 'inverse_sqrt'):
      raise ValueError(
        f'config.optimizer.final_fraction={self.final_fraction} is for the schedules linear, '
        'cosine and wsd, '
        f'not {self.schedule}; unset it.'
      )
    _check_range(self, 'learning_rate', 0, math.inf, open_below=True)
    _check_range(self, 'warmup_steps', 0, math.inf)
    _check_range(self, 'warmup_fraction', 0, 1)
    _check_range(self, 'decay_fraction', 0, 1)
    _check_range(self, 'final_fraction', 0, 1)
    _check_range(self, 'weight_decay', 0, math.inf)
    _check_range(self, 'clip_norm', 0, math.inf)
    _check_range(self, 'layer_decay', 0, 1, open_below=True)
    for field in dataclasses.fields(self):
      if field.name in ('b1', 'b2', 'momentum'):
        _check_range(self, field.name, 0, 1, open_above=True)
      if field.name in ('eps', 'decay_rate'):
        _check_range(self, field.name, 0, 1, open_below=True)

  @abc.abstractmethod
  def direction(
    self, params: Any, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """From gradient to ascent direction at rate 1, `decay` (adds weight_decay * parameter) in its
    place.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
  """Adam with decoupled weight decay (arXiv:1412.6980, algorithm 1; arXiv:1711.05101, algorithm 2)."""

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8

  def direction(
    self, params: Any, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(self.b1, self.b2, self.eps), decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAMB(Optimizer):
  """LAMB (arXiv:1904.00962, algorithm 2, phi the identity, with Adam's bias correction).

  The trust ratio |parameter| / |direction| is of each layer's parameter, 1 where either norm is 0.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-6

  def direction(
    self, params: Any, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    return optax.chain(
      optax.scale_by_adam(self.b1, self.b2, self.eps),
      decay,
      _per_layer(optax.scale_by_trust_ratio()),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
  """Adafactor (arXiv:1804.04235, algorithms 4 and 5) without momentum.

  Second moments are factored, and updates clipped to root mean square 1, for each layer by itself;
  of a kernel with more than two axes the two longest are factored, none where the second longest is
  below 128. Weight decay is decoupled here as elsewhere.

  Attributes:
    decay_rate: the second moment's decay at step t is 1 - t ** -decay_rate.
    parameter_scale: whether the rate is relative to the parameter's root mean square (rates near
      1e-2), or absolute.
  """

  decay_rate: float = 0.8
  parameter_scale: bool = True

  def direction(
    self, params: Any, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    scale = optax.scale_by_param_block_rms() if self.parameter_scale else optax.identity()
    factored = optax.scale_by_factored_rms(decay_rate=self.decay_rate)
    return optax.chain(
      _per_layer(optax.chain(factored, optax.clip_by_block_rms(1.0), scale)), decay
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
  """Gradient descent with momentum: m = momentum * m + gradient is the direction (gradient +
  momentum * m with `nesterov`).
  """

  momentum: float = 0.9
  nesterov: bool = False

  def direction(
    self, params: Any, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    return optax.chain(optax.trace(self.momentum, self.nesterov), decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
  """Lion (arXiv:2302.06675, program 1): the sign of b1-averaged momentum; rates some 3 to 10 times
  lower than AdamW's.
  """

  b1: float = 0.9
  b2: float = 0.99

  def direction(
    self, params: Any, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_lion(self.b1, self.b2), decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
  """Muon (kellerjordan.github.io/posts/muon) for the matrices of the layers, AdamW for everything
  else.

  Nesterov momentum, orthogonalized by five Newton-Schulz steps, each layer's matrix by itself, all
  axes of what goes in against all axes of what comes out (D x (N H) for a query kernel); scaled to
  0.2 sqrt(max(in, out)) as in arXiv:2502.16982, eq. 4, so that AdamW's learning rate and weight
  decay serve both.

  Attributes:
    momentum: of Muon.
    b1, b2, eps: of AdamW.
  """

  momentum: float = 0.95
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8

  def direction(
    self, params: Any, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    axes = {
      path: _matrix_axes(path, leaf.ndim)
      for path, leaf in tree.flatten(params).items()
      if _is_hidden_matrix(path)
    }
    labels = tree.map_with_path(lambda path, _: 'muon' if path in axes else 'adam', params)

    def dimensions(
      updates,
    ):  # optax puts MaskedNode, which has no leaves, in the place of what Muon does not treat
      return tree.map_with_path(lambda path, _: axes[path], updates)

    def scale(updates, params=None):
      return tree.map_with_path(
        lambda path, u: u * 0.2 * math.sqrt(max(_fans(u.shape, axes[path]))), updates
      )

    muon = optax.chain(
      contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=dimensions),
      optax.stateless(scale),
    )
    return optax.chain(
      optax.partition(
        {'muon': muon, 'adam': optax.scale_by_adam(self.b1, self.b2, self.eps)}, labels
      ),
      decay,
    )


OPTIMIZERS = {
  'adamw': AdamW,
  'lamb': LAMB,
  'adafactor': Adafactor,
  'sgd': SGD,
  'lion': Lion,
  'muon': Muon,
}


def parse(section: Mapping[str, Any]) -> Optimizer:
  """The optimizer of a config section: `name`, and the fields of that optimizer's class; builds
  nothing.

  Raises:
    ValueError: a name, an option or a value that is not allowed.
    TypeError: an option of the wrong type.
  """
  name = section['name']
  if name not in OPTIMIZERS:
    raise ValueError(
      f'config.optimizer.name={name!r} is not known{plugins.nearest(name, OPTIMIZERS)}; '
      f'known: {", ".join(OPTIMIZERS)}.'
    )
  return plugins.construct(
    'optimizer', OPTIMIZERS[name], {k: v for k, v in section.items() if k != 'name'}
  )


def create(
  section: Mapping[str, Any], steps: int, params: Any
) -> tuple[optax.GradientTransformation, Schedule]:
  """The gradient transformation of a config section, and its learning rate by step.

  Args:
    section: `config.optimizer`.
    steps: length of the whole run in optimizer steps.
    params: the (abstract) parameters, whose paths and shapes decide what is decayed, stacked,
      orthogonalized.

  Raises:
    ValueError: as `parse` does; a warmup longer than the run; a leaf of a name that is not in
      LEAVES.
  """
  optimizer = parse(section)
  rate = schedule(optimizer, steps)
  decayed = tree.map_with_path(lambda path, _: _is_decayed(path), params)
  parts = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm else []
  parts += [optimizer.direction(params, optax.add_decayed_weights(optimizer.weight_decay, decayed))]
  parts += [_scale_by_layer(params, optimizer.layer_decay)] if optimizer.layer_decay != 1 else []
  return optax.chain(*parts, optax.scale_by_learning_rate(rate)), rate


def schedule(optimizer: Optimizer, steps: int) -> Schedule:
  """The learning rate by step, counted from 0 to steps - 1; no step has rate 0 unless the run is
  over.

  Raises:
    ValueError: a warmup that is longer than the run.
  """
  warmup = (
    round(steps * optimizer.warmup_fraction)
    if optimizer.warmup_fraction is not None
    else optimizer.warmup_steps or 0
  )
  if warmup > steps:
    raise ValueError(
      f'config.optimizer.warmup_steps={warmup} is more than config.steps={steps}; lower it, or set '
      f'warmup_fraction instead, which follows the length of the run.'
    )
  final = optimizer.final_fraction
  decay = 0.2 if optimizer.decay_fraction is None else optimizer.decay_fraction

  def after_warmup(step):
    progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    if optimizer.schedule == 'linear':
      return 1 - (1 - final) * progress
    if optimizer.schedule == 'cosine':
      return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    if optimizer.schedule == 'inverse_sqrt':
      return jnp.sqrt(max(warmup, 1) / jnp.maximum(step + 1.0, max(warmup, 1)))
    if optimizer.schedule == 'wsd':
      length = min(steps * decay, steps - warmup)
      cooled = jnp.clip((step - (steps - length)) / max(length, 1), 0.0, 1.0)
      return 1 - (1 - final) * jnp.sqrt(cooled)
    return jnp.ones_like(progress)

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    return optimizer.learning_rate * jnp.where(
      step < warmup, (step + 1) / max(warmup, 1), after_warmup(step)
    )

  return rate


def layer_rates(params: Any, layer_decay: float) -> Any:
  """A tree of factors on the rate: a number for a leaf, [layers, 1, ...] for a stack; see
  `Optimizer.layer_decay`.
  """
  depths = _depths(params)
  count = 1 + max((int(np.max(depth)) for depth in depths.values()), default=-1)

  def factor(path, leaf):
    if _is_embedding(path):
      return layer_decay**count
    if path not in depths:
      return 1.0
    rates = layer_decay ** (count - 1.0 - depths[path])
    return rates.reshape(-1, *[1] * (leaf.ndim - 1)) if is_stack(path) else float(rates)

  return tree.map_with_path(factor, params)


def is_stack(path: str) -> bool:
  """Whether the leaf at a path holds several layers along its first axis."""
  return 'layers' in path.split('/')


def _is_embedding(path: str) -> bool:
  return 'embedder' in path.split('/') or path.endswith('embedding')


def _is_hidden_matrix(path: str) -> bool:
  return _LAYER.match(path) is not None and path.endswith('/kernel')


def _is_decayed(path: str) -> bool:
  name = path.split('/')[-1]
  if name not in LEAVES:
    raise ValueError(
      f'parameter {path}: its last component must be one of {", ".join(LEAVES)}, which say whether '
      'it is decayed.'
    )
  return LEAVES[name]


def _depths(params: Any) -> dict[str, np.ndarray]:
  """Layer numbers of each leaf that belongs to a layer: [groups] for a stack, [] for a single
  layer.
  """
  found = {path: match for path in tree.paths(params) if (match := _LAYER.match(path))}
  period, offset = {}, {}
  for match in found.values():
    stack = match['stack']
    period[stack] = max(period.get(stack, 1), int(match['place'] or 0) + 1)
    offset[stack] = max(offset.get(stack, 0), int(match['first'] is not None))
  leaves = tree.flatten(params)

  def depth(path, match):
    if match['first']:
      return np.zeros(())
    stack = match['stack']
    return (
      offset[stack] + period[stack] * np.arange(leaves[path].shape[0]) + int(match['place'] or 0)
    )

  return {path: depth(path, match) for path, match in found.items()}


def _matrix_axes(path: str, ndim: int) -> contrib.MuonDimensionNumbers:
  """Axes that go in and come out of a layer's kernel: all but the last go in where heads are joined
  (`out`), else the first.
  """
  axes = tuple(range(int(is_stack(path)), ndim))
  inputs = len(axes) - 1 if path.endswith('/out/kernel') else 1
  return contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])


def _fans(shape: tuple[int, ...], axes: contrib.MuonDimensionNumbers) -> tuple[int, int]:
  return math.prod(shape[a] for a in axes.reduction_axis), math.prod(
    shape[a] for a in axes.output_axis
  )


def _scale_by_layer(params: Any, layer_decay: float) -> optax.GradientTransformation:
  rates = layer_rates(params, layer_decay)
  return optax.stateless(
    lambda updates, _: jax.tree.map(lambda u, rate: u * jnp.asarray(rate, u.dtype), updates, rates)
  )


def _per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies `inner` to each leaf alone, and to each layer of a stack alone."""

  def init(params):
    return tree.map_with_path(
      lambda path, p: jax.vmap(inner.init)(p) if is_stack(path) else inner.init(p), params
    )

  def update(updates, state, params):
    structure = jax.tree.structure(updates)
    done = [
      (jax.vmap(inner.update) if is_stack(path) else inner.update)(u, s, p)
      for path, u, s, p in zip(
        tree.paths(updates),
        structure.flatten_up_to(updates),
        structure.flatten_up_to(state),
        structure.flatten_up_to(params),
        strict=True,
      )
    ]
    return structure.unflatten([u for u, _ in done]), structure.unflatten([s for _, s in done])

  return optax.GradientTransformation(init, update)


def _check_range(
  optimizer: Optimizer,
  name: str,
  low: float,
  high: float,
  *,
  open_below: bool = False,
  open_above: bool = False,
) -> None:
  value = getattr(optimizer, name)
  if (
    value is None
    or (low < value if open_below else low <= value)
    and (value < high if open_above else value <= high)
  ):
    return
  raise ValueError(
    f'config.optimizer.{name}={value} must be {"above" if open_below else "at least"} {low}'
    + (f' and {"below" if open_above else "at most"} {high}.' if math.isfinite(high) else '.')
  )
