"""Classes by their words from files to answers: a model learns them with texts shown before each,
answers what was scored, and other words without training.
"""

import json

import numpy as np
import pytest

import llm_jax
from configs import prompt as config_file
from llm_jax.core import config as config_lib
from llm_jax.inference import session as sessions
from llm_jax.modes import eval as eval_mode
from llm_jax.modes import predict as predict_mode
from llm_jax.modes import train as train_mode
from llm_jax.training import logs, loop

pytestmark = pytest.mark.slow  # all tests share a run that is trained
WORDS = {'good': 'yes', 'bad': ['no', 'never']}


def table(path, count, seed, classes='good bad'):
  """Letters, of which the class's first one is the most frequent."""
  rng, lines = np.random.default_rng(seed), ['words,mood']
  for _ in range(count):
    name = str(rng.choice(classes.split()))
    letters = rng.choice(
      list('gbxyz'), 6, p=[0.7, 0, 0.1, 0.1, 0.1] if name == 'good' else [0, 0.7, 0.1, 0.1, 0.1]
    )
    lines.append(f'{"".join(letters)},{name}')
  path.write_text('\n'.join(lines) + '\n')


def settings(folder, **objective):
  found = config_file.get_config().to_dict()
  del found['pretrained']
  found |= dict(steps=200, batch_size=8, seq_len=96, log_every=50, eval_every=200, micro_batches=1)
  found['checkpoint'] = dict(every=200, keep=1)
  found['data'] = dict(
    source='csv',
    path=str(folder / 'train.csv'),
    text='words',
    label='mood',
    validation=0.2,
    cache=str(folder / 'cache'),
  )
  found['tokenizer'] = dict(name='byte')
  found['objective'] |= dict(template='{text}: {mask}', verbalizers=WORDS) | objective
  found['model'] |= dict(
    dim=32, layers=1, heads=2, mlp_dim=64, max_len=96, dropout=0.0, unroll=0, remat='none'
  )
  found['optimizer'] |= dict(learning_rate=2e-2)
  found['logging'] = dict(tensorboard=False)
  return found


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('prompting')
  table(folder / 'train.csv', 200, 0)
  return folder


@pytest.fixture(scope='module')
def run(folder):
  given = settings(folder, demonstrations=1)
  run = loop.prepare(config_lib.parse(given), folder / 'run')
  loop.train(run, train_mode.configured(run))
  return run


def test_it_learns_and_answers_what_was_scored(folder, run, tmp_path):
  values = [line for line in logs.read(run.workdir) if line['split'] == 'validation']
  assert values[-1]['accuracy'] > 0.9 and values[-1]['prompt_accuracy'] == values[-1]['accuracy']
  saved = json.loads((run.workdir / 'config.json').read_text())['objective']
  assert saved['classes'] == ['good', 'bad']
  assert [name for name, _ in saved['shown']] == ['good', 'good', 'bad', 'bad']
  session = llm_jax.open(run.workdir)
  (tmp_path / 'in.csv').write_text('words\nggxggy\nbbzbbx\n')
  predict_mode.predict(session, tmp_path / 'in.csv', tmp_path / 'out.jsonl')
  answers = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert [answer['label'] for answer in answers] == ['good', 'bad']
  assert answers[0]['probabilities'].keys() == {'good', 'bad'}
  with pytest.raises(ValueError, match='the objective prompt reads texts among other words'):
    session.explain(['ggxggy'])


def test_its_weights_are_scored_by_other_words_without_training(folder, run):
  given = settings(folder, template='{text} - {mask}', verbalizers={'good': 'x', 'bad': 'y'})
  session = sessions.open_model(None, config_lib.parse(given | dict(init_from=str(run.workdir))))
  values = eval_mode.evaluate(session)
  assert values['loss'] > 0 and values['accuracy'] == pytest.approx(values['prompt_accuracy'])


def test_wrong_words_and_labels_are_named(folder, tmp_path):
  given = settings(folder, verbalizers={'good': 'yes', 'awful': 'no'})
  message = r"train.csv:\d+: no word for 'bad'; objective.verbalizers has 'good', 'awful'"
  with pytest.raises(ValueError, match=message):
    loop.prepare(config_lib.parse(given), tmp_path / 'never')
  given = settings(folder) | dict(model=dict(name='decoder', variant='gpt_tiny'))
  given['objective']['template'] = '{text} is {mask}.'
  with pytest.raises(ValueError, match='must stand at the end'):
    loop.prepare(config_lib.parse(given), tmp_path / 'never')
