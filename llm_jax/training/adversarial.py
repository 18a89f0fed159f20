"""Adversarial training: a step also learns from its texts with the vectors of their tokens moved a
little, to where the loss grows most.

| name | what is learned from | passes |
|---|---|---|
| fgm | a text, and the same one step up its gradient (Miyato et al. 2017, arXiv:1605.07725) | 2 |
| pgd | a text, and the same several steps up (Madry et al. 2018, arXiv:1706.06083) | steps + 1 |
| freelb | all points on the way up (Zhu et al. 2020, arXiv:1909.11764) | steps |
| smart | a text, and the same answer around it (Jiang et al. 2020, arXiv:1911.03437) | steps + 2 |

A section of the config is the fields of one method's class; `parse` makes it.

What is moved is delta [B, T, D], which is added to the vectors of tokens before positions, token
types and norm. Its size is measured and bounded per text, so that neither the texts that share a
row nor the rows that share a micro-batch change it: packed and unpacked rows, one batch and k
micro-batches have the same gradient. Random beginnings are drawn by what a text says and from the
rng of the step, so they do not depend on how rows are cut either. A text is a segment of a row; of
a document that is cut, each piece is one. Padding is not moved, nor is a text without a gradient.
All passes of a step have the same dropout, as FreeLB asks for. Evaluation and prediction have one
pass, which is not moved.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core import metrics as metrics_lib
from llm_jax.core import params as params_lib
from llm_jax.core import plugins
from llm_jax.core.contracts import Batch, Metrics, Number, Objective
from llm_jax.core.tree import PyTree
from llm_jax.programs import network as networks
from llm_jax.programs.network import Network

PREFIX = 'adversarial_'  # of the metrics at the point that was moved
SMOOTHNESS = 'smoothness'


class Cost(NamedTuple):
  """FLOPs of a pass.

  Attributes:
    forward: of the pass itself.
    backward: of the gradient by parameters.
  """

  forward: float
  backward: float

  @property
  def step(self) -> float:
    """Of both."""
    return self.forward + self.backward


class Part(NamedTuple):
  """A global batch or a part of it, and how a step learns from it.

  Attributes:
    network: the network.
    frozen: those of its parameters that are not trained.
    batch: the rows.
    dropout: the rng of the dropout.
    rng: that of the step, the same for all parts.
    weights: of each metric over the whole batch; None where the part is all of it.
    loss: (parameters, delta) to the total loss of the part and its metrics.
    placed: lays gradients out as the optimizer wants them.
    terms: coefficients of the metrics that make up the loss, without the method's own.
  """

  network: Network
  frozen: PyTree
  batch: Batch
  dropout: jax.Array
  rng: jax.Array
  weights: Metrics | None
  loss: Callable[[PyTree, jax.Array], tuple[jax.Array, Metrics]]
  placed: Callable[[PyTree], PyTree]
  terms: Mapping[str, Number]

  @property
  def unmoved(self) -> jax.Array:
    """Delta of zeros, [B, T, D]."""
    options = self.network.model.options
    return jnp.zeros((*self.batch['tokens'].shape, options.dim), options.accumulation_dtype)

  def learn(self, params: PyTree, delta_BTD: jax.Array) -> tuple[Any, jax.Array, Metrics]:
    """The gradients of the loss by parameters and by delta, and the metrics."""
    both = jax.grad(self.loss, (0, 1), has_aux=True)
    (grads, slope_BTD), metrics = both(params, delta_BTD)
    return self.placed(grads), slope_BTD, metrics

  def slope(self, params: PyTree, delta_BTD: jax.Array) -> jax.Array:
    """The gradient by delta alone, [B, T, D]."""
    return jax.grad(self.loss, 1, has_aux=True)(params, delta_BTD)[0]

  def run(self, params: PyTree, method: str, **kwargs: Any) -> Any:
    """What a method of the network gives in training."""
    whole = params_lib.merge(params, self.frozen) if self.frozen else params
    rngs = {'dropout': self.dropout}
    return networks.apply(self.network, whole, self.batch, method, rngs=rngs, train=True, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
  """What all methods share.

  Attributes:
    epsilon: the largest size of what a text is moved by; 0: nothing is moved, and the run is one
      without this section.
    norm: how that size is measured, over all numbers of the vectors of a text: 'l2', or 'max', the
      largest absolute value.

  Raises:
    ValueError: a value that is not possible.
  """

  epsilon: float
  norm: str = 'l2'

  def __post_init__(self) -> None:
    if self.norm not in NORMS:
      raise ValueError(
        f'config.adversarial.norm={self.norm!r} is not known{plugins.nearest(self.norm, NORMS)}; '
        f'known: {", ".join(NORMS)}.'
      )
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is float and not 0 <= value < math.inf:
        raise ValueError(f'config.adversarial.{field.name}={value} must be a number from 0 on.')
    if getattr(self, 'share', 0) > 1:
      raise ValueError(f'config.adversarial.share={self.share} must be at least 0 and at most 1.')
    if getattr(self, 'steps', 1) < 1:
      raise ValueError(f'config.adversarial.steps={self.steps} must be at least 1.')

  def check(self, objective: Objective) -> None:
    """Raises ValueError where an objective cannot be learned so."""
    del objective

  @abc.abstractmethod
  def terms(self, terms: Mapping[str, Number]) -> dict[str, Number]:
    """Coefficients of the metrics that make up the loss, from those without this method."""

  @abc.abstractmethod
  def gradient(self, part: Part, params: PyTree) -> tuple[Any, Metrics]:
    """The gradient of a part of a batch by the trained parameters, and its metrics."""

  def weights(self, network: Network, params: PyTree, batch: Batch) -> Metrics:
    """Weights over the whole batch of the method's own metrics, by name."""
    del network, params, batch
    return {}

  @abc.abstractmethod
  def flops(self, whole: Cost, model: Cost) -> float:
    """FLOPs of a step, nothing recomputed; a gradient by delta alone costs what a pass does.

    Args:
      whole: of a pass with heads and loss.
      model: of one through the model alone.
    """

  def climbed(
    self, delta_BTD: jax.Array, slope_BTD: jax.Array, batch: Batch, step_size: float
  ) -> jax.Array:
    """Delta a step up the slope: step_size * slope / |slope| of each text, back within epsilon."""
    norm, segments_BT = NORMS[self.norm], batch['segments']
    size_BT1 = norm.size(slope_BTD, segments_BT)
    moves_BT1 = (segments_BT[..., None] > 0) & (size_BT1 > 0)
    step_BTD = step_size * slope_BTD / jnp.where(moves_BT1, size_BT1, 1)
    moved_BTD = delta_BTD + jnp.where(moves_BT1, step_BTD, 0)
    return norm.within(moved_BTD, segments_BT, self.epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FGM(Method):
  """The fast gradient method (arXiv:1605.07725, equation 5): delta = epsilon g / |g|.

  The loss is (1 - share) L(x) + share L(x + delta). Miyato's sum of the two has share 0.5 and twice
  the size, which would ask for other rates.

  Attributes:
    share: of the loss that is the adversarial one; 1 for that alone.
  """

  epsilon: float = 1.0
  share: float = 0.5

  @property
  def ascents(self) -> tuple[int, float]:
    """How many steps up, and how large they are."""
    return 1, self.epsilon

  def terms(self, terms: Mapping[str, Number]) -> dict[str, Number]:
    clean = {name: (1 - self.share) * coefficient for name, coefficient in terms.items()}
    hard = {PREFIX + name: self.share * coefficient for name, coefficient in terms.items()}
    return clean | hard

  def gradient(self, part: Part, params: PyTree) -> tuple[Any, Metrics]:
    steps, size = self.ascents
    clean, slope_BTD, metrics = part.learn(params, part.unmoved)
    delta_BTD = self.climbed(part.unmoved, slope_BTD, part.batch, size)

    def climb(delta_BTD: jax.Array, _: None) -> tuple[jax.Array, None]:
      slope_BTD = part.slope(params, delta_BTD)
      return self.climbed(delta_BTD, slope_BTD, part.batch, size), None

    if steps > 1:
      delta_BTD, _ = jax.lax.scan(climb, delta_BTD, None, length=steps - 1)
    hard, _, found = part.learn(params, delta_BTD)
    mixed = lambda a, b: (1 - self.share) * a + self.share * b
    return jax.tree.map(mixed, clean, hard), metrics | _prefixed(found, part.network)

  def flops(self, whole: Cost, model: Cost) -> float:
    return 2 * whole.step + 2 * (self.ascents[0] - 1) * whole.forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGD(FGM):
  """Projected gradient descent (arXiv:1706.06083, section 2.1) from the text itself: so many steps
  up, each followed by the way back into the ball of size epsilon.

  Attributes:
    steps: how many.
    step_size: how large each is.
  """

  steps: int = 3
  step_size: float = 0.3

  @property
  def ascents(self) -> tuple[int, float]:
    return self.steps, self.step_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeLB(Method):
  """Free large-batch training (arXiv:1909.11764, algorithm 1): the mean gradient of `steps` points,
  of which the first is drawn and each other one is a step up from the one before.

  The metrics of the objective are means over the points; `adversarial_...` are those of the last.

  Attributes:
    steps: how many points.
    step_size: from one to the next.
    start: the first delta is drawn from the uniform distribution over [-start, start], divided by
      the root of how many numbers a text has (with the norm 'max' by 1); None: epsilon.
  """

  epsilon: float = 0.5
  steps: int = 3
  step_size: float = 0.1
  start: float | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.start is not None and not 0 <= self.start <= self.epsilon:
      raise ValueError(
        f'config.adversarial.start={self.start} must be at least 0 and at most epsilon, '
        f'{self.epsilon}.'
      )

  def terms(self, terms: Mapping[str, Number]) -> dict[str, Number]:
    return dict(terms)

  def gradient(self, part: Part, params: PyTree) -> tuple[Any, Metrics]:
    def point(carry: PyTree, _: None) -> tuple[PyTree, Metrics]:
      delta_BTD, summed = carry
      grads, slope_BTD, metrics = part.learn(params, delta_BTD)
      delta_BTD = self.climbed(delta_BTD, slope_BTD, part.batch, self.step_size)
      return (delta_BTD, jax.tree.map(jnp.add, summed, grads)), metrics

    zeros = part.placed(jax.tree.map(jnp.zeros_like, params))
    (_, summed), each = jax.lax.scan(point, (self._start(part), zeros), None, length=self.steps)
    mean, last = (lambda x: jnp.mean(x, 0)), (lambda x: x[-1])
    found = _prefixed(jax.tree.map(last, each), part.network)
    grads = jax.tree.map(lambda x: x / self.steps, summed)
    return grads, jax.tree.map(mean, each) | found

  def flops(self, whole: Cost, model: Cost) -> float:
    return self.steps * whole.step

  def _start(self, part: Part) -> jax.Array:
    size = self.epsilon if self.start is None else self.start
    uniform = functools.partial(jax.random.uniform, minval=-size, maxval=size)
    noise_BTD, segments_BT = drawn(part, uniform), part.batch['segments']
    return noise_BTD * NORMS[self.norm].spread(segments_BT, noise_BTD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SMART(Method):
  """Smoothness-inducing regularisation (arXiv:1911.03437, equation 2): to the loss is added weight
  * how far the answers of a text and of the same moved are apart, where they are so most. The
  objective says how far answers are apart (`Objective.divergence`).

  Delta begins as noise, since the answers of a text itself are not apart, and is then moved up the
  slope of what is between the answers. How far they are apart goes by the square of epsilon: at the
  paper's 1e-5 that is lost in the rounding of float32, so the sizes here are others.

  Attributes:
    weight: the paper's lambda_s.
    steps: up the slope.
    step_size: of each.
    start: the standard deviation of the noise.
  """

  epsilon: float = 0.01
  norm: str = 'max'
  weight: float = 1.0
  steps: int = 1
  step_size: float = 0.01
  start: float = 1e-3

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.start:
      raise ValueError(
        'config.adversarial.start=0 stays where it is: there the answers are equal, and nothing '
        'says where they would not be; it must be above 0.'
      )

  def check(self, objective: Objective) -> None:
    if not objective.diverges or objective.compares:
      raise ValueError(
        "config.adversarial.name='smart' compares the answers to a text with those to the same "
        f'text moved, and the objective {plugins.said(objective)}, as it is set, '
        "does not say how far answers are apart; use 'fgm', 'pgd' or 'freelb'."
      )

  def terms(self, terms: Mapping[str, Number]) -> dict[str, Number]:
    return dict(terms) | {SMOOTHNESS: self.weight}

  def gradient(self, part: Part, params: PyTree) -> tuple[Any, Metrics]:
    network, weights = part.network, part.weights

    def clean(params: PyTree) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
      metrics, hidden_BPD = part.run(params, 'states')
      answer = part.run(params, 'answer', hidden_BPD=hidden_BPD)
      whole = metrics_lib.of_whole(metrics, weights)
      return (metrics_lib.total(whole, part.terms), answer), metrics

    def smooth(params: PyTree, answer: jax.Array) -> tuple[jax.Array, Metrics]:
      moved = part.run(params, 'answer', delta_BTD=delta_BTD)
      metrics = {SMOOTHNESS: network.objective.divergence(answer, moved, part.batch)}
      whole = metrics_lib.of_whole(metrics, weights)
      return metrics_lib.total(whole, {SMOOTHNESS: self.weight}), metrics

    (total, answer), back, metrics = jax.vjp(clean, params, has_aux=True)
    delta_BTD = self._farthest(part, params, answer)
    added, back_added, found = jax.vjp(smooth, params, answer, has_aux=True)
    direct, by_answer = back_added(jnp.ones_like(added))
    (through,) = back((jnp.ones_like(total), by_answer))
    return part.placed(jax.tree.map(jnp.add, through, direct)), metrics | found

  def _farthest(self, part: Part, params: PyTree, answer: jax.Array) -> jax.Array:
    """Delta at which the answers are far from `answer`."""

    def apart(delta_BTD: jax.Array) -> jax.Array:
      moved = part.run(params, 'answer', delta_BTD=delta_BTD)
      return part.network.objective.divergence(answer, moved, part.batch)[0]

    def climb(delta_BTD: jax.Array, _: None) -> tuple[jax.Array, None]:
      return self.climbed(delta_BTD, jax.grad(apart)(delta_BTD), part.batch, self.step_size), None

    noise_BTD = drawn(part, jax.random.normal) * self.start
    return jax.lax.scan(climb, noise_BTD, None, length=self.steps)[0]

  def weights(self, network: Network, params: PyTree, batch: Batch) -> Metrics:
    # As those of the other metrics, of a pass of which the compiler keeps nothing else.
    answer = networks.apply(network, params, batch, 'answer')
    return {SMOOTHNESS: network.objective.divergence(answer, answer, batch)[1]}

  def flops(self, whole: Cost, model: Cost) -> float:
    return whole.step + 2 * self.steps * model.forward + model.step


METHODS: dict[str, type[Method]] = {'fgm': FGM, 'pgd': PGD, 'freelb': FreeLB, 'smart': SMART}


def parse(section: Mapping[str, Any]) -> Method | None:
  """The method of a config section: `name`, and the fields of that method's class; None where
  nothing is moved.

  Raises:
    ValueError: a name, an option or a value that is not allowed; options without a name.
    TypeError: an option of the wrong type.
  """
  given = {key: value for key, value in section.items() if value is not None}
  if 'name' not in given:
    if given:
      raise ValueError(
        f'config.adversarial.{min(given)} is set, and config.adversarial.name is not; known: '
        f'{", ".join(METHODS)}.'
      )
    return None
  factory = _named(given.pop('name'))
  method = plugins.construct('adversarial', factory, given)
  return method if method.epsilon else None


def options(name: str) -> list[str]:
  """The options of one method; ValueError for a name that is not known."""
  return list(plugins.signature(_named(name)))


def describe(method: Method) -> str:
  """What is done, in a line."""
  (name,) = (name for name, factory in METHODS.items() if type(method) is factory)
  fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
  shown = ', '.join(f'{key}={value}' for key, value in fields.items() if value is not None)
  plain = Cost(1.0, 2.0)
  times = method.flops(plain, plain) / plain.step
  return f'Adversarial training by {name} ({shown}): {times:.3g} times the FLOPs of a plain step.'


def drawn(part: Part, draw: Callable[..., jax.Array]) -> jax.Array:
  """Random numbers for the vectors of a batch, [B, T, D]; 0 for padding.

  Those of a token are drawn by the rng of the step, all that its text says, and where in it the
  token stands: they are the same wherever the text is laid out.

  Args:
    part: the rows.
    draw: (key, shape, dtype) to numbers.
  """
  tokens_BT, segments_BT = part.batch['tokens'], part.batch['segments']
  positions_BT = part.batch['positions'].astype(jnp.uint32)
  text_BT = over_text(_hash(tokens_BT.astype(jnp.uint32), positions_BT), segments_BT, 'add')
  options = part.network.model.options

  def of_token(text: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(part.rng, text), position)
    return draw(key, (options.dim,), options.accumulation_dtype)

  numbers_BTD = jax.vmap(jax.vmap(of_token))(text_BT, positions_BT)
  return jnp.where(segments_BT[..., None] > 0, numbers_BTD, 0)


def over_text(x_BT: jax.Array, segments_BT: jax.Array, how: str) -> jax.Array:
  """The sum ('add') or the largest ('max') of numbers from 0 on over each text, at each of its
  tokens, [B, T].
  """
  rows_B1 = jnp.arange(x_BT.shape[0])[:, None]
  texts = jnp.zeros((x_BT.shape[0], x_BT.shape[1] + 1), x_BT.dtype)  # no more than tokens; padding
  return getattr(texts.at[rows_B1, segments_BT], how)(x_BT)[rows_B1, segments_BT]


class Norm(NamedTuple):
  """How large the numbers [B, T, D] of a text are.

  Attributes:
    size: (numbers, segments) to the size of each text, at each of its tokens, [B, T, 1].
    within: (numbers, segments, size) to the nearest numbers of at most that size.
    spread: (segments, numbers) to a factor by which numbers between -1 and 1 have at most size 1,
      [B, T, 1].
  """

  size: Callable[[jax.Array, jax.Array], jax.Array]
  within: Callable[[jax.Array, jax.Array, float], jax.Array]
  spread: Callable[[jax.Array, jax.Array], jax.Array]


def _largest(x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
  return over_text(jnp.max(jnp.abs(x_BTD), -1), segments_BT, 'max')[..., None]


def _root_of_squares(x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
  # Divided by the largest first: the square of a small gradient is 0.
  largest_BT1 = _largest(x_BTD, segments_BT)
  parts_BTD = x_BTD / jnp.where(largest_BT1 > 0, largest_BT1, 1)
  squares_BT = over_text(jnp.sum(parts_BTD**2, -1), segments_BT, 'add')
  return largest_BT1 * jnp.sqrt(squares_BT)[..., None]


def _shortened(x_BTD: jax.Array, segments_BT: jax.Array, most: float) -> jax.Array:
  size_BT1 = _root_of_squares(x_BTD, segments_BT)
  return jnp.where(size_BT1 > most, x_BTD * (most / jnp.where(size_BT1 > most, size_BT1, 1)), x_BTD)


def _by_root_of_count(segments_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
  ones_BT = jnp.ones(segments_BT.shape, x_BTD.dtype)
  return 1 / jnp.sqrt(over_text(ones_BT, segments_BT, 'add') * x_BTD.shape[-1])[..., None]


NORMS = {
  'l2': Norm(_root_of_squares, _shortened, _by_root_of_count),
  'max': Norm(
    _largest,
    lambda x_BTD, segments_BT, most: jnp.clip(x_BTD, -most, most),
    lambda segments_BT, x_BTD: jnp.ones((), x_BTD.dtype),
  ),
}


def _prefixed(metrics: Metrics, network: Network) -> Metrics:
  """The losses among metrics, under the names of the moved point."""
  return {PREFIX + name: metrics[name] for name in network.terms}


def _hash(tokens: jax.Array, positions: jax.Array) -> jax.Array:
  """uint32 numbers that look drawn, by token and position (the finalizer of MurmurHash3)."""
  x = tokens * jnp.uint32(0x9E3779B1) + positions * jnp.uint32(0x85EBCA77)
  for factor in (0x85EBCA6B, 0xC2B2AE35):
    x = (x ^ (x >> 16)) * jnp.uint32(factor)
  return x ^ (x >> 16)


def _named(name: str) -> type[Method]:
  if name not in METHODS:
    raise ValueError(
      f'config.adversarial.name={name!r} is not known{plugins.nearest(name, METHODS)}; known: '
      f'{", ".join(METHODS)}.'
    )
  return METHODS[name]
