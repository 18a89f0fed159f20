"""Plug-ins from outside, end to end: they train, resume, are evaluated, answer, generate and are
planned for, without a line of their own in the package.
"""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.data.cache import held_out
from llm_jax.inference import session as sessions
from llm_jax.inference.export import export
from llm_jax.modes import embed as embed_mode
from llm_jax.modes import eval as eval_mode
from llm_jax.modes import predict as predict_mode
from llm_jax.modes import train as train_mode
from llm_jax.planning import plan
from llm_jax.programs import inference, pretrained
from llm_jax.training import logs, loop, optimizers, step
from outside import config as outside_config
from outside import int8
from outside.counting import Source
from outside.source_target import ROW

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12
VECTORS = dict(name='outside.layer_vectors')
VECTOR = 'model/stack/layers/block/mlp/layer_vector'
KERNEL = 'model/stack/layers/block/mlp/up/kernel'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Trained runs by name, each made once: one leg of 12 steps, and one of 6 that goes on to 12."""
  folder = tmp_path_factory.mktemp('runs')
  made = {}

  def settings(name, **changes):
    kind, _, adapted = name.partition(' ')
    settings = outside_config.get_config(kind).to_dict()
    settings['data']['cache'] = str(folder / 'cache')
    if adapted:
      settings['adapter'] = VECTORS
      settings['optimizer']['learning_rate'] = 0.1
      settings['init_from'] = str(folder / kind)
    return settings | changes

  def prepared(name, workdir, **changes):
    return loop.prepare(config_lib.parse(settings(name, **changes)), workdir)

  def train(name, workdir, **changes):
    run = prepared(name, workdir, **changes)
    values = loop.train(run, train_mode.configured(run))
    return types.SimpleNamespace(run=run, workdir=workdir, values=values)

  def get(name):
    if name not in made:
      if ' ' in name:
        get(name.partition(' ')[0])
      made[name] = train(name, folder / name)
    return made[name]

  get.settings, get.prepared, get.train = settings, prepared, train
  return get


@pytest.fixture
def no_optimizer(monkeypatch, runs):
  """From here on no optimizer can be made; the runs that are opened have been trained before."""
  for name in ('tags', 'decoder'):
    runs(name)

  def refuse(*_):
    raise AssertionError('an optimizer is made')

  monkeypatch.setattr(optimizers, 'create', refuse)


def equal(a, b):
  """Whether two trees are alike to the last bit."""
  same = jax.tree.map(
    lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), *map(host, (a, b))
  )
  return all(jax.tree.leaves(same))


def host(arrays):
  return jax.tree.map(np.asarray, arrays)


def batch_of(run, count=8):
  rows = [run.train[i] for i in range(count)]
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def losses(workdir, split):
  return [line['loss'] for line in logs.read(workdir) if line['split'] == split]


def validation_records(kind):
  source = Source(kind)
  records = [source[i] for i in range(len(source))]
  return [record for record in records if held_out(record, 0.25)]


@pytest.mark.parametrize('name', ['tags', 'pairs', 'encoder vectors', 'decoder vectors'])
def test_it_learns_and_resumes_as_if_undisturbed(runs, tmp_path, name):
  whole = runs(name)
  first, last = losses(whole.workdir, 'validation')
  assert last < first < losses(whole.workdir, 'train')[0] + 0.5
  assert losses(whole.workdir, 'train')[-1] < losses(whole.workdir, 'train')[0]
  runs.train(name, tmp_path, steps=STEPS // 2)
  resumed = runs.train(name, tmp_path)
  assert resumed.run.step == whole.run.step == STEPS
  assert equal(resumed.run.state, whole.run.state)
  recorded = (tmp_path / 'recorded.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in recorded] == [5, 6, 10, 12]


def test_the_hook_is_called_with_the_numbers_of_its_steps(runs):
  workdir = runs('tags').workdir
  lines = [json.loads(line) for line in (workdir / 'recorded.jsonl').read_text().splitlines()]
  assert [(line['step'], line['state']) for line in lines] == [(5, 5), (10, 10), (12, 12)]
  logged = {line['step']: line for line in logs.read(workdir) if line['split'] == 'train'}
  for line in lines[:2]:
    assert line['loss'] == logged[line['step']]['loss'] and line['gates'] >= 0
  assert lines[-1]['token_accuracy'] == runs('tags').values['token_accuracy']


def test_every_word_is_answered_and_the_evaluator_counts_right(runs):
  workdir, records = runs('tags').workdir, validation_records('tags')
  session = llm_jax.open(workdir)
  answers = session.predict([{'words': record['words']} for record in records])
  right = np.concatenate(
    [
      np.array(answer['tags']) == record['tags']
      for answer, record in zip(answers, records, strict=True)
    ]
  )
  best = min((x for x in logs.read(workdir) if x['split'] == 'validation'), key=lambda x: x['loss'])
  assert best['token_accuracy'] == pytest.approx(right.mean(), abs=1e-9)
  assert 0.5 < right.mean()
  assert eval_mode.evaluate(session)['token_accuracy'] == best['token_accuracy']
  assert set(session.config.objective['tags']) == {'unit', 'teen', 'tens'}
  report = (workdir / 'report.txt').read_text()
  assert all(f'{tag}: ' in report for tag in ('unit', 'teen', 'tens'))
  # A text that shares a row with others gets the answer that it gets alone; an empty one has none.
  alone = [session.predict([{'words': record['words']}])[0] for record in records[:2]]
  assert alone == answers[:2]
  assert session.predict([{'words': []}, {'words': ['two']}])[0] == {'tags': []}


def test_a_text_is_not_seen_by_the_next_in_its_row(runs):
  session = llm_jax.open(runs('tags').workdir)
  run = session.program.function(lambda network, batch: network.model(batch).hidden)
  tokens = np.array([[9, 10, 11, 12]] * 2, np.int32)
  segments = np.array([[1, 1, 2, 2]] * 2, np.int32)
  tokens[1, 2:] += 1
  found = np.asarray(run(session.params, {'tokens': tokens, 'segments': segments}))
  assert (found[0, :2] == found[1, :2]).all() and (found[0, 2:] != found[1, 2:]).all()


def test_both_texts_of_a_pair_reach_the_loss(runs):
  workdir, records = runs('pairs').workdir, validation_records('pairs')
  session = llm_jax.open(workdir)
  answers = session.predict([{k: r[k] for k in ('source', 'target')} for r in records])
  scores = np.array([answer['score'] for answer in answers])
  expected = np.mean((scores - [record['score'] for record in records]) ** 2)
  found = eval_mode.evaluate(session)
  assert found['loss'] == pytest.approx(expected, rel=1e-5)
  program, batch = session.program, batch_of(runs('pairs').run)
  run = runs('pairs').run
  value, weight = program.eval_step(session.params, batch)['score']
  swapped = batch | {name: batch[f'target_{name}'] for name in ROW}
  swapped |= {f'target_{name}': batch[name] for name in ROW}
  assert float(program.eval_step(session.params, swapped)['score'][0]) == pytest.approx(
    float(value)
  )
  same = batch | {f'target_{name}': batch[name] for name in ROW}
  ones = np.sum((1 - batch['score']) ** 2)
  assert float(program.eval_step(session.params, same)['score'][0]) == pytest.approx(ones, abs=1e-4)
  assert float(weight) == 8 and run.program.flops == 0


def test_the_auxiliary_loss_takes_part(runs):
  run = runs('tags').run
  batch, network, params = batch_of(run), run.program.network, run.state.params

  def gradient(balance, micro_batches=1):
    changed = network.clone(model=network.model.clone(balance=balance))
    return step.gradient(params, batch, None, network=changed, micro_batches=micro_batches)

  with_aux, metrics = gradient(1.0)
  without, _ = gradient(0.0)
  parts = {name: float(value / weight) for name, (value, weight) in metrics.items()}
  assert parts['gates'] > 0
  assert parts['loss'] == pytest.approx(parts['tags'] + parts['gates'], rel=1e-6)
  kernel = 'model/blocks_0/gate/kernel'
  moved = tree.flatten(with_aux)[kernel] - tree.flatten(without)[kernel]
  assert float(jnp.linalg.norm(moved)) > 1e-3
  split, _ = gradient(1.0, micro_batches=2)
  for path, leaf in tree.flatten(split).items():
    np.testing.assert_allclose(
      leaf, tree.flatten(with_aux)[path], rtol=1e-3, atol=1e-5, err_msg=path
    )


@pytest.mark.parametrize('name', ['tags', 'pairs', 'encoder vectors'])
def test_a_plan_counts_its_parameters(runs, name, tmp_path):
  program = runs(name).run.program
  report = plan.run(program.config, 'cpu:1', tmp_path)
  network = runs(name).run.state.network_params
  assert report['parameters'] == sum(leaf.size for leaf in jax.tree.leaves(network))
  assert report['fits'] and report['executed_flops'] > 0
  assert (report['model_flops'] is None) == (name != 'encoder vectors')
  trained = sum(leaf.nbytes for leaf in jax.tree.leaves(runs(name).run.state.opt_state))
  assert report['hbm']['optimizer_bytes'] == trained


@pytest.mark.parametrize('kind', ['encoder', 'decoder'])
def test_an_adapter_trains_its_own_leaves_beside_a_base_that_keeps_its_bits(runs, kind):
  base, run = runs(kind).run, runs(f'{kind} vectors').run
  whole = tree.flatten(run.state.network_params)
  assert list(tree.flatten(run.state.params)) == [VECTOR]
  assert whole.keys() - {VECTOR} == tree.flatten(base.state.params).keys()
  best = llm_jax.open(base.workdir).params  # what `init_from` reads
  assert equal(run.state.frozen, best)
  assert not equal(run.state.frozen, base.program.init(0).params)
  moments = [leaf for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim]
  assert [leaf.shape for leaf in moments] == [(2, 16)] * 2 == [whole[VECTOR].shape] * 2
  assert np.abs(whole[VECTOR]).min(axis=1).all() and run.program.infos[VECTOR].layer == 0
  at_first = run.program.init(0)
  grads, _ = step.gradient(
    at_first.params, batch_of(run), None, network=run.program.network, frozen=at_first.frozen
  )
  assert np.linalg.norm(tree.flatten(grads)[VECTOR], axis=1).min() > 1e-6
  # The base draws what it draws without an adapter.
  assert equal(at_first.frozen, base.program.init(0).params)


def test_an_adapted_model_is_the_same_in_every_form(runs):
  run = runs('decoder vectors').run
  params, batch = run.state.network_params, batch_of(run)
  losses = {}
  for unroll in (1, 0):
    config = run.program.config
    model = config.model | {'unroll': unroll}
    program = inference.build(
      config_lib.dataclasses.replace(config, model=model), run.program.objective, run.train[0]
    )
    losses[unroll] = float(program.eval_step(params, batch)['clm'][0])
  plain = tree.replace(params, {VECTOR: jnp.zeros_like(tree.flatten(params)[VECTOR])})
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)
  assert abs(float(program.eval_step(plain, batch)['clm'][0]) - losses[0]) > 1e-3


def test_an_adapted_decoder_generates_with_its_adapter(runs):
  session = llm_jax.open(runs('decoder vectors').workdir)
  strong = tree.flatten(session.params)[VECTOR] * 20
  session.params = tree.replace(session.params, {VECTOR: strong})
  prompt = 'twenty one '
  assert session.complete([prompt], max_new_tokens=6, temperature=0) == [greedy(session, prompt, 6)]
  plain = llm_jax.open(runs('decoder').workdir)
  assert session.complete([prompt], max_new_tokens=6, temperature=0) != [greedy(plain, prompt, 6)]


def greedy(session, prompt, count):
  """The completion by whole forward passes."""

  def logits(network, batch):
    return network.model.logits(network.model(batch).hidden)

  run = session.program.function(logits)
  ids = [session.tokenizer.bos_id, *session.tokenizer.encode(prompt)]
  for _ in range(count):
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(ids)] = ids
    segments = (np.arange(32) < len(ids)).astype(np.int32)[None]
    found = run(session.params, {'tokens': tokens, 'segments': segments})
    ids.append(int(np.argmax(found[0, len(ids) - 1])))
    if ids[-1] == session.tokenizer.eos_id:
      break
  return session.tokenizer.decode(ids)[len(prompt) :]


def test_a_weight_form_stands_where_a_kernel_did(runs):
  workdir, run = runs('decoder').workdir, runs('decoder').run
  plain, small, dense = (llm_jax.open(workdir) for _ in range(3))
  kernel = tree.flatten(plain.params)[KERNEL]
  form = int8.quantized(kernel, plain.program.infos[KERNEL])
  assert form.values.dtype == jnp.int8 and form.scales.shape == (2, 1, 32)
  assert 0 < np.abs(form.dense() - kernel).max() <= 0.5 * np.max(form.scales) + 1e-7
  small.params = tree.replace(small.params, {KERNEL: form})
  dense.params = tree.replace(dense.params, {KERNEL: form.dense()})
  batch = batch_of(run)
  found = [float(x.program.eval_step(x.params, batch)['clm'][0]) for x in (plain, small, dense)]
  assert found[1] == pytest.approx(found[2], rel=1e-6) and found[1] == pytest.approx(
    found[0], rel=1e-2
  )
  assert found[1] != found[0]
  text = small.program.eval_step.lower(small.params, batch).as_text()
  assert (
    'tensor<2x16x32xi8>' in text
    and 'tensor<2x16x32xf32>' not in text.partition('{')[2].partition('->')[0]
  )
  complete = dict(max_new_tokens=6, temperature=0)
  assert small.complete(['twenty one '], **complete) == dense.complete(['twenty one '], **complete)


def test_nothing_but_training_makes_an_optimizer(runs, tmp_path, no_optimizer, capsys):
  with pytest.raises(AssertionError, match='an optimizer is made'):
    runs.prepared('tags', tmp_path / 'refused')
  session = llm_jax.open(runs('tags').workdir)
  assert 'model/mixture_weights' in tree.flatten(session.params)
  (tmp_path / 'in.jsonl').write_text('{"words": ["two", "sixty"]}\n{"words": ["ten"]}\n')
  predict_mode.predict(session, tmp_path / 'in.jsonl', tmp_path / 'out.jsonl')
  lines = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert [len(line['tags']) for line in lines] == [2, 1] and lines[1]['words'] == ['ten']
  (tmp_path / 'in.txt').write_text('two\nsixty three\n')
  embed_mode.embed(session, tmp_path / 'in.txt', tmp_path / 'out.npy')
  assert np.load(tmp_path / 'out.npy').shape == (2, 16)
  assert eval_mode.evaluate(session)['loss'] > 0
  decoder = llm_jax.open(runs('decoder').workdir)
  assert len(decoder.complete(['two'], max_new_tokens=3)) == 1
  export(session, tmp_path / 'exported')
  settings = runs.settings('tags', objective=session.config.objective, tokenizer={})
  given = config_lib.parse(settings | {'init_from': str(tmp_path / 'exported')})
  again = sessions.open_model(None, pretrained.fill_in(given))
  texts = ['two', 'sixty three']
  assert equal(again.embed(texts), session.embed(texts))


def test_the_command_line_finds_them(runs, tmp_path):
  whole = runs('tags')
  done = call(
    '--config=tests/outside/config.py:tags',
    f'--workdir={tmp_path}',
    f'--config.data.cache={whole.run.data.config.data["cache"]}',
  )
  assert done.returncode == 0, done.stderr
  assert equal(runs.prepared('tags', tmp_path).state, whole.run.state)
  done = call(f'--workdir={tmp_path}', '--mode=outside.shout', '--words=twenty two')
  assert done.returncode == 0, done.stderr
  (answer,) = llm_jax.open(tmp_path).predict([{'words': ['twenty', 'two']}])
  assert done.stdout.splitlines()[-1] == 'TWENTY/{} TWO/{}!'.format(*map(str.upper, answer['tags']))


def call(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'llm_jax.main', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': 'tests', 'JAX_PLATFORMS': 'cpu'},
    check=False,
  )
