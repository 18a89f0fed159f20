"""Token labelling from files to answers: it learns, resumes to the bit, is scored and predicts."""

import json
import shutil

import jax
import numpy as np
import pytest

import llm_jax
from configs import tag as config_file
from llm_jax.core import config as config_lib
from llm_jax.data.sources import conll
from llm_jax.inference import testing
from llm_jax.modes import eval as eval_mode
from llm_jax.modes import predict as predict_mode
from llm_jax.modes import train as train_mode
from llm_jax.training import logs, loop

pytestmark = pytest.mark.slow  # all tests share runs that are trained
NAMES, PLACES, OTHERS = ['Ann', 'Bo Lee', 'Li'], ['Ur', 'New York'], ['saw', 'in', 'and', 'the']


def sentences(count, seed):
  """Names, places and other words in any order, as CoNLL has them."""
  rng, lines = np.random.default_rng(seed), ['-DOCSTART- O', '']
  for _ in range(count):
    for _ in range(rng.integers(2, 6)):
      kind = str(rng.choice(['PER', 'LOC', 'O', 'O']))
      phrase = str(rng.choice({'PER': NAMES, 'LOC': PLACES, 'O': OTHERS}[kind]))
      for number, word in enumerate(phrase.split()):
        lines.append(f'{word} {"O" if kind == "O" else "BI"[number > 0] + "-" + kind}')
    lines.append('')
  return '\n'.join(lines)


def settings(folder):
  found = config_file.get_config().to_dict()
  del found['pretrained']
  found |= dict(steps=40, batch_size=8, seq_len=64, log_every=10, eval_every=20, micro_batches=1)
  found['checkpoint'] = dict(every=20, keep=2)
  found['data'] = dict(
    source='conll', path=str(folder / 'train.conll'), validation=0.2, cache=str(folder / 'cache')
  )
  found['test'] = dict(path=str(folder / 'test.conll'))
  found['tokenizer'] = dict(name='byte')
  found['objective'] |= dict(loss='crf', dropout=0.0)
  found['model'] |= dict(dim=32, layers=1, heads=2, mlp_dim=64, max_len=64, dropout=0.0)
  found['optimizer'] |= dict(learning_rate=2e-2)
  found['logging'] = dict(tensorboard=False)
  return found


def prepared(folder, name):
  return loop.prepare(config_lib.parse(settings(folder)), folder / name)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tagging')
  (folder / 'train.conll').write_text(sentences(300, 0))
  (folder / 'test.conll').write_text(sentences(20, 1))
  return folder


@pytest.fixture(scope='module')
def run(folder):
  run = prepared(folder, 'run')
  loop.train(run, train_mode.configured(run))
  testing.score(run)
  return run


def test_it_learns_and_its_options_come_from_the_data(run):
  values = [line for line in logs.read(run.workdir) if line['split'] == 'validation']
  assert values[-1]['loss'] < values[0]['loss'] / 2 and values[-1]['strict_f1'] > 0.9
  objective = run.program.config.objective
  assert objective['tags'] == ('B-LOC', 'B-PER', 'I-LOC', 'I-PER', 'O')
  assert (objective['scheme'], objective['unread']) == ('IOB2', 'O')
  report = (run.workdir / 'report.txt').read_text()
  assert 'strictly by IOB2' in report and 'PER' in report
  rows = [run.train[i] for i in range(4)]
  assert max(row['segments'].max() for row in rows) > 2  # sentences share rows


