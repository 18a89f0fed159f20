"""An encoder-decoder that was trained here, opened: what it writes alone, in a batch, by beams, in
rows that come and go, in a file, and from the folder that it was exported to.
"""

import json

import numpy as np
import pytest
import sacrebleu

import llm_jax
from configs import transformer
from llm_jax.core import config as config_lib
from llm_jax.generation.sampling import GREEDY, Sampling
from llm_jax.inference import testing
from llm_jax.inference.export import export
from llm_jax.modes import predict
from llm_jax.training import loop

pytestmark = pytest.mark.slow
WORDS = {'one': 'uno', 'two': 'due', 'three': 'tre', 'cat': 'gatto', 'dog': 'cane'}
SHAPE = dict(dim=32, layers=1, heads=2, mlp_dim=64, max_len=48, dropout=0.0, attention_dropout=0.0)
ASKED = ['two cat', 'one', 'three dog']
SHORT = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Of a run on pairs of words, in a form that BART has."""
  folder = tmp_path_factory.mktemp('writing')
  records = [
    {'en': f'{a} {b}', 'it': f'{WORDS[a]} {WORDS[b]}'} for a in WORDS for b in WORDS for _ in 'ab'
  ]
  (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, records)))
  settings = transformer.get_config('tiny').to_dict()
  settings['data'] = dict(source='jsonl', path=str(folder / 'pairs.jsonl'), text='en', target='it')
  settings['data'] |= dict(cache=str(folder / 'cache'), workers=1, validation=0.1)
  settings['tokenizer'] = dict(name='byte')
  settings['model'] = dict(name='encoder_decoder', variant='bart_base', remat='none', **SHAPE)
  settings['objective'] |= dict(source_len=32, label_smoothing=0.0)
  settings |= dict(steps=60, batch_size=8, seq_len=32, log_every=20, eval_every=30)
  settings['optimizer'] = dict(name='adamw', learning_rate=1e-2)
  settings['checkpoint'] = dict(every=30, keep=2)
  given = [{'en': text, 'it': ' '.join(map(WORDS.get, text.split()))} for text in ASKED]
  (folder / 'test.jsonl').write_text('\n'.join(map(json.dumps, given)))
  settings['test'] = dict(path=str(folder / 'test.jsonl'))
  written = dict(max_new_tokens=60, no_repeat_ngram_size=9)  # more than there is room for
  settings['evaluators'] = dict(loss={}, translation=written, generation=dict(max_new_tokens=12))
  settings['logging'] = dict(tensorboard=False)
  settings['model']['max_len'] = 64
  run = loop.prepare(config_lib.parse(settings), folder / 'run')
  loop.train(run)
  testing.score(run)
  return folder / 'run'


@pytest.fixture(scope='module')
def session(workdir):
  return llm_jax.open(workdir)


def test_it_has_learned_what_was_asked(workdir, session):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  last = [line for line in lines if line['split'] == 'validation'][-1]
  assert last['seq2seq_nll'] < 0.6 * last['unigram_loss']
  (written,) = session.complete(['two cat'], sampling=SHORT)
  assert set(written) <= set(' '.join(WORDS.values()))


def test_its_scores_are_of_what_it_writes(workdir, session):
  numbers = json.loads((workdir / 'test.json').read_text())
  lines = [json.loads(line) for line in (workdir.parent / 'test.jsonl').read_text().splitlines()]
  wanted = [line['it'] for line in lines]
  most = Sampling(max_new_tokens=60, temperature=0, no_repeat_ngram_size=9)
  written = session.complete([line['en'] for line in lines], sampling=most)
  bleu = sacrebleu.metrics.BLEU()
  assert numbers['bleu'] == pytest.approx(bleu.corpus_score(written, [wanted]).score)
  assert numbers['bleu_signature'] == str(bleu.get_signature())
  short = session.complete([line['en'] for line in lines], sampling=SHORT)
  pairs = zip(short, wanted, strict=True)
  assert numbers['exact_match'] == sum(a.strip() == b for a, b in pairs) / len(wanted)
  report = (workdir / 'test_report.txt').read_text()
  assert 'the 3 worst:' in report and f'written: {written[0]}' in report
  logged = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  last = [line for line in logged if line['split'] == 'validation'][-1]
  assert last['chrf'] > 0 and last['ter_signature'].startswith('nrefs:1|case:lc')


def test_alone_in_a_batch_and_in_rows_that_come_and_go(session):
  together = session.complete(ASKED, sampling=SHORT)
  assert together == [session.complete([text], sampling=SHORT)[0] for text in ASKED]
  assert len(set(together)) == 3
  generator, weights, tokenizer = session._generator, session.weights, session.tokenizer
  sources = [[*tokenizer.encode(text), tokenizer.eos_id] for text in ASKED]
  columns = np.stack(list(generator.tokens(weights, sources, SHORT)))
  state = generator.empty(rows=2, slots=16, source=16)
  state, _ = generator.admit(weights, state, 0, sources[0], SHORT)
  state, _ = generator.step(weights, state)
  state, first = generator.admit(weights, state, 1, sources[2], SHORT)
  found = [int(first)]
  for _ in range(7):
    state, ids = generator.step(weights, state)
    found.append(int(ids[1]))
  assert found == columns[:8, 2].tolist()
  with pytest.raises(ValueError, match='a source of 20 tokens is longer.*source=16'):
    generator.admit(weights, state, 1, [9] * 20, SHORT)
  with pytest.raises(ValueError, match='a source of 65 tokens is longer than max_len=64'):
    generator.check([[9] * 65], [GREEDY])


def test_beams_find_what_is_at_least_as_likely(session):
  sampling = Sampling(max_new_tokens=12, temperature=0, beams=3)
  together = session.complete(ASKED, sampling=sampling)
  assert together == [session.complete([text], sampling=sampling)[0] for text in ASKED]


def test_a_file_gets_a_prediction_for_each_record(session, tmp_path):
  lines = [{'en': text, 'number': i} for i, text in enumerate(ASKED)]
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  source.write_text('\n'.join(map(json.dumps, [*lines, {'en': 'x' * 70}])))
  predict.predict(session, source, target, sampling=SHORT)
  found = [json.loads(line) for line in target.read_text().splitlines()]
  written = session.complete(ASKED, sampling=SHORT)
  assert found[:3] == [line | {'prediction': w} for line, w in zip(lines, written, strict=True)]
  assert 'a source of 71 tokens is longer than max_len=64' in found[3]['error']


def test_its_folder_writes_the_same(session, tmp_path):
  export(session, tmp_path / 'out')
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['model_type'] == 'bart'
  assert config['decoder_start_token_id'] == session.tokenizer.bos_id
  again = llm_jax.open(tmp_path / 'out')
  assert again.config.objective['name'] == 'seq2seq'
  assert again.writing_ids['start'] == session.writing_ids['start']
  assert again.complete(ASKED, sampling=SHORT) == session.complete(ASKED, sampling=SHORT)
