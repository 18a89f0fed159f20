"""The stack: what scan, unroll and remat may not change, and what layers see in each of them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.nn import rotary
from llm_jax.nn.block import Block, LayerContext
from llm_jax.nn.linear import Linear
from llm_jax.nn.options import Options
from llm_jax.nn.rows import at
from llm_jax.nn.stack import Stack, check_pattern, unstacked
from llm_jax.parallel.cpu import products

BASE = Options(dim=12, layers=2, heads=2, mlp_dim=8, norm_order='post', norm_eps=1e-12)
PATTERN = dict(window=2, global_every=2, first_bare=True)  # first, and twice block_0 and block_1
NOTHING = LayerContext()
TRAIN = LayerContext(train=True)
pytestmark = pytest.mark.usefixtures('stated_broadcasting')


def options(**changes):
  return dataclasses.replace(BASE, **{'head_dim': None} | changes)


def normal(*shape, seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def described(stack):
  """What each parameter is, and their shapes."""
  boxed = jax.eval_shape(lambda: stack.init(jax.random.key(0), jnp.ones((1, 4, 12)), NOTHING))
  return params_lib.infos(boxed['params']), nn.unbox(boxed['params'])


def test_wrong_layer_patterns():
  check_pattern(22, 128, 3, True)
  check_pattern(12, None, 1, False)
  with pytest.raises(
    ValueError, match=r'layers=12 must be 1 \+ a multiple of global_every=3; try 10 or 13'
  ):
    check_pattern(12, 128, 3, True)
  with pytest.raises(ValueError, match='layers=2 must be a multiple of global_every=3; try 3 or 3'):
    check_pattern(2, 128, 3, False)
  with pytest.raises(ValueError, match='window=None with global_every=3'):
    check_pattern(12, None, 3, False)


@pytest.mark.parametrize('first_bare', [True, False])
@pytest.mark.parametrize('every', [1, 3])
def test_each_layer_has_its_number_once(first_bare, every):
  layers = 6 + first_bare
  window = None if every == 1 else 2
  stack = Stack(options(layers=layers), window, every, first_bare)
  found, shapes = described(stack)
  shapes = tree.flatten(shapes)
  numbers = {}
  for path, info in found.items():
    kind = path.split('/', 2)[-1] if path.startswith('layers') else path.removeprefix('first/')
    depths = info.depths(shapes[path].shape)
    numbers.setdefault(kind, []).extend(np.ravel(depths).tolist())
  bare = [path for path in numbers if path.startswith('attention_norm')]
  assert len(bare) == 2
  for kind, depths in numbers.items():
    assert sorted(depths) == list(range(layers))[first_bare * (kind in bare) :], kind
  if every == 3:  # by brute force: layer g P + j of the pattern
    kernel = 'attention/query/kernel'
    for block in range(3):
      depths = found[f'layers/block_{block}/{kernel}'].depths((2, 12, 2, 6))
      assert depths.tolist() == [first_bare + block, first_bare + block + 3]


class Unstacked(nn.Module):
  """The same layers one by one, as a loop in Python: what `Stack` must equal."""

  stack: Stack

  @nn.compact
  def __call__(self, x, context):
    for i, window in enumerate(self.stack.layer_windows()):
      norm = not (i == 0 and self.stack.first_bare)
      x, _ = Block(self.stack.options, window, norm, name=f'layer_{i}')(x, context)
    return x


@pytest.mark.slow
def test_stack_equals_a_loop_whatever_unroll_and_remat(random_params):
  stack = Stack(options(layers=5, norm_order='pre'), **PATTERN)
  x, context = normal(1, 6, 12), LayerContext(segments_BT=jnp.array([[1, 1, 1, 1, 2, 0]]))
  params = random_params(stack, x, context)
  assert stack.layer_windows() == [None, 2, None, 2, None]
  stacked = params['params']['layers']
  loop = {'layer_0': params['params']['first']}
  for i in range(1, 5):
    block = stacked[f'block_{(i - 1) % 2}']
    loop[f'layer_{i}'] = jax.tree.map(lambda p, i=i: p[(i - 1) // 2], block)
  expected = Unstacked(stack).apply({'params': loop}, x, context)

  def gradient(**changes):
    def loss(p):
      y, _ = stack.clone(**changes).apply(p, x, context)
      return jnp.sum(y**2), y

    return jax.jit(jax.grad(loss, has_aux=True))

  plain, remat, unrolled = gradient(), gradient(remat='full'), gradient(remat='dots', unroll=0)
  grads, y = plain(params)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  others = gradient(remat='narrow'), gradient(remat='attention'), gradient(remat='auto')
  for other in (remat, unrolled, *others):
    other_grads, other_y = other(params)
    np.testing.assert_allclose(other_y, y, atol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, other_grads
    )
  programs = plain, remat, unrolled, gradient(unroll=0), gradient(remat='dots')
  texts = [program.lower(params).as_text() for program in programs]
  assert len(set(texts)) == 5
  assert ['stablehlo.while' in text for text in texts] == [True, True, False, False, True]
  barriers = [text.count('optimization_barrier') > 1 for text in texts]
  assert barriers == [False, False, True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('changes', 'pattern'),
  [
    ({}, {}),
    (dict(norm_order='pre', causal=True, kv_heads=1), {}),
    (dict(norm_order='pre', layers=5), PATTERN),
  ],
)
def test_the_last_layer_runs_only_at_the_positions_that_are_read(random_params, changes, pattern):
  stack = Stack(options(**changes), **pattern)
  x, segments = normal(2, 6, 12), jnp.array([[1, 1, 1, 1, 2, 0], [1, 1, 2, 2, 2, 2]])
  positions = jnp.tile(jnp.arange(6), (2, 1))
  frequencies = rotary.frequencies(stack.options.head_dim, 100.0)
  rotation = rotary.rotation(positions, frequencies, jnp.float32)
  context = LayerContext(segments, positions, rotations=(rotation, rotation))
  params = random_params(stack, x, context)
  read = jnp.array([[3, 0, 3], [5, 2, 1]])  # in any order, one of them twice

  def gradient(read, unroll):
    def loss(p, asked):
      y, _ = stack.clone(unroll=unroll).apply(p, x, context.replace(read_BP=read))
      y = y if read is not None else at(y, asked)
      return jnp.sum(y**2), y

    return jax.jit(jax.grad(loss, has_aux=True))

  grads, y = gradient(None, 0)(params, read)
  mlp = f'tensor<2x3x{stack.options.mlp_dim}xf32>'  # three positions of each row, not six
  for unroll in (1, 0):
    run = gradient(read, unroll)
    found_grads, found = run(params, read)
    np.testing.assert_allclose(found, y, atol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found_grads, grads
    )
    assert (mlp in run.lower(params, read).as_text()) == (unroll == 0)
  assert np.abs(gradient(read[:, ::-1], 0)(params, read)[1] - y).max() > 0.1


@pytest.mark.parametrize('unroll', [1, 0])
def test_dropout_acts_in_training_only(random_params, unroll):
  x = jnp.ones((1, 4, 12))
  stack = Stack(options(dropout=0.5, attention_dropout=0.5), unroll=unroll)
  params = random_params(stack, x, NOTHING)

  def run(module, context):
    return jax.jit(lambda key: module.apply(params, x, context, rngs={'dropout': key})[0])

  keys, plain = jax.random.split(jax.random.key(0)), Stack(BASE, unroll=unroll)
  quiet = run(stack, NOTHING)(keys[0])
  np.testing.assert_array_equal(quiet, run(plain, TRAIN)(keys[0]))
  np.testing.assert_array_equal(quiet, jax.jit(lambda: plain.apply(params, x, TRAIN)[0])())
  train = run(stack, TRAIN)
  np.testing.assert_array_equal(train(keys[0]), train(keys[0]))
  assert np.abs(train(keys[0]) - train(keys[1])).max() > 0.1
  assert np.abs(train(keys[0]) - quiet).max() > 0.1


@pytest.mark.parametrize('unroll', [1, 0])
def test_dropout_differs_by_layer(random_params, unroll):
  x = jnp.ones((1, 4, 12))
  stack = Stack(options(layers=2, dropout=0.5, norm_order='pre'), unroll=unroll)
  params = jax.tree.map(jnp.zeros_like, random_params(stack, x, NOTHING))
  # Each layer adds ones, halved in number and doubled.
  params['params']['layers']['block']['mlp']['down']['bias'] += 1.0
  added = stack.apply(params, x, TRAIN, rngs={'dropout': jax.random.key(3)})[0] - x
  assert set(np.unique(added)) == {0.0, 2.0, 4.0}  # with equal masks no sum would be 2


@pytest.mark.slow
def test_unstacked_layers_are_the_stack(random_params):
  stack = Stack(options(layers=4, norm_order='pre', head_dim=5), window=3, global_every=2)
  x = normal(2, 6, 12)
  params = random_params(stack, x, NOTHING)['params']
  groups = unstacked(params)
  assert sorted(groups) == ['group_0', 'group_1']

  def run(params):
    return stack.apply({'params': params}, x, NOTHING)[0]

  expected = run(params)
  np.testing.assert_allclose(run(groups), expected, atol=1e-5)
  assert np.abs(run(groups | {'group_0': groups['group_1']}) - expected).max() > 1e-2


@pytest.mark.parametrize('remat', ['none', 'dots'])
def test_transposed_kernels_are_the_kernels_in_every_form(random_params, remat):
  stack = Stack(options(layers=5, norm_order='pre', head_dim=5), **PATTERN, remat=remat)
  x = normal(2, 6, 12)
  params = random_params(stack, x, NOTHING)['params']
  infos, _ = described(stack)
  forms = products.transposed(params, infos)
  out = unstacked(forms)['group_0']['block_0']['attention']['out']
  assert out.keys() == {'kernel', 'bias'} and out['kernel'].weight_OI.shape == (12, 10)

  def run(params, unroll=1):
    return stack.clone(unroll=unroll).apply({'params': params}, x, NOTHING)[0]

  expected = run(params)
  for found in (run(forms), run(forms, unroll=0), run(unstacked(forms))):
    np.testing.assert_allclose(found, expected, atol=1e-5)


# What stands around the layers: interceptors, and variables that are not parameters.

FORMS = dict(scanned=dict(unroll=1), unrolled=dict(unroll=0))
REMATS = ['none', 'dots']


def patterned(**changes):
  return Stack(options(layers=5, norm_order='pre'), **PATTERN, **changes)


def run(stack, variables, x, intercept, **kwargs):
  with nn.intercept_methods(intercept):
    return jax.jit(lambda v: stack.apply(v, x, NOTHING, **kwargs))(variables)


def seen(stack, variables, x):
  paths = set()

  def note(next_fun, args, kwargs, context):
    paths.add('/'.join(context.module.path))
    return next_fun(*args, **kwargs)

  run(stack, variables, x, note)
  return paths


@pytest.mark.slow
@pytest.mark.parametrize('remat', REMATS)
def test_an_interceptor_sees_the_same_paths_in_every_form(random_params, remat):
  x = normal(1, 4, 12)
  params = random_params(patterned(), x, NOTHING)['params']
  scanned = seen(patterned(remat=remat), {'params': params}, x)
  assert {'first/attention/query', 'layers/block_1/mlp/down', 'layers'} < scanned
  assert seen(patterned(remat=remat, unroll=0), {'params': params}, x) == scanned
  assert seen(patterned(remat=remat), {'params': unstacked(params)}, x) == scanned


def sow(next_fun, args, kwargs, context):
  y = next_fun(*args, **kwargs)
  if isinstance(context.module, Block) and context.method_name == '__call__':
    context.module.sow('intermediates', 'mean', jnp.mean(y[0]))
  return y


@pytest.mark.slow
@pytest.mark.parametrize('remat', REMATS)
def test_what_a_block_sows_comes_out_stacked_in_every_form(random_params, remat):
  x = normal(1, 4, 12)
  params = random_params(patterned(), x, NOTHING)['params']
  found = []
  for stacked, changes in ((True, dict(unroll=1)), (True, dict(unroll=0)), (False, {})):
    given = {'params': params if stacked else unstacked(params)}
    stack = patterned(remat=remat, **changes)
    _, variables = run(stack, given, x, sow, mutable=['intermediates'])
    found.append(tree.flatten(variables['intermediates']))
  assert all(path.endswith('mean/0') for path in found[0])
  shapes = {path.split('/mean')[0]: value.shape for path, value in found[0].items()}
  assert shapes == {'first': (), 'layers/block_0': (2,), 'layers/block_1': (2,)}
  for other in found[1:]:
    assert other.keys() == found[0].keys()
    for path, value in other.items():
      np.testing.assert_allclose(value, found[0][path], atol=1e-6)


def scale(next_fun, args, kwargs, context):
  """Multiplies the output of the mlp's first projection by a parameter of its own."""
  y = next_fun(*args, **kwargs)
  module = context.module
  if isinstance(module, Linear) and module.name == 'up' and context.method_name == '__call__':
    init = params_lib.boxed(functools.partial(jax.random.normal, dtype=jnp.float32), ('mlp',))
    y *= module.param('gain', init, y.shape[-1:])[None, None]
  return y


