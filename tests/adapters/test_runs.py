"""A whole run with an adapter, from the command line's config to the exported folder."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

import llm_jax
from configs import classify
from llm_jax.adapters import lora
from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.inference.export import export
from llm_jax.modes import _command
from llm_jax.programs import checkpoints, pretrained
from llm_jax.training import evaluation, loop

pytestmark = pytest.mark.slow
SHAPE = dict(dim=16, layers=2, heads=2, mlp_dim=32, max_len=32)
SENSITIVITY = 'sensitivity/model/stack/layers/block/attention/query/adalora_a'
TEXTS = ['one two three', 'a b c d', 'four five', 'x y z']


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """configs/classify.py with --config.adapter.name=lora, for a tiny BERT."""
  folder = tmp_path_factory.mktemp('corpus')
  records = [{'text': f'{TEXTS[i % 4]} {i}', 'label': 'ab'[i % 2]} for i in range(24)]
  (folder / 'data.jsonl').write_text('\n'.join(map(json.dumps, records)))
  config = classify.get_config()
  config.adapter.name = 'lora'  # as the flag sets it
  config.adapter.rank = 2
  tree = config.to_dict()
  del tree['pretrained']
  tree['data'] = dict(
    source='jsonl',
    path=str(folder / 'data.jsonl'),
    label='label',
    validation=0.0,
    cache=str(folder / 'cache'),
    workers=1,
  )
  tree['tokenizer'] = dict(name='byte')
  tree['model'] = dict(name='encoder', variant='bert_base', remat='none', **SHAPE)
  tree['objective'] |= dict(pool='cls')
  tree['optimizer'] = dict(name='adamw', learning_rate=0.01)
  tree |= dict(steps=4, batch_size=4, seq_len=32, log_every=1, eval_every=2)
  tree['checkpoint'] = dict(every=2, keep=2)
  tree['logging'] = dict(tensorboard=False)
  return tree


def prepared(settings, workdir):
  return loop.prepare(config_lib.parse(settings), workdir)


@pytest.fixture(scope='module')
def run(settings, tmp_path_factory):
  made = prepared(settings, tmp_path_factory.mktemp('run'))
  loop.train(made)
  return made


def bits(x):
  return jax.tree.map(lambda leaf: (str(leaf.dtype), np.asarray(leaf).tobytes()), x)


def probabilities(session):
  return np.array([list(answer['probabilities'].values()) for answer in session.predict(TEXTS)])


def test_it_resumes_to_the_bit(run, settings, tmp_path):
  shutil.copytree(run.workdir, tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '4')
  again = prepared(settings, tmp_path / 'again')
  assert again.step == 2 and bits(again.state.params) != bits(run.state.params)
  loop.train(again)
  assert bits(again.state) == bits(run.state)


def test_what_was_saved_predicts_and_is_exported_merged(run, settings, tmp_path):
  session = llm_jax.open(run.workdir)
  assert bits(session.params) == bits(run.state.network_params)
  answers = probabilities(session)
  export(session, tmp_path / 'merged')
  merged = llm_jax.open(tmp_path / 'merged')
  np.testing.assert_allclose(probabilities(merged), answers, atol=1e-5)
  assert not any('lora' in path for path in tree.paths(merged.params))
  export(session, tmp_path / 'base', form='base')
  plain = tree.flatten(llm_jax.open(tmp_path / 'base').params)
  held = tree.flatten(session.params)
  assert bits(plain) == bits({path: held[path] for path in plain})
  assert np.abs(probabilities(llm_jax.open(tmp_path / 'base')) - answers).max() > 1e-5

  # The merged model is a base like any other.
  changes = dict(adapter=dict(name='lora', rank=2, dora=True), init_from=str(tmp_path / 'merged'))
  started = prepared(settings | changes, tmp_path / 'next')
  wanted = tree.flatten(merged.params)
  found = tree.flatten(started.state.frozen)
  assert found and all(np.array_equal(x, wanted[path]) for path, x in found.items())
  assert not any(
    np.any(x) for path, x in tree.flatten(started.state.params).items() if 'lora_b' in path
  )


def test_what_an_adapter_carries_is_kept_too(settings, tmp_path):
  """AdaLoRA's scores, and which ranks are left: a resumed run ends as an undisturbed one."""
  adapter = dict(name='adalora', rank=2, target_rank=1, final_steps=1)
  changes = settings | dict(adapter=adapter)
  whole = prepared(changes, tmp_path / 'whole')
  loop.train(whole)
  shutil.copytree(whole.workdir, tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '4')
  again = prepared(changes, tmp_path / 'again')
  assert again.step == 2 and np.any(tree.flatten(again.state.extras)[SENSITIVITY])
  loop.train(again)
  assert bits(again.state) == bits(whole.state)
  kept = np.concatenate([np.ravel(x) for x in jax.tree.leaves(whole.state.extras['kept'])])
  values = [x for path, x in tree.flatten(whole.state.params).items() if path.endswith('_values')]
  assert kept.sum() == kept.size / 2  # ranks; those that are not left are zero
  assert np.array_equal(np.concatenate([np.ravel(x) for x in values]) != 0, kept > 0)
  session = llm_jax.open(whole.workdir)
  export(session, tmp_path / 'merged')
  merged = llm_jax.open(tmp_path / 'merged')
  np.testing.assert_allclose(probabilities(merged), probabilities(session), atol=1e-5)


