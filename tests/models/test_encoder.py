"""Encoders: published parameter counts, documents that never touch, number types, clear errors."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.core import plugins, tree
from llm_jax.models import encoder
from llm_jax.nn import heads

TINY = dict(
  dim=16, heads=2, mlp_dim=24, vocab_size=40, max_len=16, dropout=0.0, attention_dropout=0.0
)
BERT = encoder.Model(**TINY, layers=2)
MODERN = encoder.Model(
  **encoder.VARIANTS['modernbert_base'] | TINY | dict(layers=3, window=4, global_every=2)
)


class MLMNetwork(nn.Module):
  """A model and its masked-LM head: tokens to logits."""

  model: nn.Module
  head: nn.Module

  def __call__(self, tokens_BT, **batch):
    x_BTD, bias_V = self.head(self.model({'tokens': tokens_BT, **batch}).hidden)
    logits_BTV = self.model.logits(x_BTD)
    return logits_BTV + bias_V[None, None].astype(logits_BTV.dtype)


def mlm(model) -> MLMNetwork:
  return MLMNetwork(model, heads.MLMHead(model.options, model.vocab_size))


def shapes(module, *args):
  return jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), *args)))['params']


def count(module, *args) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(module, *args)))


def random_params(module, *args):
  rng = np.random.default_rng(0)
  return {
    'params': jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), shapes(module, *args)
    )
  }


@pytest.mark.parametrize(
  'variant, vocab_size, with_pooler, with_mlm',
  [
    ('bert_base', 30522, 109_482_240, 109_514_298),
    ('bert_large', 30522, 335_141_888, None),
    ('roberta_base', 50265, 124_645_632, None),
    ('modernbert_base', 50368, None, 149_655_232),
  ],
)
def test_parameter_counts_of_the_reference(variant, vocab_size, with_pooler, with_mlm):
  model = encoder.Model(vocab_size=vocab_size, **encoder.VARIANTS[variant])
  tokens, hidden = jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4, model.dim))
  batch = {'tokens': tokens}
  if with_pooler:
    assert count(model, batch) + count(heads.Pooler(model.options), hidden) == with_pooler
  if with_mlm:
    assert count(mlm(model), tokens) == with_mlm
  if variant == 'bert_base':
    extra = count(heads.Pooler(model.options), hidden) + count(
      heads.PairHead(model.options), hidden[:, 0]
    )
    assert count(mlm(model), tokens) + extra == 110_106_428
  if variant == 'modernbert_base':
    assert count(model, batch) == 149_014_272


def boxed_params(model):
  def logits(model, batch):
    return model.logits(model(batch).hidden)

  batch = {'tokens': jnp.ones((1, 4), jnp.int32)}
  return jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method=logits))['params']


def test_every_parameter_names_its_axes_and_kind():
  for model in (BERT, MODERN, MODERN.clone(tied=False)):
    boxed = boxed_params(model)
    leaves = jax.tree_util.tree_leaves_with_path(
      boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    for path, leaf in leaves:
      names = [key.key for key in path]
      assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == len(leaf.value.shape)
      assert all(leaf.names) and len(set(leaf.names)) == len(leaf.names)
      assert (leaf.names[0] == 'layers') == ('layers' in names)
      assert names[-1] in ('kernel', 'embedding', 'bias', 'scale')


def test_parameters_say_their_layer_and_whether_they_are_decayed():
  model = MODERN.clone(layers=7, global_every=3, tied=False, norm_bias=True, bias=True)
  boxed = boxed_params(model)
  shapes = tree.flatten(nn.unbox(boxed))
  numbers = []
  for path, info in params_lib.infos(boxed).items():
    assert info.decayed == path.endswith(('kernel', 'embedding')), path
    assert bool(info.inputs) == path.endswith(('kernel', 'token/embedding')), path
    if path.startswith('embedder'):
      assert info.layer == params_lib.EMBEDDINGS
    elif path.startswith(('final_norm', 'output')):
      assert info.layer is None
    elif path.endswith('mlp_norm/scale'):
      numbers += np.ravel(info.depths(shapes[path].shape)).tolist()
  assert sorted(numbers) == list(range(7))


@pytest.mark.parametrize('model', [BERT, MODERN], ids=['bert', 'modernbert'])
def test_a_document_never_moves_another(model):
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 40, (1, 12))
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0]])
  positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0]])
  network = mlm(model)
  params = random_params(network, tokens)
  run = jax.jit(lambda t, s, p: network.apply(params, t, segments=s, positions=p))
  before = np.asarray(run(tokens, segments, positions))
  changed = np.where(segments == 2, tokens, rng.integers(1, 40, (1, 12)))
  after = np.asarray(run(changed, segments, positions))
  assert np.abs(after - before)[segments == 1].max() > 1e-3
  np.testing.assert_array_equal(after[segments == 2], before[segments == 2])
  joined = np.asarray(
    run(changed, np.ones_like(segments), positions)
  )  # the same rows as one document do mix
  assert np.abs(joined - before)[segments == 2].max() > 1e-3
  alone = np.zeros_like(tokens)
  alone[:, :6] = tokens[:, 4:10]
  alone = run(alone, np.int64(alone > 0), np.array([[0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0]]))
  np.testing.assert_allclose(np.asarray(alone)[:, :6], before[:, 4:10], atol=2e-5)


@pytest.mark.slow
def test_float64_and_bfloat16():
  tokens = np.random.default_rng(0).integers(1, 40, (2, 8))
  network = mlm(MODERN)
  params = random_params(network, tokens)
  single = network.apply(params, tokens)
  assert single.dtype == jnp.float32
  half = mlm(MODERN.clone(dtype='bfloat16')).apply(params, tokens)
  assert half.dtype == jnp.float32
  scale = np.abs(single).max()
  assert 0 < np.abs(half - single).max() < 0.06 * scale
  with jax.enable_x64(True):
    double = mlm(MODERN.clone(dtype='float64', param_dtype='float64'))
    assert {x.dtype for x in jax.tree.leaves(shapes(double, tokens))} == {jnp.dtype('float64')}
    wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
    with jax.numpy_rank_promotion('raise'):
      run = jax.jit(lambda p, t: double.apply(p, t))
      exact, text = run(wide, tokens), run.lower(wide, tokens).as_text()
  assert exact.dtype == jnp.float64 and 'f32' not in text
  assert 1e-9 < np.abs(np.asarray(exact) - np.asarray(single)).max() < 1e-4 * scale


def test_loss_at_the_start_is_that_of_a_uniform_guess():
  model = encoder.Model(
    **encoder.VARIANTS['bert_tiny'] | dict(vocab_size=2000, layers=1, max_len=64)
  )
  tokens = np.random.default_rng(0).integers(0, 2000, (2, 64))
  network = mlm(model)
  logits = jax.jit(lambda key: network.apply(nn.unbox(network.init(key, tokens)), tokens))(
    jax.random.key(0)
  )
  targets = np.random.default_rng(1).integers(0, 2000, (2, 64, 1))
  loss = -np.mean(np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets, axis=-1))
  assert loss == pytest.approx(math.log(2000), rel=0.03)


@pytest.mark.parametrize(
  'section, message',
  [
    (dict(heads=5), 'heads=5 must divide dim=768'),
    (dict(layers=6, window=64, global_every=4), 'layers=6 must be a multiple of global_every=4'),
    (dict(window=64), 'window=64 with global_every=1'),
    (dict(remat='dot'), "remat='dot' is not known .did you mean 'dots'"),
    (dict(positions='rotary'), "positions='rotary' is not known"),
    (dict(positions='rope', dim=36, heads=12), 'head_dim=3 must be even'),
    (dict(unroll=-1), 'unroll=-1'),
    (dict(position_offset=-1), 'position_offset=-1'),
    (dict(droput=0.1), "droput is not an option .did you mean 'dropout'"),
  ],
)
def test_a_wrong_section_is_refused_before_any_array(section, message):
  with pytest.raises(ValueError, match=message):
    plugins.construct('model', encoder.Model, section, vocab_size=100)


def test_a_row_that_is_too_long():
  with pytest.raises(ValueError, match='rows of 17 tokens are longer than max_len=16'):
    shapes(BERT, {'tokens': jnp.ones((1, 17), jnp.int32)})


# The figures of `model_flops` at revision 6ec0a05, which went by the kernels' paths and shapes.
@pytest.mark.parametrize(
  'variant, vocab_size, length, read, flops',
  [
    ('bert_base', 30522, 512, 512, 96_636_764_160),
    ('bert_base', 30522, 512, 80, 90_861_207_552),
    ('modernbert_base', 50368, 1024, 1024, 296_755_396_608),
    ('modernbert_base', 50368, 1024, 300, 288_926_466_048),
  ],
)
def test_flops_are_those_of_the_kernels(variant, vocab_size, length, read, flops):
  model = encoder.Model(vocab_size=vocab_size, unroll=0, **encoder.VARIANTS[variant])
  assert model.flops(length, read) == flops
  assert model.clone(unroll=1).flops(length, read) == model.flops(length, length)


def test_a_layer_that_stands_by_itself_runs_whole():
  alone = MODERN.clone(layers=1, unroll=0)
  assert alone.first_bare and alone.flops(8, 2) == alone.flops(8, 8)


@pytest.mark.slow
@pytest.mark.parametrize('unroll', [1, 0])
def test_what_the_batch_lacks_means_one_document(unroll):
  model = BERT.clone(unroll=unroll)
  tokens = np.random.default_rng(0).integers(1, 40, (2, 6)).astype(np.int32)
  rows = dict(
    tokens=tokens,
    segments=np.ones_like(tokens),
    positions=np.tile(np.arange(6, dtype=np.int32), (2, 1)),
    token_types=np.zeros_like(tokens),
  )
  params = random_params(model, rows)
  whole = model.apply(params, rows)
  assert whole.cache is None and whole.aux_losses == {}
  found = model.apply(params, {'tokens': tokens}, jnp.array([[5, 0], [1, 1]]))
  np.testing.assert_allclose(found.hidden, whole.hidden[[[0], [1]], [[5, 0], [1, 1]]], atol=1e-5)
  other = model.apply(params, rows | {'token_types': np.ones_like(tokens)})
  assert np.abs(other.hidden - whole.hidden).max() > 0.01
  assert set(model.inputs) == set(rows)


def test_an_encoder_keeps_no_cache():
  with pytest.raises(ValueError, match='keeps no cache'):
    BERT.apply({'params': {}}, {'tokens': jnp.ones((1, 4), jnp.int32)}, cache=())
  with pytest.raises(ValueError, match='Model keeps no cache'):
    BERT.empty_cache(1, 8)
