"""Promise 4: one gradient, however a batch is cut, packed or weighted; in float64, where nothing
hides.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core import contracts
from llm_jax.core.state import TrainState
from llm_jax.models import decoder, encoder
from llm_jax.objectives import classify, clm, mix, mlm, nsp
from llm_jax.programs import network as networks
from llm_jax.training import step

SHAPE = dict(
  vocab_size=50,
  dim=16,
  layers=2,
  heads=2,
  mlp_dim=32,
  max_len=64,
  dropout=0.0,
  attention_dropout=0.0,
  dtype='float64',
  param_dtype='float64',
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def build(model, objective, batch):
  network = networks.Network(model, objective.heads(model), objective)
  shapes = nn.meta.unbox(jax.eval_shape(network.init, jax.random.PRNGKey(0), batch)['params'])
  rng = np.random.default_rng(
    1
  )  # not the initial point, where every bias is zero and every scale one
  return network, jax.tree.map(
    lambda s: jnp.asarray(rng.normal(0.5 if s.ndim < 2 else 0.0, 0.2, s.shape), s.dtype), shapes
  )


def gradient(network, params, batch, micro_batches=1):
  run = jax.jit(
    functools.partial(step.gradient, network=network, micro_batches=micro_batches), static_argnums=2
  )
  grads, pairs = run(params, batch, None)
  return grads, float(pairs['loss'][0])


def assert_close(a, b, tolerance=1e-10):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def examples(small, objective, lengths, seq_len, count, seed=0, labels=None):
  documents = small.random_documents(lengths, labels=labels)
  rows = objective.rows(documents, seq_len)
  rng = np.random.default_rng(seed)
  return small.stack([objective.transform(rows.example(i, rng), rng) for i in range(count)])


def uneven(small, kind):
  """A model, an objective, and a batch of 8 rows whose weights differ from row to row."""
  tokenizer = small.Tokenizer()
  if kind == 'clm':
    objective = clm.Objective(tokenizer, packing='none')
    return (
      decoder.Model(**SHAPE),
      objective,
      examples(small, objective, [1, 30, 3, 12, 25, 2, 7, 19], 32, 8),
    )
  if kind == 'mlm':
    objective = mlm.Objective(tokenizer, packing='none')
    return (
      encoder.Model(**SHAPE),
      objective,
      examples(small, objective, [1, 30, 3, 12, 25, 2, 7, 19], 32, 8),
    )
  if kind == 'bert':
    parts = {'mlm': mlm.Objective(tokenizer), 'nsp': nsp.Objective(tokenizer)}
    objective = mix.Objective(parts, 'nsp', {'mlm': 1.0, 'nsp': 0.5})
    return (
      encoder.Model(**SHAPE),
      objective,
      examples(small, objective, [1, 29, 3, 12, 25, 2, 7, 19], 32, 8),
    )
  parts = {
    'mlm': mlm.Objective(tokenizer),
    'classify': classify.Objective(tokenizer, ('a', 'b'), unlabelled='ignore', dropout=0.0),
  }
  objective = mix.Objective(parts, 'classify', {'mlm': 1.0, 'classify': 2.0})
  labels = ['a', None, None, 'b', 'b', None, None, None] * 2  # of texts that share rows
  return (
    encoder.Model(**SHAPE),
    objective,
    examples(small, objective, [1, 29, 3, 12, 25, 2, 7, 19] * 2, 32, 8, labels=labels),
  )


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['clm', 'mlm', 'bert', 'partly labelled'])
def test_micro_batches_have_the_gradient_of_the_whole(small, kind):
  model, objective, batch = uneven(small, kind)
  network, params = build(model, objective, batch)
  whole, loss = gradient(network, params, batch)
  for count, unroll in (
    (2, 1),
    (8, 1),
    (2, 0),
  ):  # without a loop the last layer runs where the objective reads alone
    parts, same_loss = gradient(
      network.clone(model=model.clone(unroll=unroll)), params, batch, count
    )
    assert_close(parts, whole)
    assert abs(same_loss - loss) < 1e-10
  if kind == 'mlm':  # the mean of the parts' means, which many trainers take, is another gradient
    halves = [
      gradient(network, params, {k: v[half] for k, v in batch.items()})[0]
      for half in (slice(0, 4), slice(4, 8))
    ]
    wrong = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    with pytest.raises(AssertionError):
      assert_close(wrong, whole, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('alternate', [False, True])
def test_weights_move_with_the_step_and_parts_take_turns(small, alternate):
  """Each step goes down the gradient of coefficient * sum / weight by hand, of all parts or of the
  one whose turn it is, in micro-batches too.
  """
  model, objective, batch = uneven(small, 'partly labelled')
  weights = {'mlm': (1.0, 0.0), 'classify': (0.5, 2.0)}
  objective = mix.Objective(objective.parts, 'classify', weights, alternate)
  assert objective.terms == {'mlm': 0.0, 'classify': 2.0}  # a validation set has the last ones
  network, params = build(model, objective, batch)
  take = functools.partial(
    step.train_step, network=network, tx=optax.sgd(1.0), learning_rate=lambda n: 1.0, steps=5
  )
  of_two = jax.jit(functools.partial(take, micro_batches=2))
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optax.sgd(1.0).init(params),
    rng=jax.random.PRNGKey(0),
  )

  @jax.jit
  def by_hand(params, coefficients):
    def loss(params):
      found = networks.apply(network, params, batch)
      return sum(c * found[name][0] / found[name][1] for name, c in coefficients.items())

    return jax.grad(loss)(params)

  for number, (mlm_weight, classify_weight) in enumerate(((1, 0.5), (0.75, 0.875), (0.5, 1.25))):
    turn = [('mlm', 'classify')[number % 2]] if alternate else ['mlm', 'classify']
    values = {'mlm': float(mlm_weight), 'classify': float(classify_weight)}
    wanted = by_hand(state.params, {name: values[name] * (name in turn) for name in values})
    after, metrics = of_two(state, batch)
    assert_close(jax.tree.map(jnp.subtract, state.params, after.params), wanted)
    assert [name for name in ('mlm', 'classify') if metrics[name][1] > 0] == turn
    state = after


class Small(contracts.Adapter):
  """Wants its parameters small."""

  terms = {'size': 0.3}

  def loss(self, params):
    return {'size': (sum(jnp.sum(x**2) / 2 for x in jax.tree.leaves(params)), 1.0)}


@pytest.mark.slow
def test_what_an_adapter_wants_is_added_once_however_a_batch_is_cut(small):
  model, objective, batch = uneven(small, 'mlm')
  network, params = build(model, objective, batch)
  without, loss = gradient(network, params, batch)
  wanted = jax.tree.map(lambda slope, x: slope + 0.3 * x, without, params)
  size = sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(params)) / 2
  for count in (1, 4):
    found, total = gradient(network.clone(adapter=Small()), params, batch, count)
    assert_close(found, wanted)
    assert total == pytest.approx(loss + 0.3 * size, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['clm', 'mlm'])
def test_packed_rows_have_the_gradient_of_padded_ones(small, kind):
  lengths, seq_len = [9, 5, 10, 3, 7, 11, 2, 6], 32
  model, objective, _ = uneven(small, kind)
  objective = type(objective)(small.Tokenizer(), packing='none')
  padded = examples(small, objective, lengths, seq_len, len(lengths))
  packed = pack_rows(padded, [[0, 1, 2], [3, 4, 5], [6, 7]])
  network, params = build(model, objective, padded)
  (alone, loss), (together, same_loss) = (
    gradient(network, params, padded),
    gradient(network, params, packed),
  )
  assert_close(together, alone)
  assert abs(same_loss - loss) < 1e-10
  crossed = packed | {
    'segments': np.minimum(packed['segments'], 1)
  }  # documents that see each other: another gradient
  with pytest.raises(AssertionError):
    assert_close(gradient(network, params, crossed)[0], alone, 1e-6)


def pack_rows(padded, groups):
  """The rows of each group end to end in one row: the same tokens, masks and targets, segments
  numbered on.
  """
  seq_len, rows = padded['tokens'].shape[1], []
  for group in groups:
    row, place = {key: [] for key in padded}, 0
    for number, index in enumerate(group, 1):
      used = int((padded['segments'][index] > 0).sum())
      for key in padded:
        value = padded[key][index]
        if key.startswith('mask_'):
          kept = padded['mask_weights'][index] > 0
          row[key] += list(value[kept] + (place if key == 'mask_positions' else 0))
        elif key == 'bytes':
          row[key] = row[key] + [value]
        else:
          row[key] += list(value[:used] if key != 'segments' else np.full(used, number))
      place += used
    rows.append(row)
  most = max(len(row['mask_targets']) for row in rows) if 'mask_targets' in padded else 0
  size = lambda key: most if key.startswith('mask_') else seq_len
  fill = lambda key, values: (
    sum(values) if key == 'bytes' else np.pad(np.array(values), (0, size(key) - len(values)))
  )
  return {
    key: np.stack([fill(key, row[key]) for row in rows]).astype(padded[key].dtype) for key in padded
  }


@pytest.mark.slow
def test_a_batch_without_weight_has_no_loss_and_no_gradient(small):
  model, objective, batch = uneven(small, 'mlm')
  network, params = build(model, objective, batch)
  empty = {key: np.zeros_like(value) for key, value in batch.items()}
  for count in (1, 4):
    grads, loss = gradient(network, params, empty, count)
    assert loss == 0 and all(not np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_the_forward_pass_for_the_weights_is_not_run(small):
  """Micro-batches ask a pass over the whole batch for its weights only: the compiled step must not
  hold its matrix products.
  """
  model, objective, batch = uneven(small, 'clm')
  network, params = build(model, objective, batch)

  def products(rows, count):
    part = {key: value[:rows] for key, value in batch.items()}
    run = jax.jit(
      functools.partial(step.gradient, network=network, micro_batches=count), static_argnums=2
    )
    return run.lower(params, part, None).compile().as_text().count(' dot(')

  assert products(8, 4) == products(2, 1) > 0


def test_a_train_step_learns_and_counts(small):
  model, objective, batch = uneven(small, 'clm')
  network, params = build(model, objective, batch)
  tx = optax.sgd(0.1)
  state = TrainState(
    step=jnp.int32(0), params=params, opt_state=tx.init(params), rng=jax.random.PRNGKey(0)
  )
  run = jax.jit(
    functools.partial(
      step.train_step, network=network, tx=tx, learning_rate=lambda s: 0.1 * (s + 1)
    )
  )
  before = float(networks.apply(network, params, batch)['clm'][0])
  state, pairs = run(state, batch)
  assert (
    int(state.step) == 1 and float(networks.apply(network, state.params, batch)['clm'][0]) < before
  )
  assert int(pairs['tokens'][0]) == int((batch['segments'] > 0).sum()) and float(
    pairs['learning_rate'][0]
  ) == pytest.approx(0.1)


@pytest.mark.slow
def test_dropout_draws_anew_each_step_and_not_in_evaluation(small):
  model, objective, batch = uneven(small, 'clm')
  network, params = build(model.copy(dropout=0.5), objective, batch)
  run = jax.jit(functools.partial(step.gradient, network=network))
  loss = lambda rng: float(run(params, batch, rng)[1]['loss'][0])
  one, two = (loss(jax.random.fold_in(jax.random.PRNGKey(3), s)) for s in (0, 1))
  assert one != two and one == loss(jax.random.fold_in(jax.random.PRNGKey(3), 0))
  evaluated = networks.apply(network, params, batch)['clm']
  assert loss(None) == pytest.approx(float(evaluated[0] / evaluated[1]))
