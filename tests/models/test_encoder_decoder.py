"""Encoder-decoders: published parameter counts, what a target sees, documents that share rows, and
clear errors.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.models import encoder_decoder

TINY = dict(dim=16, heads=4, head_dim=4, mlp_dim=24, vocab_size=40, max_len=16, layers=2)
PLAIN = dict(dropout=0.0, attention_dropout=0.0)
RNG = np.random.default_rng(0)
BATCH = {
  'tokens': RNG.integers(1, 40, (1, 7)),
  'segments': np.array([[1, 1, 1, 2, 2, 2, 0]]),
  'positions': np.array([[0, 1, 2, 0, 1, 2, 0]]),
  'source_tokens': RNG.integers(1, 40, (1, 9)),
  'source_segments': np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]]),
  'source_positions': np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]]),
}


def made(variant, **changes):
  options = encoder_decoder.VARIANTS[variant] | TINY | PLAIN | changes
  return encoder_decoder.Model(**options)


def logits(model, batch):
  x = model.logits(model(batch).hidden)
  bias_V = model.table_bias()
  return x if bias_V is None else x + bias_V[None, None]


def boxed(model):
  batch = {name: jnp.ones((1, 4), jnp.int32) for name in ('tokens', 'source_tokens')}
  return jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method=logits)['params'])


def random_params(model):
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype)
  return {'params': jax.tree.map(draw, nn.unbox(boxed(model)))}


@pytest.mark.parametrize(
  'variant, vocab_size, parameters',
  [
    ('t5_small', 32128, 60_506_624),
    ('t5_base', 32128, 222_903_552),
    ('t5_large', 32128, 737_668_096),
    ('t5_1_1_small', 32128, 76_961_152),
    ('t5_1_1_base', 32128, 247_577_856),
    ('t5_1_1_large', 32128, 783_150_080),
    ('bart_base', 50265, 139_420_416 + 50_265),  # the bias is a buffer there
    ('bart_large', 50265, 406_291_456 + 50_265),
  ],
)
def test_parameter_counts_of_the_reference(variant, vocab_size, parameters):
  model = encoder_decoder.Model(vocab_size=vocab_size, **encoder_decoder.VARIANTS[variant])
  leaves = jax.tree.leaves(nn.unbox(boxed(model)))
  assert sum(math.prod(x.shape) for x in leaves) == parameters


@pytest.mark.parametrize('variant', ['transformer_tiny', 't5_1_1_small', 'bart_base'])
def test_a_target_sees_its_source_and_nothing_later(variant):
  """To the last bit: whatever else stands in either row."""
  model = made(variant)
  params, run = random_params(model), jax.jit(lambda p, b: model.apply(p, b, method=logits))
  whole = np.asarray(run(params, BATCH))

  def moved(name, index):
    other = BATCH | {name: BATCH[name].copy()}
    other[name][0, index] = other[name][0, index] % 39 + 1
    return np.abs(np.asarray(run(params, other)) - whole)[0].max(axis=-1) > 0

  of_first, of_second = [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]
  for index, seen in ((0, of_first), (3, of_first), (4, of_second), (6, of_second)):
    assert moved('source_tokens', index)[:6].tolist() == seen[:6]
  assert moved('source_tokens', 8)[:6].tolist() == [0] * 6
  assert moved('tokens', 1)[:6].tolist() == [0, 1, 1, 0, 0, 0]
  assert moved('tokens', 3)[:6].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['transformer_tiny', 't5_small', 'bart_base'])
def test_pairs_that_share_rows_are_as_if_alone(variant):
  model = made(variant, unroll=0)
  params = random_params(model)
  whole = model.apply(params, BATCH, method=logits)
  for number, (first, last), (start, stop) in ((1, (0, 3), (0, 4)), (2, (3, 6), (4, 7))):
    alone = {
      'tokens': BATCH['tokens'][:, first:last],
      'source_tokens': BATCH['source_tokens'][:, start:stop],
    }
    found = model.apply(params, alone, method=logits)
    np.testing.assert_allclose(found, whole[:, first:last], atol=2e-5, err_msg=str(number))


@pytest.mark.slow
def test_a_few_positions_are_those_of_the_whole_row():
  indices = np.array([[5, 0, 2]])
  for unroll in (0, 1):
    model = made('t5_small', unroll=unroll)
    params = random_params(model)
    whole, few = (model.apply(params, BATCH, p).hidden for p in (None, indices))
    np.testing.assert_allclose(few, whole[:, indices[0]], atol=1e-5)


def test_layers_of_the_decoder_come_after_those_of_the_encoder():
  infos = params_lib.infos(boxed(made('t5_small', encoder_layers=3)))
  depths = {
    side: set(infos[f'{side}/layers/block/mlp/up/kernel'].depths((layers, 16, 24)).tolist())
    for side, layers in (('encoder', 3), ('decoder', 2))
  }
  assert depths == {'encoder': {0, 1, 2}, 'decoder': {3, 4}}
  assert infos['decoder_bias/embedding'].layer == params_lib.EMBEDDINGS


def test_flops_are_those_of_both_rows():
  """2 FLOPs per weight and token, by the compiler's own count of a forward pass."""
  model = made('transformer_tiny', max_len=64, unroll=0, dim=64, head_dim=16, mlp_dim=256)
  S, T, D = 64, 32, 64
  encoder = S * 2 * (4 * D**2 + 2 * D * 256 + 2 * S * D)
  decoder = T * 2 * (6 * D**2 + 2 * D * 256 + T * D + 2 * S * D) + S * 2 * 2 * D**2
  assert model.flops(T, T, S) == 2 * (encoder + decoder)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(positions='rope'), "positions='rope' is not known.*learned, sinusoidal, relative"),
    (dict(encoder_layers=0), 'encoder_layers=0 must be at least 1'),
    (dict(position_offset=-1), 'position_offset=-1 must be at least 0'),
    (dict(window=3), 'window=3: an encoder-decoder has none'),
    (dict(positions='relative', buckets=6), 'buckets=6 must be a multiple of 4'),
    (dict(positions='relative', farthest=16), 'farthest=16 must be more than half of buckets=32'),
  ],
)
def test_options_that_cannot_be(changes, said):
  with pytest.raises(ValueError, match=said):
    made('transformer_tiny', **changes)


def test_rows_that_are_too_long():
  model = made('transformer_tiny', max_len=8)
  with pytest.raises(ValueError, match='rows of 9 tokens are longer than max_len=8'):
    model.apply(random_params(model), BATCH)
