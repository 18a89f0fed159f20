"""Answers to questions from files to answers: it learns, resumes to the bit, is scored and predicts
what was scored.
"""

import json
import shutil

import jax
import numpy as np
import pytest

import llm_jax
from configs import qa as config_file
from llm_jax.core import config as config_lib
from llm_jax.data.sources import squad
from llm_jax.inference import testing
from llm_jax.modes import eval as eval_mode
from llm_jax.modes import predict as predict_mode
from llm_jax.modes import train as train_mode
from llm_jax.training import logs, loop

pytestmark = pytest.mark.slow  # all tests share a run that is trained
WORDS = ['saw', 'in', 'and', 'the', 'of', 'to']


def content(count, seed):
  """Words, and among those of most contexts the number that is asked for."""
  rng, paragraphs = np.random.default_rng(seed), []
  for number in range(count):
    words = [str(word) for word in rng.choice(WORDS, rng.integers(2, 20))]
    answers = []
    if rng.random() < 0.7:
      number_at, value = int(rng.integers(len(words))), str(rng.integers(10))
      words.insert(number_at, value)
      answers = [{'text': value, 'answer_start': len(' '.join([*words[:number_at], '']))}]
    asked = {
      'id': str(number),
      'question': 'how many?',
      'answers': answers,
      'is_impossible': not answers,
    }
    paragraphs.append({'context': ' '.join(words), 'qas': [asked]})
  return {'version': '2.0', 'data': [{'title': 'numbers', 'paragraphs': paragraphs}]}


def settings(folder):
  found = config_file.get_config().to_dict()
  del found['pretrained']
  found |= dict(steps=60, batch_size=8, seq_len=64, log_every=10, eval_every=30, micro_batches=1)
  found['checkpoint'] = dict(every=30, keep=2)
  found['data'] = dict(
    source='squad', path=str(folder / 'train.json'), validation=0.2, cache=str(folder / 'cache')
  )
  found['test'] = dict(path=str(folder / 'test.json'))
  found['tokenizer'] = dict(name='byte')
  found['objective'] |= dict(stride=24)
  found['model'] |= dict(dim=32, layers=1, heads=2, mlp_dim=64, max_len=64, dropout=0.0)
  found['optimizer'] |= dict(learning_rate=2e-2)
  found['logging'] = dict(tensorboard=False)
  return found


def prepared(folder, name):
  return loop.prepare(config_lib.parse(settings(folder)), folder / name)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('answering')
  (folder / 'train.json').write_text(json.dumps(content(300, 0)))
  (folder / 'test.json').write_text(json.dumps(content(30, 1)))
  return folder


@pytest.fixture(scope='module')
def run(folder):
  run = prepared(folder, 'run')
  loop.train(run, train_mode.configured(run))
  testing.score(run)
  return run


def test_it_learns_and_resumes_to_the_bit(folder, run):
  values = [line for line in logs.read(run.workdir) if line['split'] == 'validation']
  assert values[-1]['best_f1'] > 0.9 and values[-1]['has_answer_f1'] > 0.8
  assert run.program.config.objective['no_answer'] is True
  assert 'SQuAD 2.0' in (run.workdir / 'report.txt').read_text()
  shutil.copytree(run.workdir, folder / 'again')
  shutil.rmtree(folder / 'again' / 'checkpoints' / '60')
  again = prepared(folder, 'again')
  assert again.step == 30
  loop.train(again)
  ours, theirs = (jax.tree.leaves(r.state) for r in (again, run))
  for a, b in zip(ours, theirs, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_answers_are_what_was_scored(folder, run):
  source = squad.Source(str(folder / 'test.json'))
  records = [source[i] for i in range(len(source))]
  session = llm_jax.open(run.workdir)
  asked = [{key: record[key] for key in ('question', 'context')} for record in records]
  answers = session.predict(asked)
  best = min(
    (line for line in logs.read(run.workdir) if line['split'] == 'validation'),
    key=lambda line: line['loss'],
  )
  predictor = session.program.objective.predictor
  assert predictor.threshold == best['best_f1_threshold'] != 0
  right = [
    answer['answer'] == (record['answers'][0]['text'] if record['answers'] else '')
    for answer, record in zip(answers, records, strict=True)
  ]
  scored = json.loads((run.workdir / 'test.json').read_text())
  assert scored['exact_match'] == pytest.approx(np.mean(right), abs=1e-9)
  assert np.mean(right) > 0.8
  lines = (run.workdir / 'test_answers.jsonl').read_text().splitlines()
  for line, answer, record in zip(map(json.loads, lines), answers, records, strict=True):
    assert line['answer'] == answer['answer'] and line['input_answers'] == record['answers']
  for answer, record in zip(answers, records, strict=True):
    if answer['answer']:
      assert record['context'][answer['start'] : answer['end']] == answer['answer']
  alone = session.predict(asked[:1])
  assert alone[0]['answer'] == answers[0]['answer']
  values = eval_mode.evaluate(llm_jax.open(run.workdir))
  assert values['best_f1'] == pytest.approx(best['best_f1'], abs=1e-12)
  assert values['f1'] == pytest.approx(best['best_f1'], abs=1e-12)  # by its threshold


def test_files_are_answered(run, folder, tmp_path):
  session = llm_jax.open(run.workdir)
  records = [
    {'question': 'how many?', 'context': 'saw 7 in the'},
    {'question': 'how many?', 'context': ''},
    {'question': 'how many?'},
    {'question': 'how many?', 'context': 'the of ' * 30 + '77 and'},
  ]
  (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, records)))
  predict_mode.predict(session, tmp_path / 'in.jsonl', tmp_path / 'out.jsonl')
  first, empty, third, far = map(json.loads, (tmp_path / 'out.jsonl').read_text().splitlines())
  assert first['answer'] == '7' and first['start'] == 4
  assert empty['answer'] == '' and empty['answers'] == []
  assert "in.jsonl:3: field 'context' is None" in third['error']
  assert far['context'][far.get('start', 0) : far.get('end', 0)] == far['answer']
  predict_mode.predict(session, folder / 'test.json', tmp_path / 'squad.jsonl')
  lines = (tmp_path / 'squad.jsonl').read_text().splitlines()
  assert len(lines) == 30 and json.loads(lines[0])['id'] == '0'


def test_wrong_answers_are_named_by_file_and_question(folder, tmp_path):
  wrong = content(3, 2)
  wrong['data'][0]['paragraphs'][1]['qas'][0] |= dict(
    answers=[{'text': 'never', 'answer_start': 0}], is_impossible=False
  )
  (tmp_path / 'dev.json').write_text(json.dumps(wrong))
  given = settings(folder) | dict(validation=dict(path=str(tmp_path / 'dev.json')))
  given['data']['validation'] = 0.0
  with pytest.raises(ValueError, match=r"dev.json: question 1: the answer 'never' is not in"):
    loop.prepare(config_lib.parse(given), tmp_path / 'never')
