"""A run with a teacher: what it learns, what its checkpoints hold, which teachers it refuses."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import llm_jax
from configs import classify, gpt_tiny
from llm_jax.core import config as config_lib
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.programs import checkpoints, reference, teachers, workdir
from llm_jax.training import loop, step

pytestmark = pytest.mark.slow
SHAPE = dict(dim=16, heads=2, mlp_dim=32, max_len=32, dropout=0.0, attention_dropout=0.0)
KINDS = {
  'encoder': (classify, dict(name='encoder', variant='bert_base')),
  'decoder': (gpt_tiny, dict(name='decoder', variant='gpt2_small')),
}
INSIDE = dict(hidden=1.0, relations=1.0, relation_heads=2)


def settings(kind, folder, layers, labels='ab', **changes):
  records = [
    {'text': f'{"one two" if i % 2 else "x y z"} {i}', 'label': labels[i % 2]} for i in range(40)
  ]
  (folder / 'data.jsonl').write_text('\n'.join(map(json.dumps, records)))
  config, model = KINDS[kind]
  found = config.get_config().to_dict()
  found.pop('pretrained', None)
  found['data'] = dict(source='jsonl', path=str(folder / 'data.jsonl'), validation=0.2)
  found['data'] |= dict(cache=str(folder / 'cache'), workers=1)
  if kind == 'encoder':
    found['data'] |= dict(label='label')
    found['objective'] |= dict(pool='cls')
  found['tokenizer'] = dict(name='byte')
  found['model'] = model | dict(remat='none', layers=layers, **SHAPE)
  found['optimizer'] = dict(name='adamw', learning_rate=0.02)
  found |= dict(steps=6, batch_size=4, seq_len=32, log_every=2, eval_every=6)
  found['evaluation'] = dict(samples=0)
  found['checkpoint'] = dict(every=3, keep=2)
  found['logging'] = dict(tensorboard=False)
  return found | changes


def prepared(given, workdir):
  return loop.prepare(config_lib.parse(given), workdir)


@pytest.fixture(scope='module', params=KINDS)
def taught(request, tmp_path_factory):
  """The kind, a folder, and the workdir of a teacher in it."""
  folder = tmp_path_factory.mktemp(request.param)
  loop.train(prepared(settings(request.param, folder, 2), folder / 'teacher'))
  return request.param, folder, folder / 'teacher'


def bits(x):
  return jax.tree.map(lambda leaf: (str(leaf.dtype), np.asarray(leaf).tobytes()), x)


def batch_of(run):
  rows = [run.train[i] for i in range(4)]
  return run.program.put({key: np.stack([row[key] for row in rows]) for key in rows[0]})


def gradient(run, count=1):
  program, state = run.program, run.state
  return jax.jit(
    lambda params, batch: step.gradient(
      params, batch, None, network=program.network, frozen=state.frozen, micro_batches=count
    )
  )(state.params, batch_of(run))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(taught, tmp_path, monkeypatch):
  kind, folder, teacher = taught
  distill = dict(hard=0.0, **INSIDE)
  given = settings(kind, folder, 2, teacher=str(teacher), init_from=str(teacher), distill=distill)
  with pytest.raises(ValueError, match='has nothing to teach by soft: it is .*the student itself'):
    prepared(given, tmp_path / 'refused')
  monkeypatch.setattr(teachers, 'check_teaches', lambda *given: None)
  run = prepared(given, tmp_path / 'run')
  grads, metrics = gradient(run)
  for name in ('soft', 'hidden', 'relations'):
    value, weight = metrics[name]
    assert weight > 0 and abs(float(value / weight)) < 1e-5, name
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(grads))
  assert largest < 1e-4, largest  # the square root of the rounding of a sum of squares


def test_a_student_learns_and_its_checkpoints_do_not_hold_the_teacher(taught, tmp_path):
  kind, folder, teacher = taught
  given = settings(kind, folder, 1, teacher=str(teacher), distill=INSIDE)
  run = prepared(given, tmp_path / 'run')
  frozen = tree.flatten(run.state.frozen)
  assert frozen and all(path.startswith(teachers.PREFIX) for path in frozen)
  whole, parts = gradient(run), gradient(run, 2)
  for ours, theirs in zip(*(jax.tree.leaves(x[0]) for x in (whole, parts)), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(whole[0]))
  first = bits(run.state.frozen)
  loop.train(run)
  assert bits(run.state.frozen) == first
  held = checkpoints.restore_params(tmp_path / 'run' / 'checkpoints', run.program.params)
  assert not any(path.startswith(teachers.PREFIX) for path in held.params)
  # It answers alone, and goes on to the bit, also where the teacher has moved.
  session = llm_jax.open(tmp_path / 'run')
  assert not any(path.startswith(teachers.PREFIX) for path in tree.paths(session.params))
  assert session.complete(['x'], max_new_tokens=2) if session.causal else session.predict(['x'])
  shutil.copytree(tmp_path / 'run', tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '6')
  again = prepared(given, tmp_path / 'again')
  assert again.step == 3
  loop.train(again)
  assert bits(again.state) == bits(run.state)


def test_answers_that_are_kept_teach_the_same(taught, tmp_path, monkeypatch):
  kind, folder, teacher = taught
  given = settings(kind, folder, 1, teacher=str(teacher), distill=dict(cached=True))
  if kind == 'decoder':
    with pytest.raises(ValueError, match='keeps one answer for each text'):
      prepared(given, tmp_path / 'run')
    return
  beside = prepared(given | dict(distill={}), tmp_path / 'beside')
  run = prepared(given, tmp_path / 'run')
  assert not tree.flatten(run.state.frozen) and tree.flatten(beside.state.frozen)
  (ours, metrics), (theirs, others) = gradient(run), gradient(beside)
  assert float(metrics['soft'][0]) == pytest.approx(float(others['soft'][0]), rel=1e-5)
  for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(mine, other, atol=1e-6)
  loop.train(run)
  # It is not asked again, and the run goes on to the bit.
  monkeypatch.setattr(reference, '_scores', lambda *given: pytest.fail('asked again'))
  shutil.copytree(tmp_path / 'run', tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '6')
  again = prepared(given, tmp_path / 'again')
  assert again.step == 3
  loop.train(again)
  assert bits(again.state) == bits(run.state)
  # Another teacher would say something else.
  monkeypatch.undo()
  other = settings(kind, folder, 2, seed=1)
  loop.train(prepared(other, tmp_path / 'other'))
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '6')
  with pytest.raises(ValueError, match='not the teacher that this run began with'):
    prepared(given | dict(teacher=str(tmp_path / 'other')), tmp_path / 'again')


def test_a_teacher_in_8_bits(taught, tmp_path):
  kind, folder, teacher = taught
  distill = dict(weights='int8')
  run = prepared(settings(kind, folder, 1, teacher=str(teacher), distill=distill), tmp_path / 'run')
  forms = {p: x for p, x in params_lib.leaves(run.state.frozen).items() if params_lib.is_form(x)}
  assert forms and all(x.values.dtype == np.int8 for x in forms.values())
  grads, metrics = gradient(run)
  assert float(metrics['soft'][0]) > 0 and np.isfinite(float(metrics['loss'][0]))


def test_what_is_no_teacher_is_refused(taught, tmp_path):
  kind, folder, teacher = taught
  refused = lambda words, **changes: _refused((kind, folder, teacher), tmp_path, words, changes)
  refused('nothing is learned from', distill=dict(soft=0.0))
  refused('temperature=0.0 must be above 0', distill=dict(temperature=0.0))
  refused("hidden_loss='l2' is not known", distill=dict(hidden_loss='l2'))
  refused("weights='int3' is not known", distill=dict(weights='int3'))
  refused('must divide the 16', distill=dict(relations=1.0, relation_heads=3))
  refused('one of the 2 layers', distill=dict(relations=1.0, relation_layer=3))
  refused('neither of a run nor of a Hugging Face', teacher=str(tmp_path))
  refused('another tokenizer', tokenizer=dict(name='byte', sentinels=3))
  other = dict(name='mlm') if kind == 'encoder' else dict(name='prefix_lm')
  if kind == 'encoder':
    refused('learned the objective classify', objective=other)
    other = tmp_path / 'other'
    other.mkdir()
    given = settings(kind, other, 1, 'xy', teacher=str(teacher))
    with pytest.raises(ValueError, match='other labels than the student: a, b, x, y'):
      prepared(given, tmp_path / 'run')


def _refused(taught, tmp_path, words, changes):
  kind, folder, teacher = taught
  given = settings(kind, folder, 1, **{'teacher': str(teacher)} | changes)
  with pytest.raises(ValueError, match=words):
    prepared(given, pathlib.Path(tmp_path) / 'run')


def test_labels_are_matched_by_name(tmp_path):
  """A teacher with the same classes in another order teaches the same."""
  found = []
  for order in (('a', 'b', 'c'), ('c', 'a', 'b')):
    folder = tmp_path / order[0]
    folder.mkdir()
    given = settings('encoder', folder, 1, 'ab')
    given['objective'] |= dict(classes=order)
    run = prepared(given, folder / 'teacher')
    leaves = tree.flatten(run.state.params)
    drawn = np.random.default_rng(0)
    named = {name: drawn.normal(size=16).astype(np.float32) for name in 'abc'}
    for path, leaf in leaves.items():
      if path == 'heads_classifier/dense/kernel':
        leaves[path] = np.stack([named[name] for name in order], -1)
      elif not path.startswith('heads_classifier'):
        leaves[path] = drawn.normal(0.5, 0.3, leaf.shape).astype(np.float32)
    run.state = run.state.replace(
      params=tree.nest({p: jax.numpy.asarray(x) for p, x in leaves.items()})
    )
    run.checkpoints.save(
      1, run.state, 0, loop._meta(run) if (folder / 'teacher' / 'tokenizer').exists() else {}
    )
    run.checkpoints.close()
    workdir.write_config(folder / 'teacher', run.program.config)
    workdir.leave(folder / 'teacher')
    student = settings('encoder', folder, 1, 'ab', teacher=str(folder / 'teacher'))
    student['objective'] |= dict(classes=('a', 'b', 'c'))
    made = prepared(student, folder / 'student')
    found.append(float(gradient(made)[1]['soft'][0]))
    workdir.leave(folder / 'student')
  assert found[0] > 0 and found[0] == pytest.approx(found[1], rel=1e-5)
