"""Layers against NumPy in float64; options that are wrong; what scan, unroll and remat may not
change.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import encoder
from llm_jax.nn import layers as L

BASE = encoder.Model(
  vocab_size=11, dim=12, layers=2, heads=2, mlp_dim=8, dropout=0.0, attention_dropout=0.0
).options


def options(**changes) -> L.Options:
  return dataclasses.replace(BASE, **{'head_dim': None} | changes)


def random_params(module, *args, seed=0, **kwargs):
  """Parameters of the right shapes from NumPy: nothing is compiled to make them."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), *args, **kwargs)))
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)


@pytest.fixture(autouse=True)
def said_broadcasting():
  with jax.numpy_rank_promotion('raise'):
    yield


def test_linear_is_its_einsum():
  x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  module = L.Linear('...D,DNH->...NH', (4, 2, 5), BASE, bias=True)
  params = random_params(module, x)
  kernel, bias = (np.asarray(params['params'][name], np.float64) for name in ('kernel', 'bias'))
  expected = (x.reshape(6, 4) @ kernel.reshape(4, 10)).reshape(2, 3, 2, 5) + bias
  np.testing.assert_allclose(module.apply(params, x), expected, atol=1e-6)
  boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), x))['params']
  assert boxed['kernel'].names == ('embed', 'heads', 'head_dim') and boxed['bias'].names == (
    'heads',
    'head_dim',
  )


def test_wide_linear_of_bfloat16_gives_float32():
  module = L.Linear('...D,DV->...V', (4, 9), options(dtype='bfloat16'), bias=True, wide=True)
  x = jnp.ones((2, 4), jnp.bfloat16)
  params = random_params(module, x)
  assert module.apply(params, x).dtype == jnp.float32
  assert params['params']['kernel'].dtype == jnp.float32
  assert (
    jax.grad(lambda p: module.apply(p, x).sum())(params)['params']['kernel'].dtype == jnp.float32
  )


@pytest.mark.parametrize(
  'kind, bias', [('layernorm', True), ('layernorm', False), ('rmsnorm', False)]
)
def test_norm(kind, bias):
  x = 3 + 2 * np.random.default_rng(0).normal(size=(2, 5, 12))
  module = L.Norm(options(norm=kind, norm_bias=bias, norm_eps=0.1))
  params = random_params(module, x)
  centred = x - x.mean(-1, keepdims=True) if kind == 'layernorm' else x
  expected = (
    centred
    / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1)
    * np.asarray(params['params']['scale'])
  )
  if bias:
    expected += np.asarray(params['params']['bias'])
  np.testing.assert_allclose(module.apply(params, x.astype(np.float32)), expected, atol=2e-6)
  assert set(params['params']) == ({'scale', 'bias'} if bias else {'scale'})


def test_norm_of_bfloat16_is_computed_in_float32():
  x = jnp.asarray(1000 + np.random.default_rng(0).normal(size=(1, 12)) * 8, jnp.bfloat16)
  module = L.Norm(options(dtype='bfloat16'))
  params = {'params': {'scale': jnp.ones(12), 'bias': jnp.zeros(12)}}
  exact = np.asarray(x, np.float64)
  expected = (exact - exact.mean()) / exact.std()
  out = module.apply(params, x)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.01)


def test_embedder_sums_its_tables():
  tokens, positions = np.array([[3, 5, 0]]), np.array([[0, 1, 0]])
  module = L.Embedder(11, BASE, positions=6, position_offset=2, token_types=2)
  params = random_params(module, tokens, positions, None, False)
  token, position, kind = (
    np.asarray(params['params'][name]['embedding']) for name in ('token', 'position', 'token_type')
  )
  np.testing.assert_allclose(
    module.apply(params, tokens, positions, np.array([[0, 1, 1]]), False),
    token[tokens] + position[positions + 2] + kind[[[0, 1, 1]]],
    atol=1e-6,
  )
  np.testing.assert_allclose(
    module.apply(params, tokens, positions, None, False),
    token[tokens] + position[positions + 2] + kind[0],
    atol=1e-6,
  )
  one = L.Embedder(11, BASE, token_types=1)
  params = random_params(one, tokens, positions, None, False)
  np.testing.assert_array_equal(
    one.apply(params, tokens, positions, np.array([[0, 1, 1]]), False),
    one.apply(params, tokens, positions, None, False),
  )


