"""The pure train step: `train_step(state, batch) -> (state, metrics)`.

A loss stays a (sum, weight) pair until it is divided by the weight of the whole global batch.
Micro-batches divide by the same global weight, so one batch of B rows and k micro-batches of B / k
have the same gradient, however unevenly the weights fall.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.core import metrics as metrics_lib
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.contracts import Adapter, Batch, Compression, Metrics, Number, Objective
from llm_jax.core.state import AVERAGES, COMPRESSED, TrainState
from llm_jax.core.tree import PyTree
from llm_jax.programs import network as networks
from llm_jax.programs.network import Network
from llm_jax.training import adversarial as adversarial_lib
from llm_jax.training import optimizers

Rng = jax.Array


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  network: Network,
  tx: optax.GradientTransformation,
  learning_rate: Callable[[jax.Array], jax.Array],
  steps: int = 1,
  micro_batches: int = 1,
  shardings: PyTree = None,
  layers: Mapping[str, np.ndarray] | None = None,
  begins: Mapping[str, np.ndarray] | None = None,
  ema_decay: float = 0.0,
  adversarial: adversarial_lib.Method | None = None,
  compression: Compression | None = None,
  infos: Mapping[str, params_lib.Info] | None = None,
  forward: Callable[[PyTree], PyTree] | None = None,
) -> tuple[TrainState, Metrics]:
  """One optimizer step on one global batch.

  Args:
    state: the state before.
    batch: arrays with B rows, B divisible by `micro_batches`.
    network: what to train; its adapter's `after_update` comes after the optimizer.
    tx: the optimizer of `state.params`.
    learning_rate: step to rate, for the log only.
    steps: of the whole run; at which of them the state is decides the terms of its loss.
    micro_batches: in how many parts the batch is run, one after the other, to save memory.
    shardings: where the gradients lie: as what the optimizer keeps for each parameter. None:
      anywhere.
    layers: of stacks that are trained in part, which of their layers are, by path.
    begins: of what is not trained from the first step on, after how many steps it is, by path; see
      `Adapter.begins`.
    ema_decay: of the averages, `Optimizer.ema_decay`; 0: there are none.
    adversarial: how texts are moved to learn from them; None: they are not.
    compression: what the model gets used to; None: nothing.
    infos: what each parameter is, for that.
    forward: from all parameters to what the network reads in their place; None: these.

  Returns:
    The state after, and metrics: the objective's, and `loss`, `gradient_norm`, `learning_rate`,
    `tokens` (a count, not a mean).
  """
  rng = jax.random.fold_in(state.rng, state.step)
  grads, metrics = _gradient_in_turn(
    state,
    batch,
    rng,
    network=network,
    steps=steps,
    micro_batches=micro_batches,
    shardings=shardings,
    layers=layers,
    adversarial=adversarial,
    forward=forward,
  )
  grads = _in_layers(grads, layers, 0.0)
  if compression is not None:
    state, grads = _before_update(compression, state, grads, steps)
  with jax.named_scope('optimizer'):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    begun = {path: steps <= state.step for path, steps in (begins or {}).items()}
    for chosen in (layers, begun):
      updates = _in_layers(updates, chosen, -0.0)  # added to any number, its bits stay
    params = optax.apply_updates(state.params, updates)
  metrics |= {
    'gradient_norm': (optax.global_norm(grads), 1.0),
    'learning_rate': (learning_rate(state.step), 1.0),
    'tokens': (_count_tokens(batch), 1.0),
  }
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
  if network.adapter is not None:
    state = network.adapter.after_update(state, grads)
  if compression is not None:
    done = state.step / steps
    carried = state.extras[COMPRESSED]
    params, carried = compression.after_update(state.params, carried, done, infos or {})
    state = state.replace(params=params, extras=dict(state.extras) | {COMPRESSED: carried})
  if ema_decay:
    before = state.extras[AVERAGES]
    averages = optimizers.averaged(before, state.params, state.step - 1, ema_decay)
    state = state.replace(extras=dict(state.extras) | {AVERAGES: averages})
  return state, metrics


def _before_update(
  compression: Compression, state: TrainState, grads: PyTree, steps: int
) -> tuple[TrainState, PyTree]:
  carried = state.extras[COMPRESSED]
  grads, carried = compression.before_update(grads, state.params, carried, state.step / steps)
  return state.replace(extras=dict(state.extras) | {COMPRESSED: carried}), grads


def _gradient_in_turn(
  state: TrainState, batch: Batch, rng: Rng, *, network: Network, steps: int, **options: Any
) -> tuple[Any, Metrics]:
  """The gradient of what this step learns: all of the objective, or the part whose turn it is."""
  done = state.step / max(steps - 1, 1)
  terms = network.terms_at(done)

  def of(objective: Objective) -> tuple[Any, Metrics]:
    part = network.clone(objective=objective)
    own = {name: terms[name] for name in part.terms}
    return gradient(
      state.params, batch, rng, frozen=state.frozen, network=part, terms=own, **options
    )

  turns = network.objective.turns
  if not turns:
    return of(network.objective)
  nothing: Metrics = {}  # what a step says of the parts whose turn it is not
  for turn in turns:
    _, metrics = jax.eval_shape(functools.partial(of, turn))
    nothing |= jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)

  def branch(turn: Objective) -> tuple[Any, Metrics]:
    grads, metrics = of(turn)
    return grads, nothing | jax.tree.map(jnp.asarray, metrics)

  branches = [functools.partial(branch, turn) for turn in turns]
  return jax.lax.switch(state.step % len(turns), branches)


def gradient(
  params: PyTree,
  batch: Batch,
  rng: Rng | None,
  *,
  network: Network,
  frozen: PyTree = None,
  micro_batches: int = 1,
  shardings: PyTree = None,
  layers: Mapping[str, np.ndarray] | None = None,
  terms: Mapping[str, Number] | None = None,
  adversarial: adversarial_lib.Method | None = None,
  forward: Callable[[PyTree], PyTree] | None = None,
) -> tuple[Any, Metrics]:
  """The gradient of the total loss over one global batch, and the metrics with it as `loss`.

  Total = sum over terms of coefficient * sum / (weight of the whole batch).

  Args:
    params: what the gradient is taken by.
    batch: B rows.
    rng: of the dropout, and of what is drawn to move texts; None for no dropout.
    network: the network.
    frozen: its other parameters.
    micro_batches: as in `train_step`.
    shardings: as in `train_step`.
    layers: as in `train_step`. Where no loop runs the layers, the gradients of the others are never
      computed.
    terms: the coefficients; None for `network.terms`.
    adversarial: as in `train_step`; needs an rng.
    forward: as in `train_step`.
  """
  terms = network.terms if terms is None else terms
  complete = functools.partial(_complete, frozen=frozen, layers=layers, forward=forward)
  loss = functools.partial(_loss, network=network, complete=complete, terms=terms)
  if network.objective.compares and micro_batches > 1:
    loss = functools.partial(
      _compared, network=network, complete=complete, terms=terms, count=micro_batches
    )
    micro_batches = 1

  def placed(grads: PyTree) -> Any:
    return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

  def differentiate(
    params: PyTree, batch: Batch, key: Rng | None, weights: PyTree
  ) -> tuple[Any, Metrics]:
    one = functools.partial(loss, batch=batch, rng=key, weights=weights)
    if adversarial is None:
      grads, metrics = jax.grad(one, has_aux=True)(params)
      return placed(grads), metrics
    part = adversarial_lib.Part(network, frozen, batch, key, rng, weights, one, placed, terms)
    return adversarial.gradient(part, params)

  if micro_batches == 1:
    grads, metrics = differentiate(params, batch, rng, None)
  else:
    # Weights depend on the batch alone, so that of this forward pass the compiler keeps only them.
    whole = networks.apply(network, complete(params), batch)
    weights = {name: weight for name, (_, weight) in whole.items()}
    if adversarial is not None:
      weights |= adversarial.weights(network, complete(params), batch)
    grads, metrics = _accumulated(differentiate, params, batch, rng, weights, micro_batches)
  if adversarial is not None:
    terms = adversarial.terms(terms)
  if network.adapter is not None and network.adapter.terms:
    terms = dict(terms) | network.adapter.terms
    more, own = jax.grad(_own_loss, has_aux=True)(params, network.adapter)
    grads, metrics = jax.tree.map(jnp.add, grads, more), metrics | own
  total = metrics_lib.total(metrics, terms)
  return grads, metrics | {'loss': (total, 1.0)}


def _own_loss(params: PyTree, adapter: Adapter) -> tuple[jax.Array, Metrics]:
  """What an adapter wants of its parameters; of no batch, so it is added once for all its parts."""
  metrics = adapter.loss(params)
  return metrics_lib.total(metrics, adapter.terms), metrics


def _loss(
  params: PyTree,
  delta_BTD: jax.Array | None = None,
  *,
  batch: Batch,
  rng: Rng | None,
  weights: PyTree,
  network: Network,
  complete: Callable[[PyTree], PyTree],
  terms: Mapping[str, Number],
) -> tuple[jax.Array, Metrics]:
  """The total loss of a part of a batch, the vectors of its tokens moved by delta; `weights`: those
  of the whole, None where it is all.
  """
  train = rng is not None
  rngs = {'dropout': rng} if train else {}
  metrics = networks.apply(
    network, complete(params), batch, rngs=rngs, delta_BTD=delta_BTD, train=train
  )
  return metrics_lib.total(metrics_lib.of_whole(metrics, weights), terms), metrics


def _compared(
  params: PyTree,
  delta_BTD: jax.Array | None = None,
  *,
  batch: Batch,
  rng: Rng | None,
  weights: None,
  network: Network,
  complete: Callable[[PyTree], PyTree],
  terms: Mapping[str, Number],
  count: int,
) -> tuple[jax.Array, Metrics]:
  """The total loss of a batch whose rows are compared with one another, run in `count` parts, the
  vectors of its tokens moved by delta.

  Of each part only what is compared is kept; in the backward pass it is run once more. Memory is
  that of one part, the gradient that of the whole (Gao et al. 2021, arXiv:2101.06983).
  """
  del weights

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def part(
    params: PyTree, micro: Batch, delta_BTD: jax.Array | None, key: Rng | None
  ) -> tuple[Metrics, dict[str, jax.Array]]:
    train = key is not None
    given = dict(rngs={'dropout': key} if train else {}, delta_BTD=delta_BTD, train=train)
    return networks.apply(network, complete(params), micro, method='part', **given)

  def body(carry: None, indexed: PyTree) -> tuple[None, PyTree]:
    index, (micro, delta_BTD) = indexed
    key = None if rng is None else jax.random.fold_in(rng, index)
    return carry, part(params, micro, delta_BTD, key)

  parts = jax.tree.map(lambda x: _micro(x, count), (dict(batch), delta_BTD))
  _, (metrics, found) = jax.lax.scan(body, None, (jnp.arange(count), parts))
  metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
  metrics |= network.compare(jax.tree.map(_whole, found), batch)
  return metrics_lib.total(metrics, terms), metrics


def _accumulated(
  differentiate: Callable[..., tuple[Any, Metrics]],
  params: PyTree,
  batch: Batch,
  rng: Rng | None,
  weights: PyTree,
  count: int,
) -> tuple[Any, Metrics]:
  """The sum of the gradients and metrics of `count` micro-batches, run one after the other."""
  parts = jax.tree.map(lambda x: _micro(x, count), dict(batch))
  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(differentiate, params, first, rng, weights)

  def body(carry: PyTree, part: PyTree) -> tuple[Any, None]:
    index, micro = part
    key = None if rng is None else jax.random.fold_in(rng, index)
    return jax.tree.map(jnp.add, carry, differentiate(params, micro, key, weights)), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  summed, _ = jax.lax.scan(body, zeros, (jnp.arange(count), parts))
  return summed


def _in_layers(x: PyTree, layers: Mapping[str, np.ndarray | jax.Array] | None, other: float) -> Any:
  """`x` with `other` in the layers of its stacks that are not trained."""
  if not layers:
    return x

  def leaf(path: str, x: jax.Array) -> jax.Array:
    if path not in layers:
      return x
    return jnp.where(layers[path].reshape(-1, *[1] * (x.ndim - 1)), x, jnp.asarray(other, x.dtype))

  return tree.map_with_path(leaf, x)


def _complete(
  params: PyTree,
  frozen: PyTree,
  layers: Mapping[str, np.ndarray] | None,
  forward: Callable[[PyTree], PyTree] | None,
) -> Any:
  """All parameters, as the network reads them; gradients stop at `frozen`, and at layers that are
  not trained.
  """

  def leaf(path: str, x: jax.Array) -> jax.Array:
    if not layers or path not in layers:
      return x
    learns = layers[path]
    first = [0, *(np.flatnonzero(np.diff(learns)) + 1)]  # layers of each part, all alike
    parts = jax.lax.split(x, np.diff([*first, len(learns)]).tolist())
    kept = [
      part if learns[i] else jax.lax.stop_gradient(part)
      for i, part in zip(first, parts, strict=True)
    ]
    return jnp.concatenate(kept)

  params = tree.map_with_path(leaf, params)
  params = params_lib.merge(params, frozen) if frozen else params
  return params if forward is None else forward(params)


def _count_tokens(batch: Batch) -> jax.Array:
  segments = [array for key, array in batch.items() if key.endswith('segments')]
  return sum((jnp.sum(array > 0) for array in segments), jnp.zeros((), jnp.int32))


def _micro(x_B: jax.Array, count: int) -> jax.Array:
  # Row r goes to micro-batch r % count: with rows sharded over devices, each device's rows are
  # dealt out without moving.
  return x_B.reshape(x_B.shape[0] // count, count, *x_B.shape[1:]).swapaxes(0, 1)


def _whole(x: jax.Array) -> jax.Array:
  """The inverse of `_micro`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
