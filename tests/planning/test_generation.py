"""What it takes to write with a decoder, by the compiled step: weights, keys and values, bytes."""

import json

import pytest

from configs import base
from llm_jax.core import config as config_lib
from llm_jax.planning import generation

SHAPE = dict(dim=64, layers=2, heads=4, mlp_dim=128, max_len=64, vocab_size=512)


def config(**changes):
  given = base.get_config().to_dict()
  given |= dict(steps=1, batch_size=2, seq_len=32, tokenizer=dict(name='byte'))
  given['model'] = dict(name='decoder', variant='gpt2_small', remat='none', **SHAPE)
  given['objective'] = dict(name='clm', packing='windows')
  given['data'] = {}
  given['model'] |= changes.pop('model', {})
  return config_lib.parse(given | changes)


@pytest.mark.slow
def test_weights_and_cache_are_counted_by_their_forms(tmp_path, capsys):
  given = config(), config(compress=dict(name='int8'), model=dict(cache_dtype='int8'))
  whole, small = (generation.plan(each, 'cpu:1', 4, 64) for each in given)
  D, L, F, V, S = 64, 2, 128, 512, 64
  kernels = L * (4 * D * D + 2 * D * F)
  others = 64 * D + L * (9 * D + F) + 2 * D  # positions, biases and norms, the last norm
  assert whole['parameters'] == kernels + V * D + others
  # On a CPU the table stands beside them in no second copy, as it is tied.
  assert whole['weights_bytes'] == 4 * (kernels + V * D + others)
  scales = L * (5 * D + F) + V
  one = kernels + V * D + 4 * (scales + others)
  assert one <= small['weights_bytes'] <= one + V * D + 4 * V  # the table for few rows beside it
  assert whole['cache_bytes'] == 4 * (2 * L * 4 * S * D) + 4 * 4
  assert small['cache_bytes'] == 2 * L * 4 * S * (D + 4 * 4) + 4 * 4
  assert whole['fits'] and whole['form'] == 'float32' and small['form'] == 'int8'
  (found,) = generation.run(given[1], 'cpu:1', tmp_path, 1, 32)
  assert json.loads((tmp_path / 'generate_plan.json').read_text()) == [found]
  text = capsys.readouterr().out
  assert '# Writing with gpt2_small on cpu:1: fits' in text and 'int8; 1 row(s)' in text


@pytest.mark.slow
def test_on_a_tpu_a_token_costs_the_bytes_of_the_weights():
  shape = dict(dim=512, mlp_dim=2048, max_len=128, vocab_size=4096, dtype='bfloat16')
  forms = {}, dict(name='int8'), dict(name='int4')
  given = [config(model=shape, compress=form) for form in forms]
  whole, small, least = (generation.plan(each, 'v5e:1x1', 1, 128) for each in given)
  for report in (whole, small, least):
    assert report['bytes_accessed'] >= report['weights_bytes']
    assert report['tokens_per_second'] == pytest.approx(1 / report['step_seconds'])
    assert report['memory_seconds'] == pytest.approx(report['bytes_accessed'] / 819e9, rel=0.01)
  assert small['weights_bytes'] < 0.6 * whole['weights_bytes']
  assert small['tokens_per_second'] > 1.4 * whole['tokens_per_second']
  assert least['weights_bytes'] < 0.7 * small['weights_bytes']
  assert least['tokens_per_second'] > 1.2 * small['tokens_per_second']


def test_what_does_not_write_is_refused():
  encoder = config(model=dict(name='encoder', variant='bert_base'), objective=dict(name='mlm'))
  with pytest.raises(ValueError, match="is for decoders, and config.model.name='encoder' is none"):
    generation.plan(encoder, 'cpu:1', 1, 32)
  with pytest.raises(ValueError, match='plan_slots=65 must be at least 1'):
    generation.plan(config(), 'cpu:1', 1, 65)