def test_rope_knows_distances_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
  frequencies = L.rope_frequencies(8, 100.0)

  def turned(x, place):
    return L.rotate(x, L.rope(jnp.array([[place]]), frequencies, jnp.float32))

  def product(i, j):
    return float(jnp.sum(turned(q, i) * turned(k, j)))

  assert product(7, 3) == pytest.approx(product(24, 20), abs=1e-4)
  assert abs(product(7, 3) - product(7, 4)) > 1e-2
  np.testing.assert_array_equal(turned(q, 0), q)
  angle = 3 * 100.0 ** (-2 / 8)  # the second pair, at place 3
  a, b = float(q[0, 0, 0, 1]), float(q[0, 0, 0, 5])
  assert float(turned(q, 3)[0, 0, 0, 1]) == pytest.approx(
    a * math.cos(angle) - b * math.sin(angle), abs=1e-5
  )
  assert float(turned(q, 3)[0, 0, 0, 5]) == pytest.approx(
    b * math.cos(angle) + a * math.sin(angle), abs=1e-5
  )


def test_rope_scaling_of_llama_3():
  plain, scaled = (
    L.rope_frequencies(64, 500000.0),
    L.rope_frequencies(64, 500000.0, (32.0, 1.0, 4.0, 8192.0)),
  )
  for frequency, result in zip(plain, scaled, strict=True):
    wave = 2 * math.pi / frequency
    if wave < 8192 / 4:
      expected = frequency
    elif wave > 8192 / 1:
      expected = frequency / 32
    else:
      smooth = (8192 / wave - 1) / (4 - 1)
      expected = (1 - smooth) * frequency / 32 + smooth * frequency
    assert result == pytest.approx(expected, rel=1e-12)
  assert np.any((scaled != plain) & (scaled != plain / 32))
  with pytest.raises(ValueError, match='rope_scaling='):
    L.rope_frequencies(64, 500000.0, (32.0, 4.0, 1.0, 8192.0))


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(heads=5), 'heads=5 must divide dim=12; try heads=4, or give head_dim'),
    (dict(kv_heads=3), 'kv_heads=3 must divide heads=2; try kv_heads=2'),
    (dict(dim=0), 'dim=0 must be at least 1'),
    (dict(norm='layer_norm'), "norm='layer_norm' is not known .did you mean 'layernorm'"),
    (dict(norm='rmsnorm'), "norm_bias=True needs norm='layernorm'"),
    (dict(activation='gelu_new'), "activation='gelu_new' is not known"),
    (dict(dropout=1.0), 'dropout=1.0 must be at least 0 and below 1'),
    (dict(dtype='bf16'), "dtype='bf16' is not known .did you mean 'bfloat16'"),
    (dict(dtype='float64'), "dtype='float64' needs"),
    (dict(init_distribution='uniform'), "init_distribution='uniform' is not known"),
    (dict(attention='flash'), "attention='flash' is not known"),
  ],
)
def test_wrong_options(changes, message):
  with pytest.raises(ValueError, match=message):
    options(**changes)


def test_wrong_layer_patterns():
  L.check_pattern(22, 128, 3, True)
  L.check_pattern(12, None, 1, False)
  with pytest.raises(
    ValueError, match=r'layers=12 must be 1 \+ a multiple of global_every=3; try 10 or 13'
  ):
    L.check_pattern(12, 128, 3, True)
  with pytest.raises(ValueError, match='layers=2 must be a multiple of global_every=3; try 3 or 3'):
    L.check_pattern(2, 128, 3, False)
  with pytest.raises(ValueError, match='window=None with global_every=3'):
    L.check_pattern(12, None, 3, False)


class Unstacked(nn.Module):
  """The same layers one by one, as a loop in Python: what `Stack` must equal."""

  stack: L.Stack

  @nn.compact
  def __call__(self, x, segments):
    for i, window in enumerate(self.stack.layer_windows()):
      norm = not (i == 0 and self.stack.first_bare)
      x, _ = L.Block(self.stack.options, window, norm, name=f'layer_{i}')(x, segments, None, False)
    return x