def test_it_resumes_to_the_bit(folder, run):
  shutil.copytree(run.workdir, folder / 'again')
  shutil.rmtree(folder / 'again' / 'checkpoints' / '40')
  again = prepared(folder, 'again')
  assert again.step == 20
  loop.train(again)
  ours, theirs = (jax.tree.leaves(r.state) for r in (again, run))
  for a, b in zip(ours, theirs, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_answers_are_what_was_scored(folder, run):
  source = conll.Source(str(folder / 'test.conll'))
  records = [source[i] for i in range(len(source))]
  session = llm_jax.open(run.workdir)
  answers = session.predict([{'words': record['words']} for record in records])
  right = [
    found == wanted
    for answer, record in zip(answers, records, strict=True)
    for found, wanted in zip(answer['tags'], record['tags'], strict=True)
  ]
  scored = json.loads((run.workdir / 'test.json').read_text())
  assert scored['word_accuracy'] == pytest.approx(np.mean(right), abs=1e-9) and np.mean(right) > 0.9
  lines = (run.workdir / 'test_answers.jsonl').read_text().splitlines()
  for line, answer, record in zip(map(json.loads, lines), answers, records, strict=True):
    assert line['tags'] == answer['tags'] and line['input_tags'] == record['tags']
  alone = session.predict([{'words': records[0]['words']}])
  assert alone[0]['tags'] == answers[0]['tags']
  as_text = session.predict([' '.join(records[0]['words'])])
  assert as_text[0]['tags'] == answers[0]['tags']
  assert all(np.asarray(x).any() for x in jax.tree.leaves(session.params['heads_moves']))


def test_scores_are_those_of_eval_mode(run):
  best = min(
    (line for line in logs.read(run.workdir) if line['split'] == 'validation'),
    key=lambda line: line['loss'],
  )
  values = eval_mode.evaluate(llm_jax.open(run.workdir))
  for name in ('word_accuracy', 'f1', 'strict_f1'):
    assert values[name] == pytest.approx(best[name], abs=1e-12)


def test_files_are_answered(run, tmp_path):
  session = llm_jax.open(run.workdir)
  words = ['Bo', 'Lee', 'saw', 'New', 'York']
  records = [{'words': words, 'tags': ['?']}, {'text': ' '.join(words)}, {'words': 'no'}]
  (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, records)))
  (tmp_path / 'in.txt').write_text(' '.join(words) + '\n\n' + 'Ann' * 30 + ' in Ur\n')
  (tmp_path / 'in.conll').write_text('\n'.join(words) + '\n\nAnn\n')  # without tags
  for name in ('in.jsonl', 'in.txt', 'in.conll'):
    predict_mode.predict(session, tmp_path / name, tmp_path / f'{name}.out.jsonl')
  read = lambda name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
  first, second, third = read('in.jsonl.out.jsonl')
  assert first['tags'] == ['B-PER', 'I-PER', 'O', 'B-LOC', 'I-LOC'] == second['tags']
  assert first['input_tags'] == ['?'] and first['words'] == words
  spans = [(e['label'], e['text'], e['start'], e['end']) for e in first['entities']]
  assert spans == [('PER', 'Bo Lee', 0, 6), ('LOC', 'New York', 11, 19)]
  assert "in.jsonl:3: field 'words' is 'no'; it must be a list" in third['error']
  sentence, _ = read('in.conll.out.jsonl')
  assert sentence['tags'] == first['tags'] and sentence['words'] == words
  whole, empty, cut = read('in.txt.out.jsonl')
  assert whole['tags'] == first['tags'] and whole['entities'] == first['entities']
  assert (empty['words'], empty['tags'], empty['entities']) == ([], [], [])
  assert len(cut['tags']) == 3 and cut['unread'] == [1, 2] and cut['tags'][1:] == ['O', 'O']


def test_wrong_tags_are_named_by_file_and_line(folder, tmp_path):
  (tmp_path / 'dev.conll').write_text('Ann B-PER\n\nUr B-GPE\n')
  given = settings(folder) | dict(validation=dict(path=str(tmp_path / 'dev.conll')))
  given['data']['validation'] = 0.0
  with pytest.raises(
    ValueError, match=r"dev.conll:3: word 0 has the tag 'B-GPE', which is none of"
  ):
    loop.prepare(config_lib.parse(given), tmp_path / 'never')
