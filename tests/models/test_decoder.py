"""Decoders: published parameter counts, causality and isolation to the last bit, number types, and
clear errors.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import plugins
from llm_jax.models import decoder

TINY = dict(
  dim=16,
  heads=4,
  mlp_dim=24,
  vocab_size=40,
  max_len=16,
  layers=2,
  dropout=0.0,
  attention_dropout=0.0,
)
GPT = decoder.Model(**TINY)
LLAMA = decoder.Model(**decoder.VARIANTS['llama_2_7b'] | TINY | dict(kv_heads=2))


def predict(model, tokens_BT, **batch):
  return model.logits(model({'tokens': tokens_BT, **batch}).hidden)


def shapes(model):
  return jax.eval_shape(
    lambda: nn.unbox(model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32), method=predict))
  )


def random_params(model):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), shapes(model))


@pytest.mark.parametrize(
  'variant, vocab_size, parameters',
  [
    ('gpt2_small', 50257, 124_439_808),
    ('gpt2_medium', 50257, 354_823_168),
    ('gpt2_large', 50257, 774_030_080),
    ('gpt2_xl', 50257, 1_557_611_200),
    ('llama_2_7b', 32000, 6_738_415_616),
    ('llama_3_2_1b', 128256, 1_235_814_400),
  ],
)
def test_parameter_counts_of_the_reference(variant, vocab_size, parameters):
  model = decoder.Model(vocab_size=vocab_size, **decoder.VARIANTS[variant])
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(model))) == parameters


@pytest.mark.parametrize('model', [GPT, LLAMA], ids=['gpt', 'llama'])
def test_no_gradient_from_later_tokens(model):
  tokens = np.random.default_rng(0).integers(1, 40, (1, 8))
  params = random_params(model)

  def logits(offset_TD):  # of each position, as the embeddings of all positions are moved
    def move(next_fun, args, kwargs, context):
      x = next_fun(*args, **kwargs)
      return (
        x + offset_TD[None]
        if context.module.name == 'embedder' and context.method_name == '__call__'
        else x
      )

    with nn.intercept_methods(move):
      return jnp.sum(jnp.square(model.apply(params, tokens, method=predict)), axis=(0, 2))

  influence = np.abs(np.asarray(jax.jit(jax.jacrev(logits))(jnp.zeros((8, 16))))).max(axis=-1)
  assert np.all(influence[np.triu_indices(8, 1)] == 0.0)
  assert np.all(influence[np.tril_indices(8)] > 0.0)


@pytest.mark.parametrize('model', [GPT, LLAMA], ids=['gpt', 'llama'])
def test_a_document_never_moves_another(model):
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 40, (1, 12))
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0]])
  positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0]])
  params = random_params(model)
  run = jax.jit(lambda t, s, p: model.apply(params, t, segments=s, positions=p, method=predict))
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
  params = random_params(LLAMA)
  single = LLAMA.apply(params, tokens, method=predict)
  half = LLAMA.clone(dtype='bfloat16').apply(params, tokens, method=predict)
  assert single.dtype == half.dtype == jnp.float32
  scale = np.abs(single).max()
  assert 0 < np.abs(half - single).max() < 0.06 * scale
  with jax.enable_x64(True):
    double = LLAMA.clone(dtype='float64', param_dtype='float64')
    wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
    with jax.numpy_rank_promotion('raise'):
      run = jax.jit(lambda p, t: double.apply(p, t, method=predict))
      exact, text = run(wide, tokens), run.lower(wide, tokens).as_text()
  assert exact.dtype == jnp.float64 and 'f32' not in text
  assert 1e-9 < np.abs(np.asarray(exact) - np.asarray(single)).max() < 1e-4 * scale


@pytest.mark.parametrize('variant', ['gpt_tiny', 'llama_tiny'])
def test_loss_at_the_start_is_that_of_a_uniform_guess(variant):
  model = decoder.Model(**decoder.VARIANTS[variant] | dict(vocab_size=2000, max_len=64))
  rng = np.random.default_rng(0)
  tokens, targets = rng.integers(0, 2000, (2, 64)), rng.integers(0, 2000, (2, 64, 1))
  run = jax.jit(
    lambda key: model.apply(
      nn.unbox(model.init(key, tokens, method=predict)), tokens, method=predict
    )
  )
  loss = -np.mean(
    np.take_along_axis(np.asarray(jax.nn.log_softmax(run(jax.random.key(0)))), targets, axis=-1)
  )
  assert loss == pytest.approx(math.log(2000), rel=0.03)


def test_initial_positions_are_smaller_in_gpt2():
  model = decoder.Model(**TINY | dict(max_len=512))
  init = jax.jit(lambda key: nn.unbox(model.init(key, {'tokens': jnp.ones((1, 4), jnp.int32)})))
  tables = init(jax.random.key(0))['params']['embedder']
  assert np.std(tables['position']['embedding']) == pytest.approx(0.01, rel=0.05)
  assert np.std(tables['token']['embedding']) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
  'section, message',
  [
    (dict(kv_heads=5), 'kv_heads=5 must divide heads=12'),
    (dict(positions='rope', rope_scaling=[8.0, 1.0]), 'rope_scaling='),
    (dict(rope_scaling=[8.0, 1.0, 4.0, 64.0]), "rope_scaling needs positions='rope'"),
    (dict(vocab_size=0), 'vocab_size=0 must be at least 1'),
    (dict(token_types=2), 'token_types is not an option'),
  ],
)
def test_a_wrong_section_is_refused_before_any_array(section, message):
  with pytest.raises(ValueError, match=message):
    plugins.construct('model', decoder.Model, dict(vocab_size=100) | section)


def test_a_row_that_is_too_long():
  with pytest.raises(ValueError, match='rows of 17 tokens are longer than max_len=16'):
    jax.eval_shape(lambda: GPT.init(jax.random.key(0), {'tokens': jnp.ones((1, 17), jnp.int32)}))


# The figures of `model_flops` at revision 6ec0a05, which went by the kernels' paths and shapes.
@pytest.mark.parametrize(
  'variant, vocab_size, length, read, flops',
  [
    ('gpt2_small', 50257, 1024, 1024, 193_273_528_320),
    ('gpt2_small', 50257, 1024, 1, 179_596_689_408),
    ('llama_tiny', 1000, 128, 128, 202_375_168),
    ('llama_tiny', 1000, 128, 7, 158_513_152),
  ],
)
def test_flops_are_those_of_the_kernels(variant, vocab_size, length, read, flops):
  model = decoder.Model(vocab_size=vocab_size, unroll=0, **decoder.VARIANTS[variant])
  assert model.flops(length, read) == flops
  assert model.clone(unroll=1).flops(length, read) == model.flops(length, length)


@pytest.mark.slow
def test_a_cache_sees_what_the_whole_row_sees():
  tokens = np.random.default_rng(0).integers(1, 40, (2, 6)).astype(np.int32)
  params = random_params(LLAMA)
  whole = LLAMA.apply(params, {'tokens': tokens})
  assert whole.cache is None
  cache = jax.tree.map(np.asarray, LLAMA.empty_cache(2, 8))
  first = LLAMA.apply(params, {'tokens': tokens[:, :4]}, cache=cache)
  np.testing.assert_allclose(first.hidden, whole.hidden[:, :4], atol=1e-5)
  cache = first.cache
  for step in (4, 5):
    outputs = LLAMA.apply(params, {'tokens': tokens[:, step : step + 1]}, cache=cache)
    np.testing.assert_allclose(outputs.hidden[:, 0], whole.hidden[:, step], atol=1e-5)
    cache = outputs.cache
  assert cache.lengths_B.tolist() == [6, 6]