def test_stack_equals_a_loop_whatever_unroll_and_remat():
  stack = L.Stack(options(layers=5, norm_order='pre'), window=2, global_every=2, first_bare=True)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 12)), jnp.float32)
  segments = jnp.array([[1, 1, 1, 1, 2, 0]])
  params = random_params(stack, x, segments, (None, None), False)
  assert stack.layer_windows() == [None, 2, None, 2, None]
  stacked = params['params']['layers']
  loop = {'layer_0': params['params']['first']}
  for i in range(1, 5):
    loop[f'layer_{i}'] = jax.tree.map(
      lambda p, i=i: p[(i - 1) // 2], stacked[f'block_{(i - 1) % 2}']
    )
  expected = Unstacked(stack).apply({'params': loop}, x, segments)

  def gradient(**changes):
    def loss(p):
      y = stack.clone(**changes).apply(p, x, segments, (None, None), False)
      return jnp.sum(y**2), y

    return jax.jit(jax.grad(loss, has_aux=True))

  plain, remat, unrolled = gradient(), gradient(remat='full'), gradient(remat='dots', unroll=0)
  grads, y = plain(params)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  for other in (
    remat,
    unrolled,
    gradient(remat='narrow'),
    gradient(remat='attention'),
    gradient(remat='auto'),
  ):
    other_grads, other_y = other(params)
    np.testing.assert_allclose(other_y, y, atol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, other_grads
    )
  texts = [
    f.lower(params).as_text()
    for f in (plain, remat, unrolled, gradient(unroll=0), gradient(remat='dots'))
  ]
  assert len(set(texts)) == 5
  assert ['stablehlo.while' in text for text in texts] == [True, True, False, False, True]
  assert [text.count('optimization_barrier') > 1 for text in texts] == [
    False,
    False,
    True,
    False,
    False,
  ]


@pytest.mark.parametrize(
  ('changes', 'pattern'),
  [
    ({}, {}),
    (dict(norm_order='pre', causal=True, kv_heads=1), {}),
    (dict(norm_order='pre', layers=5), dict(window=2, global_every=2, first_bare=True)),
  ],
)
def test_the_last_layer_runs_at_the_wanted_places_alone(changes, pattern):
  stack = L.Stack(options(**changes), **pattern)
  rng = np.random.default_rng(1)
  x, segments = (
    jnp.asarray(rng.normal(size=(2, 6, 12)), jnp.float32),
    jnp.array([[1, 1, 1, 1, 2, 0], [1, 1, 2, 2, 2, 2]]),
  )
  turn = L.rope(
    jnp.tile(jnp.arange(6), (2, 1)), L.rope_frequencies(stack.options.head_dim, 100.0), jnp.float32
  )
  params = random_params(stack, x, segments, (turn, turn), False)
  places = jnp.array([[3, 0, 3], [5, 2, 1]])  # in any order, one of them twice

  def gradient(places, unroll):
    def loss(p, asked):
      y = stack.clone(unroll=unroll).apply(p, x, segments, (turn, turn), False, places_BP=places)
      y = y if places is not None else L.at(y, asked)
      return jnp.sum(y**2), y

    return jax.jit(jax.grad(loss, has_aux=True))

  grads, y = gradient(None, 0)(params, places)
  mlp = f'tensor<2x3x{stack.options.mlp_dim}xf32>'  # three places of each row, not six
  for unroll in (1, 0):
    run = gradient(places, unroll)
    found_grads, found = run(params, places)
    np.testing.assert_allclose(found, y, atol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found_grads, grads
    )
    assert (mlp in run.lower(params, places).as_text()) == (unroll == 0)
  assert np.abs(gradient(places[:, ::-1], 0)(params, places)[1] - y).max() > 0.1


@pytest.mark.parametrize('unroll', [1, 0])
def test_dropout_acts_in_training_only(unroll):
  x = jnp.ones((1, 4, 12))
  stack = L.Stack(options(dropout=0.5, attention_dropout=0.5), unroll=unroll)
  params = random_params(stack, x, None, (None, None), False)

  def run(module, train):
    return jax.jit(
      lambda key: module.apply(params, x, None, (None, None), train, rngs={'dropout': key})
    )

  keys = jax.random.split(jax.random.key(0))
  quiet = run(stack, False)(keys[0])
  np.testing.assert_array_equal(quiet, run(L.Stack(BASE, unroll=unroll), True)(keys[0]))
  np.testing.assert_array_equal(
    quiet,
    jax.jit(lambda: L.Stack(BASE, unroll=unroll).apply(params, x, None, (None, None), True))(),
  )
  train = run(stack, True)
  np.testing.assert_array_equal(train(keys[0]), train(keys[0]))
  assert (
    np.abs(train(keys[0]) - train(keys[1])).max() > 0.1
    and np.abs(train(keys[0]) - quiet).max() > 0.1
  )


@pytest.mark.parametrize('unroll', [1, 0])
def test_dropout_differs_by_layer(unroll):
  x = jnp.ones((1, 4, 12))
  stack = L.Stack(options(layers=2, dropout=0.5, norm_order='pre'), unroll=unroll)
  params = jax.tree.map(jnp.zeros_like, random_params(stack, x, None, (None, None), False))
  params['params']['layers']['block']['mlp']['down']['bias'] += (
    1.0  # each layer adds ones, halved in number and doubled
  )
  added = stack.apply(params, x, None, (None, None), True, rngs={'dropout': jax.random.key(3)}) - x
  assert set(np.unique(added)) == {0.0, 2.0, 4.0}  # with equal masks no sum would be 2


def test_initialisation_is_the_papers():
  wide = options(dim=64, heads=4, mlp_dim=256, layers=8)
  x = jnp.ones((1, 2, 64))

  def init(o):
    return nn.unbox(jax.jit(lambda key: L.MLP(o).init(key, x))(jax.random.key(0)))['params']

  bert, gpt = (
    init(wide),
    init(dataclasses.replace(wide, init_distribution='normal', depth_scaled_init=True)),
  )
  kernel = np.asarray(bert['up']['kernel'])
  assert np.abs(kernel).max() <= 0.04 and kernel.std() == pytest.approx(0.02 * 0.8796, rel=0.02)
  assert np.abs(gpt['up']['kernel']).max() > 0.06 and np.std(gpt['up']['kernel']) == pytest.approx(
    0.02, rel=0.02
  )
  assert np.std(gpt['down']['kernel']) == pytest.approx(0.02 / 4, rel=0.02)  # sqrt(2 * 8 layers)
  assert np.std(bert['down']['kernel']) == pytest.approx(0.02 * 0.8796, rel=0.02)
  assert not np.any(bert['up']['bias'])


def test_linear_rope_scaling_stretches_all_waves():
  np.testing.assert_allclose(
    L.rope_frequencies(8, 100.0, (4.0,)), L.rope_frequencies(8, 100.0) / 4, rtol=1e-15
  )


def test_a_head_dimension_of_its_own_and_normalised_queries():
  attention = L.Attention(options(head_dim=10, qk_norm=True, qkv_bias=False, bias=True), None)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 12)), jnp.float32)
  params = random_params(attention, x, None, None, False)['params']
  assert params['query']['kernel'].shape == (12, 2, 10) and params['query_norm']['scale'].shape == (
    10,
  )
  assert 'bias' not in params['key'] and 'bias' in params['out']
  grown = params | {name: {'kernel': 7 * params[name]['kernel']} for name in ('query', 'key')}
  before, after = (
    attention.apply({'params': tree}, x, None, None, False)[0] for tree in (params, grown)
  )
  np.testing.assert_allclose(
    before, after, atol=1e-5
  )  # a normalised query does not tell how long it was


def test_layers_apart_and_flipped_are_the_stack():
  stack = L.Stack(options(layers=4, norm_order='pre', head_dim=5), window=3, global_every=2)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 12)), jnp.float32)
  params = random_params(stack, x, None, (None, None), False)['params']
  apart = L.apart(params)
  run = lambda params: stack.apply({'params': params}, x, None, (None, None), False)
  expected = run(params)
  assert sorted(apart) == ['group_0', 'group_1'] and L.flipped(apart)['group_0']['block_0'][
    'attention'
  ]['out'].keys() == {'flipped', 'bias'}
  np.testing.assert_allclose(run(apart), expected, atol=1e-5)
  np.testing.assert_allclose(run(L.flipped(apart)), expected, atol=1e-5)
  assert np.abs(run(apart | {'group_0': apart['group_1']}) - expected).max() > 1e-2
