import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.training import optimizers

STEPS = 3
RATE, DECAY = 0.125, 0.25  # exact in float32
LAYERS = 3


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def leaf(rng, *shape):
  return rng.normal(size=shape)


def layer(rng, stack=()):
  return {
    'attention': {
      'query': {'kernel': leaf(rng, *stack, 6, 2, 4), 'bias': leaf(rng, *stack, 2, 4)},
      'out': {'kernel': leaf(rng, *stack, 2, 4, 6)},
    },
    'mlp': {'up': {'kernel': leaf(rng, *stack, 130, 140)}},
    'mlp_norm': {'scale': leaf(rng, *stack, 6)},
  }


def model(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  params = {
    'model': {
      'embedder': {'token': {'embedding': leaf(rng, 11, 6)}},
      'stack': {'layers': {'block': layer(rng, (LAYERS,))}},
    },
    'heads_mlm': {'dense': {'kernel': leaf(rng, 6, 6), 'bias': leaf(rng, 6)}},
  }
  return jax.tree.map(lambda x: scale * x, params)


GRADIENTS = [model(seed, scale=0.1 * seed) for seed in range(1, STEPS + 1)]


def section(name, **options):
  return {
    'name': name,
    'learning_rate': RATE,
    'schedule': 'constant',
    'weight_decay': DECAY,
    'clip_norm': 0.0,
  } | options


def infos(params):
  """What each parameter is, as a model with these names would say it."""
  return {path: info(path, leaf) for path, leaf in tree.flatten(params).items()}


def info(path, leaf):
  parts = path.split('/')
  stacked = 'layers' in parts
  first = 'first' in parts
  block = int(path.partition('block_')[2].partition('/')[0] or 0)
  layer = None
  if 'embedder' in parts:
    layer = params_lib.EMBEDDINGS
  elif stacked or first:
    layer = 0 if first else block + ('block_' in path)  # a first layer comes before the blocks
  inputs = ()
  if parts[-1] == 'kernel':
    inputs = (0, 1) if parts[-2] == 'out' else (0,)
  names = ('layers',) * stacked + (None,) * (np.ndim(leaf) - stacked)
  decayed = parts[-1] in ('kernel', 'embedding')
  return params_lib.Info(names, inputs, decayed, layer, 2 if 'block_' in path else 1)


def run(config, params, gradients):
  """Parameters after one step for each gradient, by path."""
  tx, _ = optimizers.create(config, len(gradients), params, infos(params))
  update = jax.jit(tx.update)
  state = tx.init(params)
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return {path: np.asarray(value) for path, value in tree.flatten(params).items()}


def reference(rule, params=None, gradients=None):
  """The same by a NumPy rule(path, parameter, gradients so far, memory of that leaf) -> direction,
  layer by layer.
  """
  params, gradients = params or model(0), gradients or GRADIENTS
  result = {path: np.array(value) for path, value in tree.flatten(params).items()}
  flat = [tree.flatten(g) for g in gradients]
  for path, value in result.items():
    rows = range(LAYERS) if 'layers' in path else [...]
    for row in rows:
      memory = {}
      for t in range(len(gradients)):
        decayed = path.endswith(('kernel', 'embedding'))
        value[row] -= RATE * rule(
          path, value[row].copy(), flat[t][path][row], t + 1, memory, DECAY if decayed else 0.0
        )
  return result


def adam(gradient, t, memory, b1, b2, eps):
  memory['m'] = b1 * memory.get('m', 0) + (1 - b1) * gradient
  memory['v'] = b2 * memory.get('v', 0) + (1 - b2) * gradient**2
  return memory['m'] / (1 - b1**t) / (np.sqrt(memory['v'] / (1 - b2**t)) + eps)


def adamw_rule(path, x, gradient, t, memory, decay):
  return adam(gradient, t, memory, 0.9, 0.99, 1e-5) + decay * x


def lamb_rule(path, x, gradient, t, memory, decay):
  direction = adam(gradient, t, memory, 0.9, 0.999, 1e-6) + decay * x
  return np.linalg.norm(x) / np.linalg.norm(direction) * direction


def lion_rule(path, x, gradient, t, memory, decay):
  m = memory.get('m', 0)
  memory['m'] = 0.99 * m + 0.01 * gradient
  return np.sign(0.9 * m + 0.1 * gradient) + decay * x


def sgd_rule(path, x, gradient, t, memory, decay):
  memory['m'] = 0.5 * memory.get('m', 0) + gradient
  return memory['m'] + decay * x


def adafactor_rule(path, x, gradient, t, memory, decay):
  b2 = 1 - float(t) ** -0.8
  square = gradient**2 + 1e-30
  if x.ndim == 2 and min(x.shape) >= 128:
    memory['r'] = b2 * memory.get('r', 0) + (1 - b2) * square.sum(1)
    memory['c'] = b2 * memory.get('c', 0) + (1 - b2) * square.sum(0)
    v = np.outer(memory['r'], memory['c']) / memory['r'].sum()
  else:
    v = memory['v'] = b2 * memory.get('v', 0) + (1 - b2) * square
  u = gradient / np.sqrt(v)
  u /= max(1.0, np.sqrt(np.mean(u**2)))
  return max(1e-3, np.sqrt(np.mean(x**2))) * u + decay * x


def muon_rule(path, x, gradient, t, memory, decay):
  if not ('layers' in path and path.endswith('kernel')):
    return adam(gradient, t, memory, 0.9, 0.999, 1e-8) + decay * x
  memory['m'] = m = 0.95 * memory.get('m', 0) + 0.05 * gradient
  nesterov = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * gradient / (1 - 0.95**t)
  matrix = (
    nesterov.reshape(-1, x.shape[-1]) if '/out/' in path else nesterov.reshape(x.shape[0], -1)
  )
  z = matrix / np.linalg.norm(matrix)
  for _ in range(5):
    gram = z @ z.T
    z = 3.4445 * z + (-4.7750 * gram + 2.0315 * gram @ gram) @ z
  assert 0.5 < np.linalg.svd(z, compute_uv=False)[0] < 1.3
  return 0.2 * np.sqrt(max(matrix.shape)) * z.reshape(x.shape) + decay * x


@pytest.mark.parametrize(
  'config, rule',
  [
    (section('adamw', b2=0.99, eps=1e-5), adamw_rule),
    (section('lamb'), lamb_rule),
    (section('lion'), lion_rule),
    (section('sgd', momentum=0.5), sgd_rule),
    (section('adafactor'), adafactor_rule),
    (section('muon'), muon_rule),
  ],
  ids=lambda x: x['name'] if isinstance(x, dict) else '',
)
def test_updates_are_those_of_the_papers(config, rule):
  found, expected = run(config, model(0), GRADIENTS), reference(rule)
  for path, value in expected.items():
    np.testing.assert_allclose(found[path], value, rtol=1e-6, atol=1e-8, err_msg=path)


@pytest.mark.slow
def test_a_trust_ratio_of_the_whole_stack_would_be_noticed():
  params, path = model(0), 'model/stack/layers/block/attention/query/bias'
  whole = optax.lamb(RATE)
  updates, _ = whole.update(GRADIENTS[0], whole.init(params), params)
  wrong = tree.flatten(optax.apply_updates(params, updates))[path]
  assert np.abs(run(section('lamb'), params, GRADIENTS[:1])[path] - wrong).max() > 1e-2


def separate(params):
  """The same parameters with each layer of the stack by itself."""
  stack = params['model']['stack']['layers']['block']
  layers = {f'stack_{i}': {'first': jax.tree.map(lambda x: x[i], stack)} for i in range(LAYERS)}  # noqa: B023
  return {
    'model': {'embedder': params['model']['embedder'], **layers},
    'heads_mlm': params['heads_mlm'],
  }


@pytest.mark.slow
@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_a_stack_learns_like_its_layers_apart(name):
  config = section(name, clip_norm=0.5)
  stacked = run(config, model(0), GRADIENTS)
  apart = run(config, separate(model(0)), [separate(g) for g in GRADIENTS])
  expected = tree.flatten(separate(tree.nest(stacked)))
  assert expected.keys() == apart.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(apart[path], value, rtol=1e-9, atol=1e-12, err_msg=path)


def test_clipping_comes_first_and_is_global():
  norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(GRADIENTS[0])))
  config = section('sgd', momentum=0.0, weight_decay=0.0)
  start, clipped, free = (
    tree.flatten(model(0)),
    run(config | {'clip_norm': 0.5}, model(0), GRADIENTS[:1]),
    run(config, model(0), GRADIENTS[:1]),
  )
  for path, value in start.items():
    np.testing.assert_allclose(value - clipped[path], (value - free[path]) * 0.5 / norm, rtol=1e-6)


