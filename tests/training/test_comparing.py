"""Vectors of texts, multiple choice and reranking from files to answers: they learn, resume to the
bit, and answer what was scored.
"""

import json
import shutil

import jax
import numpy as np
import pytest

import llm_jax
from configs import choice as choice_config
from configs import contrast as contrast_config
from configs import rerank as rerank_config
from llm_jax.core import config as config_lib
from llm_jax.hf import sentences
from llm_jax.inference import testing
from llm_jax.inference.export import export
from llm_jax.modes import predict as predict_mode
from llm_jax.modes import train as train_mode
from llm_jax.training import corpora, logs, loop

pytestmark = pytest.mark.slow  # a run of each
CONFIGS = {'contrast': contrast_config, 'choice': choice_config, 'rerank': rerank_config}
WORDS = 'red blue green black white brown grey pink'.split()


def records(count, seed):
  """A colour; what says it in capitals; and others that do not."""
  rng, found = np.random.default_rng(seed), []
  for _ in range(count):
    right, *others = (str(word) for word in rng.permutation(WORDS)[:3])
    said = [word.upper() for word in (right, *others)]
    order = rng.permutation(3)
    texts = [said[i] for i in order]
    found.append(
      dict(
        query=f'{right} {rng.integers(100)}',
        passage=said[0],
        negatives=said[1:2],
        choices=texts,
        answer=int(np.flatnonzero(order == 0)[0]),
        passages=texts,
        relevance=(order == 0).astype(int).tolist(),
      )
    )
  return found


FIELDS = {
  'contrast': dict(pair='passage', fields=('negatives',)),
  'choice': dict(label='answer', fields=('choices',)),
  'rerank': dict(fields=('passages', 'relevance')),
}


def settings(name, folder):
  found = CONFIGS[name].get_config().to_dict()
  del found['pretrained']
  found |= dict(steps=60, batch_size=8, seq_len=64, log_every=10, eval_every=30, micro_batches=2)
  found['checkpoint'] = dict(every=30, keep=2)
  found['data'] = dict(
    source='jsonl',
    path=str(folder / 'train.jsonl'),
    text='query',
    validation=0.2,
    cache=str(folder / 'cache'),
    **FIELDS[name],
  )
  found['test'] = dict(path=str(folder / 'test.jsonl'))
  found['tokenizer'] = dict(name='byte')
  found['objective'] |= dict(dropout=0.0) if name != 'contrast' else {}
  found['model'] |= dict(dim=32, layers=2, heads=2, mlp_dim=64, max_len=64, dropout=0.05)
  found['optimizer'] |= dict(learning_rate=2e-2)
  found['logging'] = dict(tensorboard=False)
  return found


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('comparing')
  for name, count, seed in (('train', 300, 0), ('test', 40, 1)):
    lines = map(json.dumps, records(count, seed))
    (folder / f'{name}.jsonl').write_text('\n'.join(lines))
  return folder


def trained(name, folder, where):
  run = loop.prepare(config_lib.parse(settings(name, folder)), folder / where)
  loop.train(run, train_mode.configured(run))
  return run


def last(run):
  return [line for line in logs.read(run.workdir) if line['split'] == 'validation'][-1]


def test_vectors_learn_resume_to_the_bit_and_are_exported(folder):
  run = trained('contrast', folder, 'vectors')
  values = last(run)
  assert values['recall_1'] > 0.9 and values['contrast_accuracy'] > 0.9
  assert 'look for their pairs among' in (run.workdir / 'report.txt').read_text()
  shutil.copytree(run.workdir, folder / 'again')
  shutil.rmtree(folder / 'again' / 'checkpoints' / '60')
  again = trained('contrast', folder, 'again')
  ours, theirs = (jax.tree.leaves(r.state) for r in (again, run))
  for a, b in zip(ours, theirs, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  session = llm_jax.open(run.workdir)
  texts, others = ['red 7', 'pink 1'], ['RED', 'PINK']
  a, b = session.embed(texts), session.embed(others)
  answers = session.predict(list(zip(texts, others, strict=True)))
  assert [x['similarity'] for x in answers] == pytest.approx((a * b).sum(1), abs=1e-5)
  assert (np.argmax(a @ b.T, axis=1) == [0, 1]).all()
  assert session.predict(['red 7']) == [{'similarity': None}]
  predict_mode.predict(session, folder / 'test.jsonl', folder / 'similar.jsonl')
  written = [json.loads(line) for line in (folder / 'similar.jsonl').read_text().splitlines()]
  asked = [(record['query'], record['passage']) for record in records(40, 1)]
  wanted = [answer['similarity'] for answer in session.predict(asked)]
  assert [line['similarity'] for line in written] == pytest.approx(wanted, abs=1e-5)
  export(session, folder / 'exported')
  assert sentences.read(folder / 'exported') == ('mean', True, False)
  np.testing.assert_allclose(llm_jax.open(folder / 'exported').embed(texts), a, atol=1e-5)


@pytest.mark.parametrize('name', ['choice', 'rerank'])
def test_candidates_are_answered_as_they_were_scored(folder, name):
  run = trained(name, folder, name)
  testing.score(run)
  assert last(run)[f'{name}_accuracy'] > 0.7  # a third by chance
  scored = json.loads((run.workdir / 'test.json').read_text())
  asked, session = records(40, 1), llm_jax.open(run.workdir)
  answers = session.predict([{'text': record['query'], **record} for record in asked])
  target = folder / f'{name}.answers.jsonl'
  predict_mode.predict(session, folder / 'test.jsonl', target)
  written = [json.loads(line) for line in target.read_text().splitlines()]
  assert written == [record | answer for record, answer in zip(asked, answers, strict=True)]
  if name == 'choice':
    right = [a['choice'] == r['answer'] for a, r in zip(answers, asked, strict=True)]
    assert scored['choice_accuracy'] == pytest.approx(np.mean(right), abs=1e-9)
    assert all(sum(answer['probabilities']) == pytest.approx(1) for answer in answers)
  else:
    places = [
      answer['ranking'].index(int(np.argmax(record['relevance'])))
      for answer, record in zip(answers, asked, strict=True)
    ]
    assert scored['mrr'] == pytest.approx(np.mean(1 / (1 + np.array(places))), abs=1e-6)


def test_a_tokenizer_learns_from_candidates_too(folder):
  config = config_lib.parse(settings('rerank', folder) | dict(validation={}))
  source = records(2, 0)
  source = [{'text': record['query'], **record} for record in source]
  texts = lambda fields: list(corpora._training_texts([source], 0.0, fields))
  fields = corpora.assemble.text_fields(config)
  assert fields == ('text', 'pair', 'passages')
  assert texts(fields)[:4] == [source[0]['text'], *source[0]['passages']]
  assert texts(('text', 'pair')) == [record['text'] for record in source]
