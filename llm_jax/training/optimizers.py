"""Optimizers: schedules and optax chains over parameters that are stacked over layers.

A section of the config is the fields of one optimizer's class, `parse` makes it; `create` gives the
gradient transformation:

    clip by global norm -> the optimizer's own direction, with decoupled weight decay -> rate of the
    layer -> schedule

What a parameter is decides how it is treated (`core.params.Info`): whether it is decayed, which
layers it holds, which of its axes go in. Whatever an optimizer measures on a parameter (LAMB's and
Adafactor's norms, Muon's orthogonalization) it measures on each layer of a stack by itself, so that
a stacked model and a model of separate layers take the same step.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from llm_jax.core import plugins, tree
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree

Infos = Mapping[str, Info]

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
    ema_decay: d of a moving average of the trained parameters, a = d a + (1 - d) p after each step,
      where d is at first (1 + step) / (10 + step), so that the first values are forgotten. The
      average is what evaluations, predictions and exports use (arXiv:1706.03762, section 6.1,
      averages too); training goes on with p. 0: none.
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
  ema_decay: float = 0.0

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
    _check_range(self, 'ema_decay', 0, 1, open_above=True)
    for field in dataclasses.fields(self):
      if field.name in ('b1', 'b2', 'momentum'):
        _check_range(self, field.name, 0, 1, open_above=True)
      if field.name in ('eps', 'decay_rate'):
        _check_range(self, field.name, 0, 1, open_below=True)

  @abc.abstractmethod
  def direction(
    self, params: PyTree, infos: Infos, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """From gradient to ascent direction at rate 1.

    Args:
      params: the (abstract) parameters.
      infos: what each of them is, by path.
      decay: adds weight_decay * parameter; goes where the algorithm has it.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
  """Adam (arXiv:1412.6980, algorithm 1), weight decay decoupled (arXiv:1711.05101, algorithm 2)."""

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8

  def direction(
    self, params: PyTree, infos: Infos, decay: optax.GradientTransformation
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
    self, params: PyTree, infos: Infos, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    return optax.chain(
      optax.scale_by_adam(self.b1, self.b2, self.eps),
      decay,
      _per_layer(optax.scale_by_trust_ratio(), infos),
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
    self, params: PyTree, infos: Infos, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    scale = optax.scale_by_param_block_rms() if self.parameter_scale else optax.identity()
    factored = optax.scale_by_factored_rms(decay_rate=self.decay_rate)
    inner = optax.chain(factored, optax.clip_by_block_rms(1.0), scale)
    return optax.chain(_per_layer(inner, infos), decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
  """Gradient descent with momentum: m = momentum * m + gradient is the direction (gradient +
  momentum * m with `nesterov`).
  """

  momentum: float = 0.9
  nesterov: bool = False

  def direction(
    self, params: PyTree, infos: Infos, decay: optax.GradientTransformation
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
    self, params: PyTree, infos: Infos, decay: optax.GradientTransformation
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
    self, params: PyTree, infos: Infos, decay: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    axes = {}
    for path, leaf in tree.flatten(params).items():
      if _is_hidden_matrix(infos[path]):
        axes[path] = _matrix_axes(infos[path], leaf.ndim)
    labels = tree.map_with_path(lambda path, _: 'muon' if path in axes else 'adam', params)

    def dimensions(updates: PyTree) -> Any:
      # optax puts MaskedNode, which has no leaves, where Muon is not the one that treats a leaf.
      return tree.map_with_path(lambda path, _: axes[path], updates)

    def scale(updates: PyTree, params: PyTree = None) -> Any:
      del params

      def leaf(path: str, update: jax.Array) -> jax.Array:
        return update * 0.2 * math.sqrt(max(_fans(update.shape, axes[path])))

      return tree.map_with_path(leaf, updates)

    muon = optax.chain(
      contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=dimensions),
      optax.stateless(scale),
    )
    adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
    return optax.chain(optax.partition({'muon': muon, 'adam': adam}, labels), decay)


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
  factory = _named(section['name'])
  return plugins.construct('optimizer', factory, {k: v for k, v in section.items() if k != 'name'})


def options(name: str) -> list[str]:
  """The options of one optimizer; ValueError for a name that is not known."""
  return list(plugins.signature(_named(name)))


def create(
  section: Mapping[str, Any],
  steps: int,
  params: PyTree,
  infos: Infos,
  factor: Callable[[str], float] = lambda path: 1.0,
) -> tuple[optax.GradientTransformation, Schedule]:
  """The gradient transformation of a config section, and its learning rate by step.

  Args:
    section: `config.optimizer`.
    steps: length of the whole run in optimizer steps.
    params: the (abstract) parameters that are trained.
    infos: what each parameter is, by path; those of others are ignored.
    factor: on the learning rate of a parameter.

  Raises:
    ValueError: as `parse` does; a warmup longer than the run.
  """
  optimizer = parse(section)
  rate = schedule(optimizer, steps)
  decayed = tree.map_with_path(lambda path, _: infos[path].decayed, params)
  decay = optax.add_decayed_weights(optimizer.weight_decay, decayed)
  parts = []
  if optimizer.clip_norm:
    parts.append(optax.clip_by_global_norm(optimizer.clip_norm))
  parts.append(optimizer.direction(params, infos, decay))
  factors = {path: factor(path) for path in tree.paths(params)}
  if optimizer.layer_decay != 1 or set(factors.values()) - {1.0}:
    by_layer = layer_rates(params, infos, optimizer.layer_decay)
    parts.append(_scaled(tree.map_with_path(lambda path, x: x * factors[path], by_layer)))
  return optax.chain(*parts, optax.scale_by_learning_rate(rate)), rate


def schedule(optimizer: Optimizer, steps: int) -> Schedule:
  """The learning rate by step, counted from 0 to steps - 1; no step has rate 0 unless the run is
  over.

  Raises:
    ValueError: a warmup that is longer than the run.
  """
  warmup = optimizer.warmup_steps or 0
  if optimizer.warmup_fraction is not None:
    warmup = round(steps * optimizer.warmup_fraction)
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


def averaged(averages: PyTree, params: PyTree, step: jax.Array, decay: float) -> Any:
  """The moving averages after a step; see `Optimizer.ema_decay`.

  Args:
    averages: those before.
    params: the parameters after the step.
    step: optimizer steps taken before it.
    decay: d.
  """
  step = step.astype(jnp.float32)
  kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda a, p: a + ((1.0 - kept) * (p - a)).astype(a.dtype), averages, params)


def layer_rates(params: PyTree, infos: Infos, layer_decay: float) -> Any:
  """Factors on the learning rate; see `Optimizer.layer_decay`.

  Returns:
    A tree like `params`: a number for a leaf, [layers, 1, ...] for a stack.
  """
  count = _count_layers(params, infos)

  def factor(path: str, leaf: jax.Array) -> Any:
    depths = infos[path].depths(leaf.shape)
    if depths is None:
      return 1.0
    rates = layer_decay ** (count - 1.0 - depths)
    return rates.reshape(-1, *[1] * (leaf.ndim - 1)) if infos[path].stacked else float(rates)

  return tree.map_with_path(factor, params)


def _named(name: str) -> type[Optimizer]:
  if name not in OPTIMIZERS:
    raise ValueError(
      f'config.optimizer.name={name!r} is not known{plugins.nearest(name, OPTIMIZERS)}; '
      f'known: {", ".join(OPTIMIZERS)}.'
    )
  return OPTIMIZERS[name]


def _count_layers(params: PyTree, infos: Infos) -> int:
  """One more than the highest layer number; 0 where nothing belongs to a layer."""
  deepest = -1
  for path, leaf in tree.flatten(params).items():
    depths = infos[path].depths(leaf.shape)
    if depths is not None:
      deepest = max(deepest, int(depths.max()))
  return deepest + 1


def _is_hidden_matrix(info: Info) -> bool:
  return info.layer is not None and info.layer >= 0 and bool(info.inputs)


def _matrix_axes(info: Info, ndim: int) -> contrib.MuonDimensionNumbers:
  """Axes that go in and come out of a layer's kernel, in the array as it is kept."""
  shift = int(info.stacked)
  inputs = tuple(shift + axis for axis in info.inputs)
  outputs = tuple(axis for axis in range(shift, ndim) if axis not in inputs)
  return contrib.MuonDimensionNumbers(inputs, outputs)


def _fans(shape: tuple[int, ...], axes: contrib.MuonDimensionNumbers) -> tuple[int, int]:
  return math.prod(shape[a] for a in axes.reduction_axis), math.prod(
    shape[a] for a in axes.output_axis
  )


def _scaled(rates: PyTree) -> optax.GradientTransformation:
  """Each update times its rate."""

  def scale(updates: PyTree, params: PyTree = None) -> Any:
    del params
    return jax.tree.map(lambda u, rate: u * jnp.asarray(rate, u.dtype), updates, rates)

  return optax.stateless(scale)


def _per_layer(inner: optax.GradientTransformation, infos: Infos) -> optax.GradientTransformation:
  """Applies `inner` to each leaf alone, and to each layer of a stack alone."""

  def over_layers(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(function) if infos[path].stacked else function

  def init(params: PyTree) -> Any:
    return tree.map_with_path(lambda path, p: over_layers(path, inner.init)(p), params)

  def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[Any, Any]:
    structure = jax.tree.structure(updates)
    leaves = zip(
      tree.paths(updates),
      structure.flatten_up_to(updates),
      structure.flatten_up_to(state),
      structure.flatten_up_to(params),
      strict=True,
    )
    done = [over_layers(path, inner.update)(u, s, p) for path, u, s, p in leaves]
    new_updates, new_state = zip(*done, strict=True)
    return structure.unflatten(new_updates), structure.unflatten(new_state)

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
  if value is None:
    return
  above = low < value if open_below else low <= value
  below = value < high if open_above else value <= high
  if above and below:
    return
  message = f'config.optimizer.{name}={value} must be {"above" if open_below else "at least"} {low}'
  if math.isfinite(high):
    message += f' and {"below" if open_above else "at most"} {high}'
  raise ValueError(f'{message}.')
