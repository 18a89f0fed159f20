"""One function in a file, opened by JAX alone."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base
from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.programs import assemble, forms, inference, portable

SHAPE = dict(dim=8, layers=2, heads=2, mlp_dim=16, max_len=16, vocab_size=263)
MODELS = {
  'classify': (
    dict(name='encoder', variant='bert_base'),
    dict(name='classify', classes=('a', 'b')),
  ),
  'mlm': (dict(name='encoder', variant='bert_base'), dict(name='mlm')),
  'clm': (dict(name='decoder', variant='gpt2_small'), dict(name='clm', packing='windows')),
}
ALONE = """
import sys, jax, numpy
call = jax.export.deserialize(open(sys.argv[1], 'rb').read()).call
given = numpy.load(sys.argv[2])
found = call(given['tokens'], given['lengths'])
numpy.savez(sys.argv[3], **found)
assert 'llm_jax' not in sys.modules
"""


def made(kind, **changes):
  model, objective = MODELS[kind]
  given = base.get_config().to_dict()
  given |= dict(steps=1, batch_size=3, seq_len=16, tokenizer=dict(name='byte'), objective=objective)
  given['model'] = model | SHAPE | dict(remat='none', dropout=0.0, attention_dropout=0.0)
  config = config_lib.parse(given | changes)
  program = inference.outline(config, assemble.byte_tokenizer(config), jax.devices()[:1])
  rng = np.random.default_rng(0)
  params = tree.map_with_path(
    lambda path, x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype), program.params
  )
  return program, forms.kept(params, program.infos, program.formed, program.layout)


@pytest.mark.parametrize('kind', MODELS)
def test_the_file_says_what_the_program_says(kind, tmp_path):
  program, params = made(kind, compress=dict(name='int8'))
  content = portable.exported(program, params, 16)
  (tmp_path / 'model').write_bytes(content)
  rng, lengths = np.random.default_rng(1), np.array([16, 3, 9], np.int32)
  tokens = rng.integers(7, 263, (3, 16)).astype(np.int32)
  np.savez(tmp_path / 'in.npz', tokens=tokens, lengths=lengths)
  names = [str(tmp_path / name) for name in ('model', 'in.npz', 'out.npz')]
  done = subprocess.run(
    [sys.executable, '-c', ALONE, *names], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = np.load(tmp_path / 'out.npz')
  positions = np.tile(np.arange(16, dtype=np.int32), (3, 1))
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in program.batch.items()}
  batch |= dict(tokens=tokens, positions=positions)
  batch['segments'] = (positions < lengths[:, None]).astype(np.int32)
  if kind == 'classify':
    batch['text_lasts'][:, 0] = lengths - 1
    wanted = program.predict_step(params, program.put(batch))['probabilities'][:, :1]
    np.testing.assert_allclose(found['probabilities'], wanted, atol=1e-5)
    return
  hidden = program.function(lambda network, batch: network.model(batch).hidden)
  wanted = np.asarray(hidden(params, program.put(batch)))
  if kind == 'mlm':
    real = batch['segments'] > 0
    np.testing.assert_allclose(found['hidden'][real], wanted[real], atol=1e-4)
  else:
    logits = program.function(
      lambda network, batch: network.model.logits(network.model(batch).hidden)
    )
    wanted = np.asarray(logits(params, program.put(batch)))[np.arange(3), lengths - 1]
    np.testing.assert_allclose(found['logits'], wanted, atol=1e-4)


def test_what_needs_more_than_the_tokens_of_a_text_is_refused():
  program, params = made('mlm', objective=dict(name='tag', tags=('a', 'b'), loss='crf'))
  with pytest.raises(ValueError, match='functions of tokens alone'):
    portable.exported(program, params, 16)