def test_a_run_that_leaves_an_adapter_behind_says_so(run, settings, caplog):
  changes = dict(init_from=str(run.workdir))
  pretrained.fill_in(config_lib.parse(settings | changes))
  assert 'beside the base is not taken' not in caplog.text
  pretrained.fill_in(config_lib.parse(settings | changes | dict(adapter={})))
  assert 'beside the base is not taken' in caplog.text


def test_what_is_trained_is_said_and_what_would_not_learn_is_refused(
  settings, tmp_path, monkeypatch, caplog
):
  with caplog.at_level('INFO', 'absl'):
    prepared(settings, tmp_path / 'said')
  assert 'What is trained' in caplog.text and 'query/lora_a' in caplog.text
  assert 'lora_b is 0' in caplog.text and 'parameters are trained' in caplog.text
  monkeypatch.setattr(lora.Adapter, 'no_gradient', lambda adapter, path: None)
  with pytest.raises(ValueError, match='(?s)does not depend on.*query/lora_a'):
    prepared(settings, tmp_path / 'refused')


def test_checkpoints_hold_what_is_trained_and_name_the_rest(run, settings, tmp_path):
  folder, workdir = tmp_path / 'folder', tmp_path / 'run'
  export(llm_jax.open(run.workdir), folder)
  export(llm_jax.open(run.workdir), tmp_path / 'other', form='base')
  changes = settings | dict(init_from=str(folder))
  whole = prepared(changes, workdir)
  loop.train(whole)
  held = checkpoints.restore_params(workdir / 'checkpoints', whole.program.params)
  named = sorted(whole.base['fingerprints'])
  assert sorted(held.new) == sorted(tree.paths(whole.state.frozen)) == named

  def last_steps():
    shutil.rmtree(workdir / 'checkpoints' / '4')
    again = prepared(changes, workdir)
    assert again.step == 2
    loop.train(again)
    return bits(again.state)

  assert last_steps() == bits(whole.state)
  assert bits(llm_jax.open(workdir).params) == bits(whole.state.network_params)
  folder.rename(tmp_path / 'moved')
  with pytest.raises(ValueError, match=f'(?s)base, {folder}, is gone.*{workdir}/base'):
    _ = llm_jax.open(workdir).params
  with pytest.raises(ValueError, match='is gone'):
    last_steps()
  (workdir / 'base').symlink_to(tmp_path / 'moved')
  loop.train(prepared(changes, workdir))
  assert bits(llm_jax.open(workdir).params) == bits(whole.state.network_params)
  (tmp_path / 'other').rename(folder)
  with pytest.raises(ValueError, match=f'{folder} is not the base of {workdir} any more'):
    _ = llm_jax.open(workdir).params


def test_another_objective_takes_what_it_wants_of_the_base(run, settings, tmp_path):
  """A head that the run kept frozen is none of a network that begins with it."""
  mlm = settings | dict(objective=dict(name='mlm'), adapter={}, steps=2)
  loop.train(prepared(mlm, tmp_path / 'mlm'))
  adapted = mlm | dict(adapter=dict(name='lora', rank=2), init_from=str(tmp_path / 'mlm'))
  middle = prepared(adapted, tmp_path / 'adapted')
  assert any(path.startswith('heads_mlm') for path in middle.base['fingerprints'])
  loop.train(middle)
  last = prepared(settings | dict(init_from=str(tmp_path / 'adapted')), tmp_path / 'last')
  wanted, found = tree.flatten(middle.state.network_params), tree.flatten(last.state.network_params)
  shared = [path for path in found if path in wanted]
  assert any('lora_b' in path for path in shared) and any('embedder' in path for path in shared)
  assert bits({path: wanted[path] for path in shared}) == bits(
    {path: found[path] for path in shared}
  )


