"""Given validation and test sets, whole: a run on three files, and what is measured on which."""

import csv
import json
import random
import re

import pytest

from configs import base
from llm_jax.core import config as config_lib
from llm_jax.inference import session, testing
from llm_jax.modes import eval as eval_mode
from llm_jax.programs import assemble
from llm_jax.training import corpora, logs, loop

SIZES = {'train': 60, 'dev': 13, 'test': 17}


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
  """Three tables of texts that two letters tell apart; some labels of `test` are wrong."""
  folder = tmp_path_factory.mktemp('tables')
  rng = random.Random(0)
  for name, size in SIZES.items():
    with open(folder / f'{name}.csv', 'w', newline='') as file:
      table = csv.writer(file)
      table.writerow(['words', 'kind'])
      for number in range(size):
        letter = rng.choice('ab')
        wrong = name == 'test' and number % 4 == 0
        kind = {'a': 'x', 'b': 'y'}['ba'['ab'.index(letter)] if wrong else letter]
        table.writerow([f'{name} {number} {letter * rng.randrange(5, 20)}', kind])
  return folder


def settings(tables, **changes):
  tree = base.get_config().to_dict() | dict(
    steps=99, epochs=3.0, batch_size=8, seq_len=48, log_every=50, eval_every=0
  )
  tree['tokenizer'] = dict(name='byte')
  tree['data'] |= dict(source='csv', path=str(tables / 'train.csv'), text='words', label='kind')
  tree['data'] |= dict(cache=str(tables / 'cache'), workers=1)
  tree['validation'] |= dict(path=str(tables / 'dev.csv'))
  tree['test'] |= dict(path=str(tables / 'test.csv'))
  tree['model'] = dict(name='encoder', dim=16, layers=1, heads=2, mlp_dim=32, max_len=64)
  tree['objective'] = dict(name='classify', pool='mean', packing='none', dropout=0.0)
  tree['optimizer'] = dict(name='adamw', learning_rate=1e-2, schedule='constant')
  tree['evaluation'] = dict(rows=0, samples=0)
  tree['logging'] = dict(tensorboard=False)
  return tree | changes


@pytest.fixture(scope='module')
def trained(tables, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  run = loop.prepare(config_lib.parse(settings(tables)), workdir)
  loop.train(run)
  testing.score(run)
  return run


def test_epochs_and_what_is_read(trained):
  splits = trained.data.splits
  assert [len(part) for part in (*splits.train, *splits.validation, *splits.test)] == [60, 13, 17]
  assert trained.program.config.steps == trained.step == 23  # 3 * 60 / 8, rounded up
  assert trained.epoch == trained.eval_every == 8
  lines = [line for line in logs.read(trained.workdir) if line['split'] == 'validation']
  assert [line['step'] for line in lines] == [8, 16, 23]


def test_the_test_set_is_scored_once_by_the_best_checkpoint(trained, tables, monkeypatch):
  found = json.loads((trained.workdir / testing.NUMBERS).read_text())
  assert found['step'] == trained.checkpoints.best_step()
  with open(tables / 'test.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  answers = session.open_model(trained.workdir).predict([row['words'] for row in rows])
  right = [answer['label'] == row['kind'] for answer, row in zip(answers, rows, strict=True)]
  assert found['accuracy'] == pytest.approx(sum(right) / len(right)) and 0.5 < sum(right) / 17 < 1
  lines = [json.loads(line) for line in open(trained.workdir / testing.ANSWERS)]
  for line, row, answer in zip(lines, rows, answers, strict=True):
    assert (line['text'], line['input_label']) == (row['words'], row['kind'])
    assert line['label'] == answer['label']
    assert line['probability'] == pytest.approx(answer['probability'], abs=1e-5)
  assert 'precision' in (trained.workdir / testing.REPORT).read_text()
  monkeypatch.setattr(testing.evaluation, 'scores', lambda *_: pytest.fail('scored twice'))
  testing.score(trained)


def test_eval_reads_the_given_validation_set(trained):
  numbers = eval_mode.evaluate(session.open_model(trained.workdir))
  lines = {line['step']: line for line in logs.read(trained.workdir) if 'accuracy' in line}
  assert numbers['loss'] == pytest.approx(lines[trained.checkpoints.best_step()]['loss'], rel=1e-5)


def test_without_validation_nothing_is_evaluated(tables, tmp_path, caplog):
  tree = settings(tables, validation={}, test={}, epochs=None, steps=2)
  tree['data']['validation'] = 0.0
  with caplog.at_level('INFO', logger='absl'):
    run = loop.prepare(config_lib.parse(tree), tmp_path)
    assert loop.train(run) == {}
  testing.score(run)
  said = caplog.text
  assert said.count('NO VALIDATION') == 1 and 'the newest is the best' in said
  assert not (tmp_path / testing.NUMBERS).exists()
  phases = re.search(r'has held, GiB: (.*)\.', said)[1].split(', ')
  assert [phase.split(' by ')[1] for phase in phases] == [
    'the data',
    'the steps',
    'saving',
    'the end',
  ]
  peaks = [float(phase.split(' by ')[0]) for phase in phases]
  assert peaks == sorted(peaks) and peaks[0] > 0.1
  assert {line['split'] for line in logs.read(tmp_path)} == {'train'}


def test_copies_in_the_given_sets_are_counted(tables, tmp_path, caplog):
  path = tmp_path / 'leak.csv'
  with open(tables / 'train.csv') as train, open(tables / 'dev.csv') as dev:
    path.write_text(''.join(train.readlines()[:4] + dev.readlines()[1:]))
  tree = settings(tables)
  tree['test']['path'] = str(path)
  corpora.load(config_lib.parse(tree), tmp_path)
  assert '3 of the 16 documents of config.test are among the training documents' in caplog.text


@pytest.mark.parametrize(
  'section, message',
  [
    (dict(label='kind'), 'names the documents that config.data trains on'),
    (dict(source='jsonl'), 'config.test needs path'),
    (dict(path='x.csv', txt='y'), "config.test.txt is not an option .did you mean 'text'"),
    (dict(path='nowhere.csv'), 'nowhere.csv'),
  ],
)
def test_a_section_that_is_not_possible(tables, tmp_path, section, message):
  tree = settings(tables, test=section)
  with pytest.raises((ValueError, OSError), match=message):
    loop.prepare(config_lib.parse(tree), tmp_path)


def test_what_a_section_leaves_open_is_as_in_the_data(tables):
  config = config_lib.parse(settings(tables, test=dict(source='jsonl', path='t.jsonl', label='z')))
  assert config.data['validation'] == 0  # nothing is held out where a validation set is given
  assert assemble.split_section(config, 'test') == {
    'source': 'jsonl',
    'path': 't.jsonl',
    'text': 'words',
    'label': 'z',
  }