def patterned():
  """Five layers: one apart, then two groups of a pattern of two."""
  block = lambda: {'mlp': {'up': {'kernel': np.ones((2, 4, 4))}, 'down': {'bias': np.ones((2, 4))}}}
  return {
    'model': {
      'embedder': {
        'token': {'embedding': np.ones((7, 4))},
        'embedding_norm': {'scale': np.ones(4)},
      },
      'stack': {
        'first': {'mlp_norm': {'scale': np.ones(4)}},
        'layers': {'block_0': block(), 'block_1': block()},
      },
      'final_norm': {'scale': np.ones(4)},
    },
    'heads_classify': {'dense': {'kernel': np.ones((4, 3))}},
  }


def test_layer_wise_rates():
  params = patterned()
  config = section('sgd', momentum=0.0, weight_decay=0.0, layer_decay=0.5)
  steps = {
    path: (np.ones_like(value) - value) / RATE
    for path, value in run(config, params, [params]).items()
  }
  assert np.all(steps['model/embedder/token/embedding'] == 0.5**5)
  assert np.all(steps['model/embedder/embedding_norm/scale'] == 0.5**5)
  assert np.all(steps['model/stack/first/mlp_norm/scale'] == 0.5**4)
  for name in ('up/kernel', 'down/bias'):
    assert [np.unique(x).tolist() for x in steps[f'model/stack/layers/block_0/mlp/{name}']] == [
      [0.5**3],
      [0.5],
    ]
    assert [np.unique(x).tolist() for x in steps[f'model/stack/layers/block_1/mlp/{name}']] == [
      [0.25],
      [1.0],
    ]
  assert np.all(steps['model/final_norm/scale'] == 1) and np.all(
    steps['heads_classify/dense/kernel'] == 1
  )


