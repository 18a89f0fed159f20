"""A frozen base in 8 bits: what is trained beside it, from a folder to a folder."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from configs import classify, gpt_tiny
from llm_jax.core import config as config_lib
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.inference.export import export
from llm_jax.programs import checkpoints, pretrained
from llm_jax.training import loop
from llm_jax.training import program as programs

pytestmark = pytest.mark.slow
SHAPE = dict(dim=16, layers=2, heads=2, mlp_dim=32, max_len=32, dropout=0.0, attention_dropout=0.0)
TEXTS = ['one two three', 'a b c d', 'four five', 'x y z']
KINDS = {
  'encoder': (classify, dict(name='encoder', variant='bert_base')),
  'decoder': (gpt_tiny, dict(name='decoder', variant='gpt2_small')),
}
LORA = dict(name='lora', rank=2, targets='.*')


def prepared(settings, workdir):
  return loop.prepare(config_lib.parse(settings), workdir)


@pytest.fixture(scope='module', params=KINDS)
def base(request, tmp_path_factory):
  """Settings with a folder to start from."""
  folder = tmp_path_factory.mktemp(request.param)
  records = [{'text': f'{TEXTS[i % 4]} {i}', 'label': 'ab'[i % 2]} for i in range(24)]
  (folder / 'data.jsonl').write_text('\n'.join(map(json.dumps, records)))
  config, model = KINDS[request.param]
  settings = config.get_config().to_dict()
  settings.pop('pretrained', None)
  settings['data'] = dict(source='jsonl', path=str(folder / 'data.jsonl'), validation=0.0)
  settings['data'] |= dict(cache=str(folder / 'cache'), workers=1)
  if config is classify:
    settings['data'] |= dict(label='label')
    settings['objective'] |= dict(pool='cls')
  settings['tokenizer'] = dict(name='byte')
  settings['model'] = model | dict(remat='none', **SHAPE)
  settings['optimizer'] = dict(name='adamw', learning_rate=0.05)
  settings |= dict(steps=4, batch_size=4, seq_len=32, log_every=1, eval_every=2)
  settings['evaluation'] = dict(samples=0)
  settings['checkpoint'] = dict(every=2, keep=2)
  settings['logging'] = dict(tensorboard=False)
  loop.train(prepared(settings, folder / 'start'))
  export(llm_jax.open(folder / 'start'), folder / 'base')
  return settings | dict(init_from=str(folder / 'base'))


@pytest.fixture(scope='module')
def run(base, tmp_path_factory):
  made = prepared(base | dict(adapter=LORA, base_weights='int8'), tmp_path_factory.mktemp('run'))
  loop.train(made)
  return made


def bits(x):
  return jax.tree.map(lambda leaf: (str(leaf.dtype), np.asarray(leaf).tobytes()), x)


def said(session):
  """Probabilities of classes, or of a decoder what it writes."""
  if session.causal:
    return session.complete(TEXTS, max_new_tokens=8, temperature=0)
  return np.array([list(answer['probabilities'].values()) for answer in session.predict(TEXTS)])


def test_kernels_are_kept_in_8_bits_and_stay_as_they_are(base, run):
  state = run.state
  frozen = params_lib.leaves(state.frozen)
  forms = {path: leaf for path, leaf in frozen.items() if params_lib.is_form(leaf)}
  assert len(forms) == 6 and all(leaf.values.dtype == jnp.int8 for leaf in forms.values())
  size = lambda leaf: sum(x.nbytes for x in jax.tree.leaves(leaf))
  kernels = sum(size(leaf) for leaf in forms.values())
  whole = tree.flatten(run.program.params)
  assert kernels < 0.4 * sum(4 * whole[path].size for path in forms)  # scales of narrow kernels
  text = run.program.train_step.lower(state, run.program.batch).as_text()
  assert 'xi8>' in text
  first = loop._first_state(run.program)[0]
  assert bits(first.frozen) == bits(state.frozen) and bits(first.params) != bits(state.params)
  held = checkpoints.restore_params(run.workdir / 'checkpoints', run.program.params)
  assert not any(path in held.params for path in forms)
  # It learns as beside the arrays that the forms stand for.
  dense = state.replace(frozen=run.program.dense(first.frozen), params=first.params)
  batch = run.program.put({k: np.stack([e[k] for e in run.train[:4]]) for k in run.train[0]})
  both = [run.program.eval_step(s.network_params, batch) for s in (dense, first)]
  np.testing.assert_allclose(*(np.array(jax.tree.leaves(x)) for x in both), rtol=1e-5)
  # The kernels as they were are others, and not far.
  was = pretrained.load_params(run.program, pathlib.Path(base['init_from'])).params
  plain = tree.flatten(dense.network_params) | {path: was[path] for path in forms}
  wide, kept = (
    float(next(iter(x.values()))[0])
    for x in (run.program.eval_step(tree.nest(plain), batch), both[0])
  )
  assert 0 < abs(wide - kept) < 0.02 * wide


def test_it_resumes_to_the_bit_answers_and_is_exported(base, run, tmp_path):
  settings = base | dict(adapter=LORA, base_weights='int8')
  shutil.copytree(run.workdir, tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '4')
  again = prepared(settings, tmp_path / 'again')
  assert again.step == 2
  loop.train(again)
  assert bits(again.state) == bits(run.state)
  session = llm_jax.open(run.workdir)
  assert bits(session.params) == bits(run.state.network_params)
  answers = said(session)
  export(session, tmp_path / 'merged')
  merged = llm_jax.open(tmp_path / 'merged')
  assert not any(map(params_lib.is_form, params_lib.leaves(merged.params).values()))
  if session.causal:
    assert said(merged) == answers
  else:
    np.testing.assert_allclose(said(merged), answers, atol=1e-5)
    soup = llm_jax.open(run.workdir, soup=[tmp_path / 'again'])
    np.testing.assert_array_equal(said(soup), answers)
  export(session, tmp_path / 'adapter', form='adapter')
  assert (tmp_path / 'adapter' / 'adapter_config.json').exists()
  with pytest.raises(ValueError, match='base_weights'):
    prepared(settings | dict(base_weights=''), run.workdir)


@pytest.mark.parametrize('base', ['encoder'], indirect=True)
def test_frozen_heads_stay_as_they_are(base):
  changes = dict(objective=dict(name='mlm'), adapter=LORA, base_weights='int8', init_from=None)
  program = programs.outline(config_lib.parse(base | changes), jax.devices())
  heads = [path for path, info in program.infos.items() if path[:5] == 'heads' and info.formable]
  assert heads and not any(path in program.formed for path in heads)
  assert all(path.startswith('model/') for path in program.formed) and len(program.formed) == 6


def test_what_cannot_be_kept_so_is_refused(base, tmp_path):
  for changes, message in (
    (dict(base_weights='int4', adapter=LORA), "'int4' is not known; did you mean|is not known"),
    (dict(base_weights='int8'), 'without an adapter all is trained'),
    (dict(base_weights='int8', adapter=LORA, init_from=None), 'needs a base that is read'),
    (dict(base_weights='int8', adapter=dict(name='freeze', layers=2)), 'none of them is frozen'),
  ):
    with pytest.raises(ValueError, match=message):
      prepared(base | changes, tmp_path / 'refused')