def test_a_run_may_be_the_base_of_another(run, settings, tmp_path):
  base, workdir = tmp_path / 'base', tmp_path / 'run'
  shutil.copytree(run.workdir, base)
  started = prepared(settings | dict(init_from=str(base)), workdir)
  loop.train(started)
  assert started.base['step'] == 4
  assert bits(llm_jax.open(workdir).params) == bits(started.state.network_params)
  shutil.rmtree(base / 'checkpoints' / '4')
  with pytest.raises(ValueError, match='no whole checkpoint of step 4 any more'):
    _ = llm_jax.open(workdir).params


def test_averages_of_the_parameters_answer(settings, tmp_path):
  """They are evaluated, predict and are taken elsewhere; training goes on without them."""
  optimizer = settings['optimizer'] | dict(ema_decay=0.8)
  settings = settings | dict(data=settings['data'] | dict(validation=0.3))
  changes = settings | dict(optimizer=optimizer)
  whole = prepared(changes, tmp_path / 'whole')
  loss = loop.train(whole)['loss']
  plain = prepared(settings, tmp_path / 'plain')
  loop.train(plain)
  assert bits(whole.state.params) == bits(plain.state.params)
  answering = whole.state.answering_params
  assert bits(answering) != bits(whole.state.network_params)
  averages = tree.flatten(whole.state.extras['averages'])
  assert {path: bits(x) for path, x in tree.flatten(answering).items() if path in averages} == bits(
    averages
  )
  assert bits(plain.state.answering_params) == bits(plain.state.network_params)
  session = llm_jax.open(tmp_path / 'whole')
  assert bits(session.params) == bits(answering)
  program, tokenizer = whole.program, whole.data.tokenizer
  evaluated = evaluation.scores(program, answering, tokenizer, whole.validation, None)
  assert evaluated['loss'] == loss
  shutil.copytree(whole.workdir, tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '4')
  again = prepared(changes, tmp_path / 'again')
  assert again.step == 2
  loop.train(again)
  assert bits(again.state) == bits(whole.state)
  with pytest.raises(ValueError, match='ema_decay: 0.8 -> 0.0 .*state of the optimizer'):
    prepared(settings | dict(optimizer=optimizer | dict(ema_decay=0.0)), whole.workdir)
  # A run that begins with these parameters begins with the averages.
  next_one = prepared(changes | dict(init_from=str(whole.workdir)), tmp_path / 'next')
  assert bits(next_one.state.network_params) == bits(answering)
  assert bits(next_one.state.answering_params) == bits(answering)


def test_several_adapters_on_one_base_are_chosen_by_name(settings, tmp_path, monkeypatch):
  base = tmp_path / 'base'

  def named(name, adapter):
    monkeypatch.setattr(_command, 'ADAPTER', types.SimpleNamespace(value=name))
    return _command.of_adapter(base, settings | dict(adapter=adapter), makes=True)

  with pytest.raises(ValueError, match=f'--adapter=a needs a base: {base} holds no run'):
    named('a', dict(name='lora'))
  loop.train(prepared(settings | dict(adapter={}, steps=2), base))
  with pytest.raises(ValueError, match='say how by --config.adapter.name'):
    named('a', {})
  for name, adapter in {'a': dict(name='lora', rank=2), 'b': dict(name='ia3')}.items():
    workdir, own = named(name, adapter)
    assert workdir == base / 'adapters' / name and own['init_from'] == str(base)
    loop.train(prepared(own, workdir))
    assert _command.of_adapter(base, None, makes=False) == (workdir, None)
  one = llm_jax.open(base, adapter='a')
  assert one.adapters == llm_jax.open(base).adapters == ['a', 'b']
  two, alone = one.switched('b'), llm_jax.open(base, adapter='b')
  assert two.origin == alone.origin == base / 'adapters' / 'b'
  wanted, first = bits(alone.params), bits(one.params)
  reads = []
  read = checkpoints.restore_params
  monkeypatch.setattr(
    checkpoints, 'restore_params', lambda folder, *rest: reads.append(folder) or read(folder, *rest)
  )
  assert bits(two.params) == wanted and reads == [alone.origin / 'checkpoints']
  held, shared = (tree.flatten(session.params) for session in (one, two))
  frozen = [path for path in shared if path in held and not path.startswith('heads_')]
  assert len(frozen) > 10 and all(shared[path] is held[path] for path in frozen)
  np.testing.assert_array_equal(probabilities(two), probabilities(alone))
  assert np.abs(probabilities(two) - probabilities(one)).max() > 0
  back = two.switched('a')  # of another base nothing is taken
  two.params['model'] = jax.tree.map(lambda x: x + 1, two.params['model'])
  assert bits(back.params) == first and reads[-1] == base / 'checkpoints'
  with pytest.raises(ValueError, match='--adapter=c: .* there are a, b'):
    llm_jax.open(base, adapter='c')