def test_only_kernels_and_embeddings_are_decayed():
  params = patterned()
  zeros = jax.tree.map(np.zeros_like, params)
  after = run(section('adamw'), params, [zeros])
  for path, value in after.items():
    assert np.all(value == (1 - RATE * DECAY if path.endswith(('kernel', 'embedding')) else 1)), (
      path
    )


@pytest.mark.parametrize(
  'options, points',
  [
    (
      {'schedule': 'linear', 'warmup_steps': 4},
      {0: 0.25, 3: 1.0, 4: 1.0, 12: 0.5, 19: 1 / 16, 20: 0.0},
    ),
    ({'schedule': 'linear', 'final_fraction': 0.1}, {0: 1.0, 10: 0.55, 20: 0.1, 30: 0.1}),
    (
      {'schedule': 'cosine', 'warmup_fraction': 0.2},
      {1: 0.5, 4: 1.0, 8: 0.5 + math.sqrt(0.125), 12: 0.5, 20: 0.0},
    ),
    (
      {'schedule': 'inverse_sqrt', 'warmup_steps': 4},
      {1: 0.5, 3: 1.0, 4: math.sqrt(4 / 5), 15: 0.5},
    ),
    (
      {'schedule': 'wsd', 'warmup_steps': 2, 'decay_fraction': 0.4},
      {0: 0.5, 1: 1.0, 12: 1.0, 14: 0.5, 20: 0.0},
    ),
    ({'schedule': 'wsd'}, {0: 1.0, 16: 1.0, 17: 0.5, 20: 0.0}),
    ({'schedule': 'constant'}, {0: 1.0, 19: 1.0}),
  ],
)
def test_schedules_at_points(options, points):
  rate = optimizers.schedule(optimizers.parse(section('adamw', learning_rate=3.0) | options), 20)
  for step, expected in points.items():
    np.testing.assert_allclose(rate(step), 3 * expected, atol=1e-6, err_msg=str(step))
  np.testing.assert_allclose(jax.jit(rate)(jnp.int32(3)), rate(3), rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(optimizers.SCHEDULES), st.integers(1, 500), st.floats(0, 1))
