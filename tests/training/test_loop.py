"""Whole runs of tiny models through the command line's own path: learning, resuming, refusing,
early stopping, fine-tuning.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import config_dict

from configs import base
from llm_jax.core import config as config_lib
from llm_jax.inference import prediction, session
from llm_jax.inference.samples import Samples
from llm_jax.modes import eval as eval_mode
from llm_jax.modes import predict as predict_mode
from llm_jax.parallel import chips
from llm_jax.programs import workdir as workdir_lib
from llm_jax.programs.checkpoints import Checkpoints
from llm_jax.programs.inference import Inference
from llm_jax.training import logs, loop, meter

ROOT = pathlib.Path(__file__).parents[2]
TIMINGS = ('tokens_per_second', 'seconds_per_step', 'model_flops_utilization')
SHAPE = dict(dim=32, layers=1, heads=2, mlp_dim=64, max_len=64)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Two folders of text with rules to learn: counting up, and the alphabet; and labelled lines that
  tell them apart.
  """
  folder = tmp_path_factory.mktemp('corpus')
  rng = random.Random(0)
  counts = [
    ' '.join(str(n) for n in range(start, start + rng.randrange(4, 30))) for start in range(400)
  ]
  letters = [
    'abcdefghijklmnopqrstuvwxyz'[rng.randrange(20) :][: rng.randrange(4, 26)] * 2
    for _ in range(400)
  ]
  (folder / 'counts.txt').write_text('\n'.join(counts))
  (folder / 'letters.txt').write_text('\n'.join(f'{i} {line}' for i, line in enumerate(letters)))
  with open(folder / 'labelled.jsonl', 'w') as file:
    for number, (count, letter) in enumerate(zip(counts, letters, strict=True)):
      half = ['first', 'second'][number // 200]
      for text, kind in ((count, 'count'), (letter, 'letter')):
        record = {'text': f'{number} {text}', 'kind': kind, 'half': half}
        file.write(json.dumps(record) + '\n')
  return folder


def settings(corpus, objective='mlm', **changes):
  """A config tree: packed masked LM over a mixture, or causal LM, or classification."""
  tree = base.get_config().to_dict() | dict(
    steps=10, batch_size=8, seq_len=48, log_every=2, eval_every=5
  )
  tree['tokenizer'] = dict(name='byte')
  tree['data'] = dict(
    source='mixture',
    validation=0.1,
    cache=str(corpus / 'cache'),
    parts={
      name: dict(source='text', path=str(corpus / f'{name}.txt'), unit='line', weight=weight)
      for name, weight in (('counts', 0.7), ('letters', 0.3))
    },
  )
  tree['model'] = dict(name='encoder', variant='bert_tiny', **SHAPE)
  tree['objective'] = config_dict.ConfigDict(base.mlm()).to_dict()
  if objective == 'clm':
    tree['data'] = tree['data']['parts']['letters'] | dict(
      validation=0.1, cache=str(corpus / 'cache')
    )
    del tree['data']['weight']
    tree['model'] = dict(name='decoder', variant='gpt_tiny', dropout=0.1, **SHAPE)
    tree['objective'] = dict(name='clm', packing='windows')
  if objective == 'classify':
    tree['data'] = dict(
      source='jsonl',
      path=str(corpus / 'labelled.jsonl'),
      label='kind',
      validation=0.2,
      cache=str(corpus / 'cache'),
    )
    tree['objective'] = dict(name='classify')
  tree['evaluation'] = dict(rows=32, samples=0)
  tree['checkpoint'] = dict(every=3, keep=2)
  tree['logging'] = dict(tensorboard=False)
  return tree | changes


def start(tree, workdir):
  return loop.prepare(config_lib.parse(tree), workdir)


def run(tree, workdir):
  started = start(tree, workdir)
  loop.train(started, [Samples.of])
  return started


def numbers(workdir):
  return [{k: v for k, v in line.items() if k not in TIMINGS} for line in logs.read(workdir)]


def final_state(workdir, step):
  with ocp.PyTreeCheckpointer() as reader:
    return jax.tree.map(np.asarray, reader.restore(workdir / 'checkpoints' / str(step) / 'state'))


def assert_same_run(a, b, step):
  assert numbers(a) == numbers(b)
  same = jax.tree.map(
    lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(),
    final_state(a, step),
    final_state(b, step),
  )
  assert all(jax.tree.leaves(same))


CHILD = """
import json, pathlib, sys
from llm_jax.core import config as config_lib
from llm_jax.training import loop
config = config_lib.parse(json.loads(sys.argv[1]))
loop.train(loop.prepare(config, pathlib.Path(sys.argv[2])))
"""


def child(tree, workdir):
  return subprocess.Popen(
    [sys.executable, '-c', CHILD, json.dumps(tree), str(workdir)],
    cwd=ROOT,
    text=True,
    stderr=subprocess.PIPE,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['mlm', 'clm'])
def test_killed_at_any_step_it_ends_as_if_undisturbed(corpus, tmp_path, objective):
  tree = settings(corpus, objective, steps=40, log_every=1, eval_every=7)
  undisturbed, killed = child(tree, tmp_path / 'a'), child(tree, tmp_path / 'b')
  seen, last = tmp_path / 'b' / 'metrics.jsonl', random.Random(objective).randrange(9, 35)
  while not seen.exists() or seen.read_text().count('"train"') < last:
    assert killed.poll() is None, killed.stderr.read()
    time.sleep(0.002)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  assert undisturbed.wait() == 0, undisturbed.stderr.read()
  resumed = child(tree, tmp_path / 'b')
  assert resumed.wait() == 0, resumed.stderr.read()
  assert_same_run(tmp_path / 'a', tmp_path / 'b', 40)
  other = child(
    settings(corpus, objective, steps=40, log_every=1, eval_every=7, seed=1), tmp_path / 'c'
  )
  assert other.wait() == 0 and numbers(tmp_path / 'c') != numbers(tmp_path / 'a')


def test_a_run_learns_says_what_it_does_and_is_whole(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(chips, 'peak_flops', lambda kind: 1e15)
  tree = settings(
    corpus,
    steps=60,
    log_every=20,
    eval_every=30,
    optimizer=dict(name='adamw', learning_rate=3e-3, warmup_fraction=0.1),
  )
  started = run(tree, tmp_path)
  lines = logs.read(tmp_path)
  assert [(line['step'], line['split']) for line in lines] == [
    (20, 'train'),
    (30, 'validation'),
    (40, 'train'),
    (60, 'train'),
    (60, 'validation'),
  ]
  first, last = (line for line in lines if line['split'] == 'validation')
  assert last['loss'] < first['loss'] < np.log(263) and last['unigram_loss'] == first[
    'unigram_loss'
  ] < np.log(263)
  assert lines[0]['tokens_per_second'] > 0 and 0 < lines[0]['model_flops_utilization'] < 1
  assert {p.name for p in tmp_path.iterdir()} == {
    'config.json',
    'data.json',
    'tokenizer',
    'checkpoints',
    'metrics.jsonl',
    'loss.png',
    'report.html',
    '.owner',
  }
  assert workdir_lib.read_config(tmp_path) == config_lib.from_json(
    config_lib.to_json(started.program.config)
  )
  values = eval_mode.evaluate(session.open_model(tmp_path), tmp_path)
  assert values['loss'] == pytest.approx(last['loss'], abs=1e-6)
  assert json.loads((tmp_path / 'eval.json').read_text()).items() >= values.items()
  assert float(started.state.step) == 60 and started.position == 60 * 8


@pytest.mark.slow
def test_longer_runs_go_on_and_other_runs_are_refused(corpus, tmp_path):
  tree = settings(corpus, 'clm', steps=3)
  run(tree, tmp_path)
  assert (
    run(settings(corpus, 'clm', steps=5, log_every=1, batch_size=4), tmp_path).position
    == 3 * 8 + 2 * 4
  )
  assert [line['step'] for line in logs.read(tmp_path) if line['split'] == 'train'] == [2, 3, 4, 5]
  changed = settings(corpus, 'clm', model=tree['model'] | {'dim': 64}, seq_len=32, steps=5)
  with pytest.raises(
    ValueError,
    match=r'(?s)holds a run of another config:\n  model\.dim: 32 -> 64\n  seq_len: 48 -> 32\n',
  ):
    run(changed, tmp_path)
  (tmp_path / 'tokenizer').rename(tmp_path / 'lost')
  (tmp_path / 'config.json').unlink()
  with pytest.raises(ValueError, match='holds a run of another config'):
    run(changed, tmp_path)
  assert run(settings(corpus, 'clm', steps=6), tmp_path).state.step == 6  # the checkpoint has both
  assert (tmp_path / 'tokenizer').is_dir()


@pytest.mark.slow
def test_other_documents_are_refused(corpus, tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text((corpus / 'letters.txt').read_text())
  tree = settings(corpus, 'clm', steps=2)
  tree['data'] = tree['data'] | dict(path=str(path))
  run(tree, tmp_path / 'w')
  os.utime(path, (0, 0))  # a copy of the same text is the same documents
  assert run(tree | dict(steps=3), tmp_path / 'w').state.step == 3
  (tmp_path / 'moved').mkdir()
  path = path.rename(tmp_path / 'moved' / 'renamed.txt')
  tree['data'] = tree['data'] | dict(path=str(path))
  assert run(tree | dict(steps=4), tmp_path / 'w').state.step == 4
  path.write_text((corpus / 'letters.txt').read_text() + '\none more line')
  with pytest.raises(ValueError, match='documents of config.data have changed'):
    run(tree | dict(steps=5), tmp_path / 'w')


@pytest.mark.slow
def test_stops_early_and_keeps_the_best(corpus, tmp_path):
  tree = settings(
    corpus,
    steps=30,
    eval_every=2,
    optimizer=dict(name='sgd', learning_rate=1e-12, warmup_fraction=0.0),
    evaluation=dict(rows=16, patience=2),
  )
  started = run(tree, tmp_path)
  assert started.patience.over and int(started.state.step) < 30
  assert run(tree, tmp_path).state.step == started.state.step  # over is over
  best = min(
    (line for line in logs.read(tmp_path) if line['split'] == 'validation'),
    key=lambda line: line['loss'],
  )
  assert started.checkpoints.best_step() == best['step']


@pytest.mark.slow
def test_the_thread_that_makes_batches_ends_with_the_run_and_its_errors_end_it(
  corpus, tmp_path, monkeypatch
):
  running = lambda: [
    thread.name for thread in threading.enumerate() if thread.name.startswith('batches')
  ]
  tree, seen = settings(corpus, 'clm', steps=4, eval_every=100), []
  monkeypatch.setattr(meter.Meter, 'dispatched', lambda *_: seen.extend(running()))
  saved = run(tree, tmp_path / 'a')
  assert seen and not running()
  assert (
    saved.position == saved.checkpoints.restore(saved.program.state).position == 4 * 8
  )  # not what was made ahead
  puts, put = [], Inference.put

  def failing(program, batch):
    puts.append(threading.current_thread().name)
    if len(puts) == 4:
      raise OSError('the disk is gone')
    return put(program, batch)

  monkeypatch.setattr(Inference, 'put', failing)
  with pytest.raises(OSError, match='the disk is gone'):
    run(tree, tmp_path / 'b')
  assert not running() and all(name.startswith('batches') for name in puts)


@pytest.mark.slow
def test_a_profile_is_whole_names_the_parts_of_the_model_and_changes_no_number(corpus, tmp_path):
  tree = settings(corpus, steps=6, eval_every=6)
  run(tree, tmp_path / 'plain')
  run(tree | dict(profile=dict(start=2, steps=3)), tmp_path / 'traced')
  assert_same_run(tmp_path / 'plain', tmp_path / 'traced', 6)
  assert not (tmp_path / 'plain' / 'profile').exists()
  (folder,) = (tmp_path / 'traced' / 'profile' / 'plugins' / 'profile').iterdir()
  with gzip.open(folder / 'perfetto_trace.json.gz') as file:
    events = json.load(file)['traceEvents']
  steps = {event['args']['step_num'] for event in events if event.get('name') == 'train'}
  assert {int(step) for step in steps} == {3, 4, 5} and all(
    e['dur'] >= 0 for e in events if e.get('ph') == 'X'
  )
  (path,) = folder.glob('*.xplane.pb')
  planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes}
  assert any(
    event.name.startswith('dot') for line in planes['/host:CPU'].lines for event in line.events
  )
  scopes = ('embedder', 'attention', 'mlp', 'objective', 'optimizer')
  for text in (path.read_bytes(), compiled_text(tree, tmp_path / 'plain').encode()):
    assert [
      scope for scope in scopes if not re.search(rb'wrapped[^"]*/%s/' % scope.encode(), text)
    ] == []


def compiled_text(tree, workdir):
  program = start(tree, workdir).program
  return program.train_step.lower(program.state, program.batch).compile().as_text()


@pytest.mark.slow
def test_a_decoder_shows_what_it_writes_and_learns_no_less(corpus, tmp_path):
  for name, samples in (('shown', 2), ('quiet', 0)):
    run(
      settings(corpus, 'clm', steps=4, eval_every=2, evaluation=dict(rows=8, samples=samples)),
      tmp_path / name,
    )
  assert_same_run(tmp_path / 'shown', tmp_path / 'quiet', 4)
  text = (tmp_path / 'shown' / 'samples.txt').read_text()
  step, *shown = re.sub(r'\n {4,}', ' ', text).splitlines()  # of texts of several lines
  assert step == 'step 2' and shown[2] == 'step 4' and len(shown) == 5
  assert shown[0].startswith('   -> ') and shown[0] != shown[3]
  assert shown[1].split(' -> ')[0] == shown[4].split(' -> ')[0] != '  '
  assert not (tmp_path / 'quiet' / 'samples.txt').exists()


@pytest.mark.slow
def test_fine_tuning_takes_the_weights_and_predicts(corpus, tmp_path, monkeypatch):
  run(settings(corpus, steps=2), tmp_path / 'pretrained')
  tree = settings(
    corpus,
    'classify',
    steps=25,
    init_from=str(tmp_path / 'pretrained'),
    eval_every=25,
    evaluation=dict(rows=0, slices=('half',)),
    tokenizer=dict(
      name='sentencepiece', vocab_size=999
    ),  # not used: the tokenizer comes along with the weights
    optimizer=dict(name='adamw', learning_rate=3e-3, warmup_fraction=0.1),
  )
  started = start(tree, _made(tmp_path / 'w'))
  taken = final_state(tmp_path / 'pretrained', 2)['params']['model']
  for a, b in zip(
    jax.tree.leaves(started.state.params['model']), jax.tree.leaves(taken), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  loop.train(started)
  scores = logs.read(tmp_path / 'w')[-1]
  assert scores['accuracy'] > 0.9 and scores['macro_f1'] > 0.9 and scores['mcc'] > 0.8
  report = (tmp_path / 'w' / 'report.txt').read_text()
  assert 'letter' in report and re.search(r' first +\d+ texts', report)
  page = (tmp_path / 'w' / 'report.html').read_text()
  assert page.count('data:image/png') == 2 and ' second ' in page and 'half_accuracy_gap' in page

  lines = [
    {'text': '5 6 7 8 9 10', 'id': 1},
    {'text': 'abcdefg', 'label': 'mine', 'id': 2},
    {'text': 'x' * 500, 'id': 3},
  ] * 4
  spaced = [
    json.dumps(line).replace(', ', ',\r') for line in lines
  ]  # a carriage return is space in JSON, and ends no line
  (tmp_path / 'x.jsonl').write_bytes('\n'.join(spaced).encode())
  predict_mode.predict(
    session.open_model(tmp_path / 'w'), tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  )
  answers = [json.loads(line) for line in (tmp_path / 'y.jsonl').read_text().splitlines()]
  assert [a['id'] for a in answers] == [1, 2, 3] * 4 and [a['label'] for a in answers[:2]] == [
    'count',
    'letter',
  ]
  assert (
    answers[1]['input_label'] == 'mine'
    and answers[0]['probabilities']['count'] == answers[0]['probability'] > 0.5
  )
  assert answers[3:6] == answers[:3]
  _assert_packing_changes_no_answer(tmp_path, monkeypatch)


def _assert_packing_changes_no_answer(workdir, monkeypatch):
  """A file of texts of many lengths, packed in blocks, is answered line by line as the same texts
  are with a row for each.
  """
  rng, opened, answers = random.Random(1), session.open_model(workdir / 'w'), {}
  texts = [
    ''.join(rng.choices(rng.choice(('0123456789 ', 'abcdefghij')), k=rng.randrange(60)))
    for _ in range(75)
  ]
  (workdir / 'many.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  monkeypatch.setattr(prediction, 'LEAST_BLOCK', 30)
  monkeypatch.setattr(prediction, 'BLOCK_BATCHES', 1)
  for packing in ('best_fit', 'none'):
    config = dataclasses.replace(
      opened.config, objective=opened.config.objective | {'packing': packing}
    )
    packed_so = session.Session(opened.origin, config, opened.tokenizer)
    predict_mode.predict(packed_so, workdir / 'many.jsonl', workdir / 'answers.jsonl')
    answers[packing] = [
      json.loads(line) for line in (workdir / 'answers.jsonl').read_text().splitlines()
    ]
  assert [answer['text'] for answer in answers['best_fit']] == texts
  packed, alone = (
    [answer['probabilities']['count'] for answer in answers[packing]]
    for packing in ('best_fit', 'none')
  )
  np.testing.assert_allclose(packed, alone, atol=1e-5)
  assert (
    np.mean(np.abs(np.subtract(packed, alone[1:] + alone[:1])) > 0.1) > 0.2
  )  # another order would be seen


@pytest.mark.slow
def test_a_mixture_of_labelled_and_unlabelled_learns_both(corpus, tmp_path):
  tree = settings(corpus, steps=4, eval_every=4)
  tree['data']['parts'] = {
    'labelled': dict(source='jsonl', path=str(corpus / 'labelled.jsonl'), label='kind', weight=0.5),
    'plain': dict(source='text', path=str(corpus / 'counts.txt'), unit='line', weight=0.5),
  }
  tree['objective'] = dict(
    name='mix',
    rows='classify',
    weights=dict(mlm=1.0, classify=0.5),
    parts=dict(mlm=dict(mask_rate=0.15), classify=dict(unlabelled='ignore')),
  )
  started = run(tree, tmp_path)
  assert started.program.config.objective['parts']['classify']['classes'] == ('count', 'letter')
  last = logs.read(tmp_path)[-1]
  assert (
    last['loss'] == pytest.approx(last['mlm'] + 0.5 * last['classify'], rel=1e-5)
    and 0 <= last['accuracy'] <= 1
  )
  (tmp_path / 'x.jsonl').write_text('{"text": "1 2 3"}')
  predict_mode.predict(session.open_model(tmp_path), tmp_path / 'x.jsonl', tmp_path / 'y.jsonl')
  assert set(json.loads((tmp_path / 'y.jsonl').read_text())) == {
    'text',
    'label',
    'probability',
    'probabilities',
    'entropy',
    'margin',
  }


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(corpus, tmp_path):
  tree = settings(
    corpus,
    'clm',
    steps=30,
    optimizer=dict(name='sgd', learning_rate=1e30, warmup_fraction=0.0, clip_norm=0.0),
  )
  with pytest.raises(FloatingPointError, match=r'the loss of step \d+ is (nan|inf).*learning_rate'):
    run(tree, tmp_path)


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_not_saved(corpus, tmp_path):
  tree = settings(corpus, 'clm', steps=1)
  rate = dict(name='sgd', learning_rate=1e39, warmup_fraction=0.0, clip_norm=0.0)
  with pytest.raises(FloatingPointError, match='after step 1 .*no longer finite.*none yet'):
    run(tree | dict(optimizer=rate), tmp_path)
  assert not workdir_lib.has_checkpoints(tmp_path)
  # What an earlier revision saved is not gone on from.
  started = run(tree, tmp_path)
  broken = jax.tree.map(lambda x: x * jnp.nan, started.state.params)
  saved = Checkpoints(tmp_path / 'checkpoints', 2)
  saved.save(2, started.state.replace(params=broken, step=jnp.int32(2)), 16, loop._meta(started))
  saved.close()
  with pytest.raises(ValueError, match='checkpoints/2 holds numbers that are not finite; remove'):
    run(tree | dict(steps=3), tmp_path)


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    (
      dict(objective=dict(name='mlm')),
      ValueError,
      'objective mlm needs a model that sees both sides',
    ),
    (
      dict(model=dict(name='encoder', variant='bert_tiny')),
      ValueError,
      'objective clm needs a causal model',
    ),
    (
      dict(evaluation=dict(patience=2), evaluators=dict(classification={})),
      ValueError,
      'patience=2 waits for a better loss, which none of the evaluators classification gives',
    ),
    (
      dict(data=dict(path='gs://bucket/x.txt')),
      ValueError,
      'config.data.path=gs://bucket/x.txt is an address.*mount it',
    ),
    (
      dict(batch_size=7, micro_batches=2),
      ValueError,
      r'batch_size=7 must divide by micro_batches=2; try 8\.',
    ),
    (dict(batch_size=10_000), ValueError, r'rows of seq_len=48.*batch_size=10000'),
    (dict(data=dict(path='/nowhere/*.txt')), ValueError, r'/nowhere/\*\.txt'),
    (dict(data=dict(validation=0.999)), ValueError, r'batch_size=8|documents .* for training'),
    (dict(seq_len=65), ValueError, r'65.*64'),
    (dict(model=dict(heads=3)), ValueError, r'heads=3 must divide dim=32'),
    (
      dict(model=dict(variant='gpt_tine')),
      ValueError,
      r"variant='gpt_tine' is not known \(did you mean 'gpt_tiny'\?\)",
    ),
    (
      dict(model=dict(vocab_size=100)),
      ValueError,
      r"vocab_size=100 is smaller than the tokenizer's 263",
    ),
    (dict(mesh=dict(data=3)), ValueError, r'wants 3 devices; there are 1'),
    (
      dict(optimizer=dict(warmup_steps=50, warmup_fraction=None)),
      ValueError,
      r'warmup_steps=50 is more than config.steps=10',
    ),
    (
      dict(tokenizer=dict(name='sentencepiece', path=__file__)),
      ValueError,
      r'(?i)not a SentencePiece model',
    ),
    (
      dict(init_from='/nowhere'),
      ValueError,
      r'/nowhere is the folder neither of a run nor of a Hugging Face model',
    ),
  ],
)
def test_what_cannot_be_is_said_before_anything_is_compiled(
  corpus, tmp_path, monkeypatch, changes, error, message
):
  tree = settings(corpus, 'clm')
  for key, value in changes.items():
    merged = isinstance(value, dict) and key != 'tokenizer'
    tree[key] = tree.get(key, {}) | value if merged else value
  monkeypatch.setattr(
    jax, 'jit', lambda *a, **k: lambda *a, **k: pytest.fail('something was compiled')
  )
  with pytest.raises(error, match=message):
    run(tree, tmp_path)


def test_labels_that_cannot_be_are_named(corpus, tmp_path):
  tree = settings(corpus, 'classify')
  data = [{'text': f'{i} a', 'kind': 'a' if i % 2 else 'b'} for i in range(60)]
  for bad, message in ((None, r'x.jsonl:61 has no label; give it one'), ({'x': 1}, 'kind')):
    (tmp_path / 'x.jsonl').write_text(
      '\n'.join(map(json.dumps, [*data, {'text': 'z', 'kind': bad}]))
    )
    with pytest.raises(ValueError, match=message):
      run(tree | dict(data=tree['data'] | dict(path=str(tmp_path / 'x.jsonl'))), tmp_path / 'w')
  data += [{'text': f'only {i}', 'kind': f'c{i}'} for i in range(40)]
  (tmp_path / 'y.jsonl').write_text('\n'.join(map(json.dumps, data)))
  with pytest.raises(
    ValueError,
    match=r"y.jsonl:\d+ has the label 'c\d+'; it must be one of the \d+ classes of the training",
  ):
    run(tree | dict(data=tree['data'] | dict(path=str(tmp_path / 'y.jsonl'))), tmp_path / 'w')


def test_a_workdir_that_cannot_be_written_to(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'--workdir=.*/file/w cannot be written to'):
    workdir_lib.open_workdir(tmp_path / 'file' / 'w')


def test_patience_counts_evaluations_without_a_better_loss():
  patience = loop.Patience(2)
  assert [patience.better(v) for v in (3.0, 2.0, 2.0, float('nan'))] == [True, True, False, False]
  assert (
    patience.over
    and not dataclasses.replace(patience, limit=0).over
    and not dataclasses.replace(patience, limit=3).over
  )


def _made(folder):
  folder.mkdir()
  return folder
