"""Runs that answer together, and runs that become one: the means of NumPy, from files to files."""

import csv
import dataclasses
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics

import llm_jax
from configs import classify
from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.inference import ensembles
from llm_jax.inference.export import export
from llm_jax.inference.selection import Selection
from llm_jax.modes import _command
from llm_jax.modes import eval as eval_mode
from llm_jax.modes import predict as predict_mode
from llm_jax.objectives import choice as choice_lib
from llm_jax.objectives import classify as classify_lib
from llm_jax.training import loop

SHAPE = dict(dim=16, layers=1, heads=2, mlp_dim=24, max_len=32, dropout=0.0, attention_dropout=0.0)
KINDS = {'one': {}, 'two': dict(seed=1), 'wide': dict(model=dict(dim=24))}


def texts():
  rng = np.random.default_rng(0)
  return [' '.join(rng.choice(list('abcdefgh'), rng.integers(2, 8))) for _ in range(24)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  records = [{'text': f'{text} {i}', 'label': 'abd'[i % 3]} for i, text in enumerate(texts())]
  (folder / 'data.jsonl').write_text('\n'.join(map(json.dumps, records)))
  made = {}
  for name, own in KINDS.items():
    settings = classify.get_config().to_dict()
    del settings['pretrained']
    settings['data'] = dict(source='jsonl', path=str(folder / 'data.jsonl'), label='label')
    settings['data'] |= dict(validation=0.0, cache=str(folder / 'cache'), workers=1)
    settings['tokenizer'] = dict(name='byte')
    settings['model'] = dict(name='encoder', variant='bert_base', remat='none', **SHAPE)
    settings['optimizer'] = dict(
      name='adamw', learning_rate=0.1, schedule='constant', warmup_fraction=0.0
    )
    settings |= dict(steps=3, batch_size=4, seq_len=32, log_every=3)
    settings['logging'] = dict(tensorboard=False)
    settings['objective'] |= dict(pool='cls', classes=('d', 'a', 'b'))
    for section, options in own.items():
      settings[section] = settings[section] | options if isinstance(options, dict) else options
    made[name] = folder / name
    loop.train(loop.prepare(config_lib.parse(settings), made[name]))
  made['others'] = folder / 'others'  # one whose classes have another order
  shutil.copytree(made['one'], made['others'])
  config = json.loads((made['one'] / 'config.json').read_text())
  config['objective']['classes'] = ['a', 'b', 'd']
  (made['others'] / 'config.json').write_text(json.dumps(config))
  return made


def member(name, predictor, said, fingerprint='bytes'):
  """A session that answers each record with the next of what is `said`."""
  return types.SimpleNamespace(
    origin=pathlib.Path(name),
    config=types.SimpleNamespace(objective={'name': name}),
    tokenizer=types.SimpleNamespace(fingerprint=fingerprint),
    program=types.SimpleNamespace(objective=types.SimpleNamespace(predictor=predictor)),
    answers=lambda records: [said[record['text']] for record in records],
  )


def test_what_members_say_is_joined_by_their_objective(small, monkeypatch):
  monkeypatch.setattr(ensembles, 'BLOCK', 2)
  objective = classify_lib.Objective(small.Tokenizer(), ('a', 'b'), 'multilabel')
  p = np.random.default_rng(0).uniform(size=(2, 5, 2))
  said = [[objective.describe({'probabilities': p_C}) for p_C in each] for each in p]
  both = ensembles.Ensemble([member(f'run{i}', objective, said[i]) for i in range(2)])
  answers = both.predict([{'text': i} for i in range(5)])
  np.testing.assert_allclose(probabilities(answers), p.mean(0))
  assert [answer['label'] for answer in answers] == [
    [name for name, x in zip('ab', p_C, strict=True) if x > 0.5] for p_C in p.mean(0)
  ]
  picker = choice_lib.Objective(small.Tokenizer())
  each = [
    picker.joined([{'score': x} for x in scores]) for scores in ([0.0, 3.0, 1.0], [9.0, 1.0, 1.0])
  ]
  joined = picker.combined(each)
  wanted = special.softmax([[0.0, 3.0, 1.0], [9.0, 1.0, 1.0]], -1).mean(0)
  assert joined['choice'] == 0 != each[0]['choice']
  assert joined['probabilities'] == pytest.approx(wanted.tolist())
  tagger = types.SimpleNamespace(predictor=None)
  with pytest.raises(ValueError, match='objective tags of tags has no answers that could be aver'):
    ensembles.Ensemble([member('tags', tagger.predictor, [])])
  numbers = classify_lib.Objective(small.Tokenizer(), None, 'regression')
  assert numbers.combined([{'value': 1.0}, {'value': 4.0}]) == {'value': 2.5}
  with pytest.raises(
    ValueError, match="run1 has objective.task='regression', and run0 has 'multil"
  ):
    ensembles.Ensemble([member('run0', objective, []), member('run1', numbers, [])])
  with pytest.raises(ValueError, match='run1 has another tokenizer than run0'):
    other = member('run1', objective, said[1], 'words')
    ensembles.Ensemble([member('run0', objective, said[0]), other])


def probabilities(answers):
  return np.array([list(answer['probabilities'].values()) for answer in answers])


def lines(path):
  return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.mark.slow
def test_answers_are_the_means_of_those_of_models_that_differ(runs, tmp_path, monkeypatch):
  each = [
    probabilities(llm_jax.open(runs[name]).predict(texts())) for name in ('one', 'two', 'wide')
  ]
  wanted = np.mean(each, axis=0)
  assert np.abs(each[0] - each[2]).max() > 0.01
  together = llm_jax.open(runs['one'], ensemble=[runs['two'], str(runs['wide'])])
  monkeypatch.setattr(ensembles, 'BLOCK', 10)
  answers = together.predict(texts())
  np.testing.assert_allclose(probabilities(answers), wanted, atol=1e-6)
  for answer, p_C in zip(answers, wanted, strict=True):
    assert answer['label'] == 'dab'[p_C.argmax()]
    assert answer['entropy'] == pytest.approx(stats.entropy(p_C), abs=1e-5)

  # From a file, with those chosen that it is least sure of.
  source, target = tmp_path / 'x.txt', tmp_path / 'y.csv'
  source.write_text('\n'.join(texts()))
  predict_mode.predict(together, source, target, selection=Selection(5))
  with open(target, newline='') as file:
    found = [row['text'] for row in csv.DictReader(file)]
  order = np.argsort([-answer['entropy'] for answer in answers], kind='stable')
  assert found == [texts()[i] for i in order[:5]]

  # Scored on the labelled data.
  scored = eval_mode.evaluate(together, tmp_path)
  records = lines(together.config.data['path'])
  voted = np.mean(
    [
      probabilities(llm_jax.open(runs[name]).predict([record['text'] for record in records]))
      for name in ('one', 'two', 'wide')
    ],
    axis=0,
  ).argmax(-1)
  labels = ['dab'.index(record['label']) for record in records]
  assert scored['accuracy'] == pytest.approx(metrics.accuracy_score(labels, voted))
  assert scored['mcc'] == pytest.approx(metrics.matthews_corrcoef(labels, voted))
  assert 'loss' not in scored
  said = json.loads((tmp_path / 'eval.json').read_text())
  assert said['ensemble'] == [str(runs['two']), str(runs['wide'])]
  config = dataclasses.replace(together.config, evaluators={'loss': {}})
  together.members[0].config = config
  with pytest.raises(ValueError, match='an ensemble has answers and no loss'):
    eval_mode.evaluate(together)


@pytest.mark.slow
def test_a_soup_is_one_model(runs, tmp_path):
  first, second = (llm_jax.open(runs[name]) for name in ('one', 'two'))
  soup = llm_jax.open(runs['one'], soup=[runs['two']])
  one, two, mean = (tree.flatten(session.params) for session in (first, second, soup))
  for path, x in mean.items():
    wanted = (np.asarray(one[path], np.float64) + np.asarray(two[path], np.float64)) / 2
    np.testing.assert_allclose(x, wanted, rtol=2e-6, atol=1e-7)
  answers = soup.predict(texts())
  assert np.abs(probabilities(answers) - probabilities(first.predict(texts()))).max() > 1e-3
  export(soup, tmp_path / 'hf')
  exported = probabilities(llm_jax.open(tmp_path / 'hf').predict(texts()))
  np.testing.assert_allclose(exported, probabilities(answers), atol=1e-5)
  scored = eval_mode.evaluate(soup, tmp_path)
  alone = eval_mode.evaluate(first)
  assert 'loss' in scored and scored['loss'] != alone['loss']
  assert (
    soup.beside and not first.beside
  )  # an interrupted call of one is not gone on with by the other


@pytest.mark.slow
@pytest.mark.parametrize(
  ('how', 'others', 'message'),
  [
    ('soup', ['wide'], r'wide cannot be averaged .*: config.model.dim is 24 there, and 16 here'),
    ('soup', ['others'], r"others has objective.classes=\('a', 'b', 'd'\), and .*one has"),
    ('ensemble', ['two', 'others'], r'others has objective.classes='),
    ('ensemble', ['two', 'two'], 'two is named twice'),
    ('soup', ['one'], 'one is named twice'),
    ('soup', ['none'], 'none holds no run'),
  ],
)
def test_runs_that_do_not_go_together(runs, how, others, message):
  folders = [runs.get(name, runs['one'].parent / name) for name in others]
  with pytest.raises(ValueError, match=message):
    llm_jax.open(runs['one'], **{how: folders})
  with pytest.raises(ValueError, match='a soup averages parameters, an ensemble answers; give one'):
    llm_jax.open(runs['one'], soup=[runs['two']], ensemble=[runs['two']])


@pytest.mark.slow
def test_an_ensemble_answers_and_does_nothing_else(runs, monkeypatch):
  monkeypatch.setattr(_command, 'ENSEMBLE', _Flag('ensemble', [str(runs['two'])]))
  monkeypatch.setattr(_command, 'SOUP', _Flag('soup', []))
  opened = _command.Command('predict', None, runs['one'], keep_compiled=False).session()
  assert isinstance(opened, ensembles.Ensemble) and len(opened.members) == 2
  with pytest.raises(ValueError, match='--ensemble averages answers, for --mode=predict and eval'):
    _command.Command('export', None, runs['one'], keep_compiled=False).session()


@dataclasses.dataclass
class _Flag:
  name: str
  value: list
