"""The pure steps: `train_step(state, batch) -> (state, pairs)`, and the same without learning.

A loss stays a (sum, weight) pair until it is divided by the weight of the whole global batch.
Micro-batches divide by the same global weight, so one batch of B and k micro-batches of B / k have
the same gradient, however unevenly the weights fall.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from llm_jax.core import metrics
from llm_jax.core.contracts import Batch, Objective, Pairs
from llm_jax.core.state import TrainState
from llm_jax.parallel.sharding import constrain


class Network(nn.Module):
  """A model, the heads that an objective asked for, and that objective's loss: parameters under
  `model` and `heads_<name>`.
  """

  model: nn.Module
  heads: Mapping[str, nn.Module]
  objective: Objective

  def __call__(self, batch: Batch, train: bool = False) -> Pairs:
    """The objective's (sum, weight) pairs for a batch; dropout draws from the stream `dropout` when
    `train`.
    """
    hidden_BPD = self.hidden(batch, self.objective.places(batch), train)
    with jax.named_scope('objective'):
      return self.objective.loss(self, hidden_BPD, batch)

  def predict(self, batch: Batch) -> dict[str, jax.Array]:
    """What the objective's predictor says of each row."""
    predictor = self.objective.predictor
    return predictor.predict(self, self.hidden(batch, predictor.places(batch)), batch)

  def hidden(
    self, batch: Batch, places_BP: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """The model's last hidden states at some places of each row, [B, P, D]; None for all, [B, T,
    D].
    """
    tokens, segments, positions, types = (
      None if key not in batch else constrain(batch[key], 'batch', 'length')
      for key in ('tokens', 'segments', 'positions', 'token_types')
    )
    return self.model(
      tokens,
      segments_BT=segments,
      positions_BT=positions,
      token_types_BT=types,
      places_BP=places_BP,
      train=train,
    )


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  network: Network,
  tx: optax.GradientTransformation,
  learning_rate: Callable[[jax.Array], jax.Array],
  micro_batches: int = 1,
  shardings: Any = None,
) -> tuple[TrainState, Pairs]:
  """One optimizer step on one global batch.

  Args: state: the state before. batch: arrays with B rows, B divisible by `micro_batches`. network:
    what to train. tx: the optimizer. learning_rate: step to rate, for the log only. micro_batches:
    in how many parts the batch is run, one after the other, to save memory. shardings: where the
    gradients lie: as what the optimizer keeps for each parameter. None: wherever.

  Returns: The state after, and pairs: the objective's, and `loss`, `gradient_norm`,
    `learning_rate`, `tokens` (counted, not mean).
  """
  rng = jax.random.fold_in(state.rng, state.step)
  grads, pairs = gradient(
    state.params, batch, rng, network=network, micro_batches=micro_batches, shardings=shardings
  )
  with jax.named_scope('optimizer'):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
  pairs |= {
    'gradient_norm': (optax.global_norm(grads), 1.0),
    'learning_rate': (learning_rate(state.step), 1.0),
    'tokens': (jnp.sum(batch['segments'] > 0), 1.0),
  }
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), pairs


def gradient(
  params: Any,
  batch: Batch,
  rng: jax.Array,
  *,
  network: Network,
  micro_batches: int = 1,
  shardings: Any = None,
) -> tuple[Any, Pairs]:
  """The gradient of the total loss over one global batch, and the pairs with the total as `loss`.

  Total = sum over terms of coefficient * sum / (weight of the whole batch); dropout only where
  `rng` is not None.
  """
  rngs = lambda key: {} if key is None else {'dropout': key}

  def weighted(params, batch, key, weights):
    pairs = network.apply({'params': params}, batch, train=key is not None, rngs=rngs(key))
    shares = (
      pairs
      if weights is None
      else {name: (pairs[name][0], weight) for name, weight in weights.items()}
    )
    return metrics.total(shares, network.objective.terms), pairs

  def differentiate(*args):
    grads, pairs = jax.grad(weighted, has_aux=True)(*args)
    return (
      grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)
    ), pairs

  if micro_batches == 1:
    grads, pairs = differentiate(params, batch, rng, None)
  else:
    # Weights depend on the batch alone, so that of this forward pass the compiler keeps nothing but
    # them.
    weights = {
      name: weight for name, (_, weight) in network.apply({'params': params}, batch).items()
    }
    parts = jax.tree.map(lambda x: _micro(x, micro_batches), dict(batch))
    shapes = jax.eval_shape(
      differentiate, params, jax.tree.map(lambda x: x[0], parts), rng, weights
    )

    def body(carry, part):
      index, micro = part
      key = None if rng is None else jax.random.fold_in(rng, index)
      return jax.tree.map(jnp.add, carry, differentiate(params, micro, key, weights)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, pairs), _ = jax.lax.scan(body, zeros, (jnp.arange(micro_batches), parts))
  return grads, pairs | {'loss': (metrics.total(pairs, network.objective.terms), 1.0)}


def eval_step(params: Any, batch: Batch, *, network: Network) -> Pairs:
  """The objective's pairs for one batch, without dropout."""
  return network.apply({'params': params}, batch)


def predict_step(params: Any, batch: Batch, *, network: Network) -> dict[str, jax.Array]:
  """What the objective predicts for each row of one batch."""
  return network.apply({'params': params}, batch, method='predict')


def _micro(x_B: jax.Array, count: int) -> jax.Array:
  # Row r goes to micro-batch r % count: with rows sharded over devices, each device's rows are
  # dealt out without moving.
  return x_B.reshape(x_B.shape[0] // count, count, *x_B.shape[1:]).swapaxes(0, 1)