def test_every_step_learns_at_no_more_than_the_peak_rate(name, steps, warmup):
  rate = optimizers.schedule(
    optimizers.parse(
      {'name': 'adamw', 'learning_rate': 2.0, 'schedule': name, 'warmup_fraction': warmup}
    ),
    steps,
  )
  rates = np.asarray(rate(np.arange(500)))[:steps]  # one shape, compiled once
  assert np.all(rates > 0) and np.all(rates <= 2.0 + 1e-6)
  peak = max(round(steps * warmup), 1) - 1
  assert np.all(np.diff(rates[: peak + 1]) > 0) and np.all(np.diff(rates[peak:]) <= 1e-6)
  assert rates[peak] == pytest.approx(2.0)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'name': 'adamv'}, "'adamv' is not known .did you mean 'adamw'"),
    ({'schedule': 'cosin'}, "did you mean 'cosine'"),
    ({'momentum': 0.9}, 'momentum is not an option'),
    ({'weight_decy': 0.9}, "did you mean 'weight_decay'"),
    ({'warmup_steps': 11}, 'warmup_steps=11 is more than config.steps=10.*warmup_fraction'),
    ({'warmup_steps': 1, 'warmup_fraction': 0.1}, 'set one of them'),
    ({'decay_fraction': 0.1}, 'for the schedule wsd'),
    ({'final_fraction': 0.1}, 'for the schedules linear'),
    ({'learning_rate': 0.0}, 'must be above 0'),
    ({'b1': 1.0}, 'b1=1.0 must be at least 0 and below 1'),
    ({'layer_decay': 1.5}, 'layer_decay=1.5'),
    ({'clip_norm': -1.0}, 'clip_norm=-1.0 must be at least 0'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    optimizers.create(section('adamw') | options, 10, patterned(), infos(patterned()))


def test_wrong_types_are_refused():
  with pytest.raises(TypeError, match='config.optimizer.b1'):
    optimizers.parse(section('adamw', b1='0.9'))


def test_all_combinations_compile_on_abstract_parameters():
  abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, patterned()))
  for name, layer_decay in itertools.product(optimizers.OPTIMIZERS, (1.0, 0.9)):
    config = {'name': name, 'learning_rate': 1e-3, 'layer_decay': layer_decay}
    tx, _ = optimizers.create(config, 10, abstract, infos(abstract))
    state = jax.eval_shape(tx.init, abstract)
    updates, after = jax.eval_shape(tx.update, abstract, state, abstract)
    assert tree.difference(abstract, updates) == '' and tree.difference(state, after) == ''


def test_averages_are_those_of_their_definition():
  """a = d a + (1 - d) p, d = min(0.9, (1 + step) / (10 + step)), in float64."""
  rng = np.random.default_rng(0)
  params = [{'a': rng.normal(size=(3, 2)), 'b': rng.normal(size=2)} for _ in range(200)]
  found = expected = params[0]
  found = jax.tree.map(jnp.float32, found)
  for step, new in enumerate(params[1:]):
    d = min(0.9, (1 + step) / (10 + step))
    expected = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * p, expected, new)
    new = jax.tree.map(jnp.float32, new)
    found = optimizers.averaged(found, new, jnp.int32(step), 0.9)
  for path, x in tree.flatten(found).items():
    np.testing.assert_allclose(x, tree.flatten(expected)[path], rtol=1e-4, atol=1e-5)
  assert np.abs(found['a'] - params[-1]['a']).max() > 0.1
  with pytest.raises(ValueError, match=r'ema_decay=1.0 must be at least 0 and below 1'):
    optimizers.parse(section('adamw') | dict(ema_decay=1.0))