@pytest.mark.slow
@pytest.mark.parametrize('remat', REMATS)
def test_an_interceptor_creates_parameters_in_every_form(random_params, remat):
  x = normal(1, 4, 12)
  base = random_params(patterned(), x, NOTHING)['params']
  created = []
  for changes in FORMS.values():
    stack = patterned(remat=remat, **changes)
    rngs = {'params': jax.random.key(5)}
    _, made = run(stack, {'params': base}, x, scale, mutable=['params'], rngs=rngs)
    infos = params_lib.infos(made['params'])
    params = nn.unbox(made['params'])
    flat = tree.flatten(params)
    new = {path: flat[path] for path in flat.keys() - tree.flatten(base).keys()}
    assert {path: value.shape for path, value in new.items()} == {
      'first/mlp/up/gain': (8,),
      'layers/block_0/mlp/up/gain': (2, 8),
      'layers/block_1/mlp/up/gain': (2, 8),
    }
    gain = infos['layers/block_1/mlp/up/gain']
    assert gain.names == ('layers', 'mlp') and gain.depths((2, 8)).tolist() == [2, 4]
    assert np.abs(np.diff(new['layers/block_0/mlp/up/gain'], axis=0)).min() > 0  # not one for all
    created.append((params, new))
  (params, new), (_, again) = created
  jax.tree.map(np.testing.assert_array_equal, new, again)
  outputs = [
    run(patterned(remat=remat, **changes), {'params': form(params)}, x, scale)[0]
    for form, changes in ((dict, dict(unroll=1)), (dict, dict(unroll=0)), (unstacked, {}))
  ]
  plain = patterned().apply({'params': base}, x, NOTHING)[0]
  assert np.abs(outputs[0] - plain).max() > 0.1
  for other in outputs[1:]:
    np.testing.assert_allclose(other, outputs[0], atol=1e-5)
