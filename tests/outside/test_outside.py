"""Plug-ins from outside, end to end: they train, resume, are evaluated, answer, generate and are
planned for, without a line of their own in the package.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

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

pytestmark = pytest.mark.slow  # all tests share runs that are trained
ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'PYTHONPATH': 'tests',
}
VECTOR = 'model/stack/layers/block/mlp/layer_vector'
KERNEL = 'model/stack/layers/block/mlp/up/kernel'


class Runs:
  """Trained runs by name, each made once; '+ vectors' have the adapter."""

  def __init__(self, folder):
    self.folder, self.made = folder, {}

  def __call__(self, name):
    if name not in self.made:
      self.made[name] = run = self.prepared(name, self.folder / name)
      loop.train(run, train_mode.configured(run))
    return self.made[name]

  def interrupted(self, name, workdir, **changes):
    """A copy of a run as if it had been killed before the last checkpoint was saved."""
    shutil.copytree(self(name).workdir, workdir)
    shutil.rmtree(workdir / 'checkpoints' / '12')
    return self.prepared(name, workdir, **changes)

  def settings(self, name, **changes):
    kind, _, adapted = name.partition(' + ')
    settings = outside_config.get_config(kind).to_dict()
    settings['data']['cache'] = str(self.folder / 'cache')
    if adapted:
      settings['adapter'] = dict(name='outside.layer_vectors')
    if name == 'decoder + vectors':
      settings['init_from'] = str(self('decoder').workdir)
    return settings | changes

  def prepared(self, name, workdir, **changes):
    return loop.prepare(config_lib.parse(self.settings(name, **changes)), workdir)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp('runs'))


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
  a, b = (jax.tree.map(lambda x: (str(x.dtype), np.asarray(x).tobytes()), x) for x in (a, b))
  return a == b


def batch_of(run):
  rows = [run.train[i] for i in range(8)]
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def losses(workdir, split):
  return [line['loss'] for line in logs.read(workdir) if line['split'] == split]


def validation_records(kind):
  source = Source(kind)
  records = [source[i] for i in range(len(source))]
  return [record for record in records if held_out(record, 0.25)]


@pytest.mark.parametrize('name', ['tags', 'pairs', 'encoder + vectors', 'decoder + vectors'])
def test_it_learns_and_resumes_as_if_undisturbed(runs, tmp_path, name):
  whole, again = runs(name), runs.interrupted(name, tmp_path / 'again')
  middle, last = losses(whole.workdir, 'validation')
  assert last < middle
  assert again.step == 6 and not equal(again.state.params, whole.state.params)
  loop.train(again)
  assert again.step == whole.step == 12 and equal(again.state, whole.state)
  assert losses(again.workdir, 'train') == losses(whole.workdir, 'train')


def test_the_hook_is_called_with_the_numbers_of_its_steps(runs):
  workdir = runs('tags').workdir
  lines = [json.loads(line) for line in (workdir / 'recorded.jsonl').read_text().splitlines()]
  assert [(line['step'], line['state']) for line in lines] == [(5, 5), (10, 10), (12, 12)]
  logged = {line['step']: line for line in logs.read(workdir) if line['split'] == 'train'}
  for line in lines[:2]:
    assert line['loss'] == logged[line['step']]['loss'] and line['gates'] >= 0
  assert lines[-1]['token_accuracy'] == logs.read(workdir)[-1]['token_accuracy']


def test_every_word_is_answered_and_the_evaluator_counts_right(runs):
  workdir, records = runs('tags').workdir, validation_records('tags')
  session = llm_jax.open(workdir)
  answers = session.predict([{'words': record['words']} for record in records])
  pairs = zip(answers, records, strict=True)
  right = np.concatenate([np.array(answer['tags']) == record['tags'] for answer, record in pairs])
  best = min((x for x in logs.read(workdir) if x['split'] == 'validation'), key=lambda x: x['loss'])
  assert best['token_accuracy'] == pytest.approx(right.mean(), abs=1e-9) and right.mean() > 0.5
  assert eval_mode.evaluate(session)['token_accuracy'] == best['token_accuracy']
  assert set(session.config.objective['tags']) == {'unit', 'teen', 'tens'}
  report = (workdir / 'report.txt').read_text()
  assert all(f'{tag}: ' in report for tag in ('unit', 'teen', 'tens'))
  # A text that shares a row with others gets the answer that it gets alone; an empty one has none.
  alone = [session.predict([{'words': record['words']}])[0] for record in records[:2]]
  assert alone == answers[:2]
  assert session.predict([{'words': []}, {'words': ['two']}])[0] == {'tags': []}


def test_a_run_may_be_evaluated_without_a_loss(runs, tmp_path):
  words = dict(name='outside.token_accuracy', report=False)
  run = runs.interrupted('tags', tmp_path / 'again', evaluators=dict(words=words))
  assert loop.train(run).keys() == {'token_accuracy'} and run.step == 12


@pytest.mark.parametrize(
  'changes',
  [
    dict(hooks=dict(recorder=dict(name='outside.recorder', evry=5))),
    dict(evaluators=dict(words=dict(name='outside.token_accuracy', evry=5))),
    dict(adapter=dict(name='outside.layer_vectors', evry=5)),
    dict(model=dict(name='outside.gated_convolution', evry=5)),
  ],
)
def test_a_slip_is_an_error_before_the_data_is_read(runs, tmp_path, changes):
  with pytest.raises(ValueError, match='evry is not an option'):
    runs.prepared('tags', tmp_path / 'never', **changes)
  assert not (tmp_path / 'never').exists()


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
  values = eval_mode.evaluate(session)
  assert values['score'] == pytest.approx(expected, rel=1e-5)
  assert values['loss'] == pytest.approx(values['score'] + 0.1 * values['gates'], rel=1e-6)
  assert values['gates'] > 0
  batch = batch_of(runs('pairs'))
  twice = batch | {f'target_{name}': batch[name] for name in ROW}  # each beside itself: cosine 1
  value, weight = session.program.eval_step(session.params, twice)['score']
  assert float(value) == pytest.approx(np.sum((1 - batch['score']) ** 2), abs=1e-4)
  assert float(weight) == 8


def test_the_auxiliary_loss_takes_part(runs):
  run = runs('tags')
  batch, network, params = batch_of(run), run.program.network, run.state.params

  def gradient(balance, micro_batches=1):
    changed = network.clone(model=network.model.clone(balance=balance))
    run = functools.partial(step.gradient, network=changed, micro_batches=micro_batches)
    return jax.jit(run, static_argnums=2)(params, batch, None)

  with_aux, metrics = gradient(1.0)
  without, _ = gradient(0.0)
  parts = {name: float(value / weight) for name, (value, weight) in metrics.items()}
  assert parts['gates'] > 0
  assert parts['loss'] == pytest.approx(parts['tags'] + parts['gates'], rel=1e-6)
  kernel = 'model/blocks_0/gate/kernel'
  moved = tree.flatten(with_aux)[kernel] - tree.flatten(without)[kernel]
  assert float(jnp.linalg.norm(moved)) > 1e-3
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
    with_aux,
    gradient(1.0, micro_batches=2)[0],
  )


@pytest.mark.parametrize('name', ['tags', 'pairs', 'encoder + vectors'])
def test_a_plan_counts_its_parameters(runs, name, tmp_path):
  program = runs(name).program
  report = plan.run(program.config, 'cpu:1', tmp_path)
  network = runs(name).state.network_params
  assert report['parameters'] == sum(leaf.size for leaf in jax.tree.leaves(network))
  assert report['fits'] and report['executed_flops'] > 0
  assert (report['model_flops'] is None) == (name != 'encoder + vectors')
  trained = sum(leaf.nbytes for leaf in jax.tree.leaves(runs(name).state.opt_state))
  assert report['hbm']['optimizer_bytes'] == trained


def check_only_vectors_were_trained(run):
  at_first, whole = run.program.init(0), tree.flatten(run.state.network_params)
  assert list(tree.flatten(run.state.params)) == [VECTOR]
  moments = [leaf.shape for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim]
  assert moments == [(2, 16)] * 2 == [whole[VECTOR].shape] * 2
  assert run.program.infos[VECTOR].layer == 0 and np.abs(whole[VECTOR]).max(axis=1).all()
  gradient = functools.partial(step.gradient, network=run.program.network, frozen=at_first.frozen)
  grads, _ = jax.jit(gradient, static_argnums=2)(at_first.params, batch_of(run), None)
  assert np.linalg.norm(tree.flatten(grads)[VECTOR], axis=1).min() > 1e-6


def test_an_adapter_of_an_encoder_leaves_the_base_as_it_is_drawn_without_it(runs, tmp_path):
  run, plain = runs('encoder + vectors'), runs.prepared('encoder', tmp_path)
  check_only_vectors_were_trained(run)
  assert equal(run.state.frozen, plain.state.params)


def test_an_adapter_of_a_trained_decoder_leaves_its_bits(runs, tmp_path):
  run, base = runs('decoder + vectors'), runs('decoder')
  check_only_vectors_were_trained(run)
  assert equal(run.state.frozen, llm_jax.open(base.workdir).params)
  assert not equal(run.state.frozen, run.program.init(0).frozen)
  assert losses(run.workdir, 'validation')[-1] < min(losses(base.workdir, 'validation'))
  with pytest.raises(
    ValueError,
    match='outside.layer_vectors cannot be merged.*--export=base writes the base without it',
  ):
    export(llm_jax.open(run.workdir), tmp_path / 'exported')


def test_an_adapted_model_is_the_same_in_every_form(runs):
  run = runs('decoder + vectors')
  params, batch = run.state.network_params, batch_of(run)
  config = run.program.config
  config = dataclasses.replace(config, model=config.model | {'unroll': 0})
  unrolled = inference.build(config, run.program.objective, run.train[0])
  looped, one_by_one = (clm(program, params, batch) for program in (run.program, unrolled))
  assert one_by_one == pytest.approx(looped, rel=1e-5)
  plain = tree.replace(params, {VECTOR: jnp.zeros_like(tree.flatten(params)[VECTOR])})
  assert abs(clm(unrolled, plain, batch) - looped) > 1e-3


def test_an_adapted_decoder_generates_with_its_adapter(runs):
  session = llm_jax.open(runs('decoder + vectors').workdir)
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


def clm(program, params, batch):
  value, weight = program.eval_step(params, batch)['clm']
  return float(value / weight)


def test_a_weight_form_stands_where_a_kernel_did(runs):
  run = runs('decoder')
  small, dense = (llm_jax.open(run.workdir) for _ in range(2))
  params, program, batch = dense.params, dense.program, batch_of(run)
  kernel = tree.flatten(params)[KERNEL]
  form = int8.quantized(kernel, program.infos[KERNEL])
  assert form.values.dtype == jnp.int8 and form.scales.shape == (2, 1, 32)
  assert 0 < np.abs(form.dense() - kernel).max() <= 0.501 * np.max(form.scales)
  small.params = tree.replace(params, {KERNEL: form})
  dense.params = tree.replace(params, {KERNEL: form.dense()})
  loss, exact = clm(program, small.params, batch), clm(program, params, batch)
  assert loss != exact and loss == pytest.approx(exact, rel=1e-2)
  assert loss == pytest.approx(clm(program, dense.params, batch), rel=1e-6)
  text = program.eval_step.lower(small.params, batch).as_text()
  arguments = text.partition('@main(')[2].partition('->')[0]
  assert 'tensor<2x16x32xi8>' in arguments and 'tensor<2x16x32xf32>' not in arguments
  asked = dict(prompts=['twenty one '], max_new_tokens=6, temperature=0)
  assert small.complete(**asked) == dense.complete(**asked) == [greedy(dense, 'twenty one ', 6)]


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
  cache = f'--config.data.cache={runs.folder / "cache"}'
  call('--config=tests/outside/config.py:tags', f'--workdir={tmp_path}', cache)
  assert equal(runs.prepared('tags', tmp_path).state, whole.state)
  said = call(f'--workdir={tmp_path}', '--mode=outside.shout', '--words=twenty two')
  (answer,) = llm_jax.open(tmp_path).predict([{'words': ['twenty', 'two']}])
  assert said.splitlines()[-1] == 'TWENTY/{} TWO/{}!'.format(*map(str.upper, answer['tags']))


def call(*arguments):
  command = [sys.executable, '-m', 'llm_jax.main', *arguments]
  env = os.environ | ENVIRONMENT
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout
