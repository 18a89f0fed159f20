"""Cross-validation: every document is held out once, and the report is of what was measured."""

import collections
import dataclasses
import json
import types

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import classify
from llm_jax.core import config as config_lib
from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.modes import train as train_mode
from llm_jax.objectives import classify as objective
from llm_jax.training import folds, logs, loop

TOKENIZER = byte.create()


@settings(max_examples=40, deadline=None)
@given(
  st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 20)), min_size=12, max_size=60),
  st.integers(2, 4),
)
def test_equal_documents_are_in_one_fold(documents, count):
  labels, keys = zip(*documents, strict=True)
  keys = [str(key) for key in keys]
  if len(set(keys)) < count:
    with pytest.raises(ValueError, match=f'config.folds={count} needs as many documents that have'):
      folds.assigned(labels, keys, count, 0)
    return
  found = folds.assigned(labels, keys, count, 0)
  assert set(found) <= set(range(count)) and (found == folds.assigned(labels, keys, count, 0)).all()
  where = collections.defaultdict(set)
  for key, fold in zip(keys, found, strict=True):
    where[key].add(int(fold))
  assert all(len(each) == 1 for each in where.values())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 9)), min_size=1))
def test_what_hangs_together_by_text_or_by_group(documents):
  keys, others = zip(*documents, strict=True)
  named = [None if other is None else str(other) for other in others]
  found = folds.joined(list(map(str, keys)), named)
  alike = np.equal.outer(keys, keys) | np.array(
    [[x is not None and x == y for y in others] for x in others]
  )
  for _ in documents:  # chains, by squaring
    alike = alike @ alike
  assert (np.equal.outer(found, found) == alike).all()


def test_groups_are_a_field_of_the_records(tmp_path):
  lines = ['text,label,author,kind', 'a,x,Ann,s', 'b,y,Bob,t', 'c,x,,s', 'd,y,Ann,t', 'e,x,Cid,s']
  (tmp_path / 'x.csv').write_text('\n'.join(lines))
  config = config_lib.parse(tree(tmp_path) | dict(fold_groups='author'))
  split = types.SimpleNamespace(ids=np.array([0, 1, 3, 2, 4]))
  assert folds.groups([split], config) == ['Ann', 'Bob', 'Ann', None, 'Cid']
  with pytest.raises(ValueError, match="folds=3 needs as many groups.*'kind'.*has 2 different"):
    folds.groups([split], dataclasses.replace(config, fold_groups='kind'))
  with pytest.raises(ValueError, match="config.fold_groups='editor' names a field.*editor"):
    folds.groups([split], dataclasses.replace(config, fold_groups='editor'))


def test_folds_have_the_classes_of_the_whole():
  labels = ['a'] * 80 + ['b'] * 15 + ['c'] * 5
  found = folds.assigned(labels, list(map(str, range(100))), 5, seed=3)
  for fold in range(5):
    counts = collections.Counter(x for x, f in zip(labels, found, strict=True) if f == fold)
    assert counts == {'a': 16, 'b': 3, 'c': 1}
  other = folds.assigned(labels, list(map(str, range(100))), 5, seed=4)
  assert (found != other).any()


def memory(*records):
  return Memory(records, objective.Objective.encode, TOKENIZER)


def test_what_says_the_same():
  texts = ['The cat, sat.', 'the CAT sat', 'thecatsat!', 'the cats at', 'ｔｈｅ cat sat', '!!', '?']
  keys = folds.normalized(memory(*({'text': text} for text in texts)), TOKENIZER)
  assert keys == ['thecatsat'] * 5 + ['!!', '?']
  pair = folds.normalized(memory({'text': 'A', 'pair': 'b'}, {'text': 'Ab', 'pair': ''}), TOKENIZER)
  assert len(set(pair)) == 2


def test_strata():
  labels = lambda *given: folds.strata(memory(*({'text': 'x', 'label': x} for x in given)))
  assert labels('a', 'b', 'a') == ['"a"', '"b"', '"a"']
  assert labels(['b', 'a'], ['a', 'b'])[0] == labels(['b', 'a'], ['a', 'b'])[1]
  assert labels(*map(float, range(10))) == [str(i // 2) for i in range(10)]
  assert folds.strata(memory({'text': 'x'})) == ['']


def test_a_class_with_few_documents_is_named(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'warning', lambda message, *values: lines.append(message % values))
  folds.assigned(['a'] * 9 + ['rare'], list(map(str, range(10))), 3, 0)
  assert lines == [
    'Folds: 1 classes have fewer than 3 documents, such as rare; some folds have none of them.'
  ]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(folds=1), 'config.folds=1 must be at least 2'),
    (dict(fold_groups='author'), "config.fold_groups='author' keeps documents in one fold; give"),
    (dict(fold=1), 'config.fold=1 is one of config.folds; give their number too'),
    (dict(folds=3, fold=4), 'config.fold=4 must be from 1 to 3'),
    (dict(folds=3, validation=dict(path='x.csv')), 'config.folds=3 holds out parts of'),
  ],
)
def test_wrong_options(changes, message):
  tree = classify.get_config().to_dict() | changes
  with pytest.raises(ValueError, match=message):
    config_lib.parse(tree)


def tree(folder):
  found = classify.get_config().to_dict()
  del found['pretrained']
  found |= dict(steps=8, batch_size=4, seq_len=32, log_every=4, eval_every=4, folds=3)
  found['checkpoint'] = dict(every=4, keep=1)
  found['data'] = dict(
    source='csv', path=str(folder / 'x.csv'), label='label', validation=0.3, cache=str(folder)
  )
  found['tokenizer'] = dict(name='byte')
  found['model'] |= dict(dim=16, layers=1, heads=2, mlp_dim=16, max_len=32)
  found['logging'] = dict(tensorboard=False)
  return found


@pytest.mark.slow
def test_three_runs_and_one_report(tmp_path, monkeypatch):
  rng, lines = np.random.default_rng(0), ['text,label,author']
  for index in range(60):
    word, label = (('good', 'pos'), ('bad', 'neg'))[index % 2]
    author = 'Ann' if index in (3, 40) else index
    lines.append(f'{word} {rng.integers(1000)},{label},{author}')
  lines += ['twice the same,pos,Ann', 'TWICE the same!,pos,', 'alone,third,']
  (tmp_path / 'x.csv').write_text('\n'.join(lines))
  workdir = tmp_path / 'w'
  command = types.SimpleNamespace(
    parsed=lambda: config_lib.parse(tree(tmp_path) | dict(fold_groups='author')),
    workdir=workdir,
    use_compilation_cache=lambda folder: None,
  )
  numbers = train_mode.run(command)()
  held = []
  for fold in (1, 2, 3):
    folder = folds.folder(workdir, fold)
    run = loop.prepare(
      config_lib.parse(tree(tmp_path) | dict(fold_groups='author', fold=fold)), folder
    )
    assert run.over and list(run.program.config.objective['classes']) == ['neg', 'pos', 'third']
    (train,), (validation,) = run.data.splits.train, run.data.splits.validation
    assert sorted([*train.ids, *validation.ids]) == list(range(63))
    held += validation.ids.tolist()
    assert len({index in validation.ids for index in (3, 40, 60, 61)}) == 1
    lines = [line for line in logs.read(folder) if line['split'] == 'validation']
    assert numbers[f'fold_{fold}']['accuracy'] == min(lines, key=lambda x: x['loss'])['accuracy']
  assert sorted(held) == list(range(63))
  report = json.loads((workdir / 'folds.json').read_text())
  scores = [each['accuracy'] for each in numbers.values()]
  assert report['mean']['accuracy'] == pytest.approx(np.mean(scores))
  assert report['deviation']['accuracy'] == pytest.approx(np.std(scores, ddof=1))
  assert report['folds'] == list(numbers.values())
  (line,) = (
    x for x in (workdir / 'folds.txt').read_text().splitlines() if x.split()[0] == 'accuracy'
  )
  assert line.split()[1:] == [
    f'{x:.4f}' for x in (np.mean(scores), np.std(scores, ddof=1), *scores)
  ]
  before = {path: path.stat().st_mtime for path in workdir.rglob('checkpoints/*')}
  assert train_mode.run(command)() == numbers  # nothing is trained again
  assert {path: path.stat().st_mtime for path in workdir.rglob('checkpoints/*')} == before
