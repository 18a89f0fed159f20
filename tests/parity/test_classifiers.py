"""Classifiers of all families, from text: the answers of transformers, for single texts and pairs,
read from their folders and written to ours; and answers to questions.
"""

import json
import re

import numpy as np
import pytest

import llm_jax
from configs import base
from llm_jax.core import config as config_lib
from llm_jax.inference.export import export
from llm_jax.programs import pretrained
from llm_jax.training import loop

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]

PAIRS = [('the cat sat on the mat', 'the dog ran fast'), ('bad', 'it is a very bad film')]


def answers_of_transformers(path):
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
  found = []
  for first, second in PAIRS:
    for texts in ((first,), (first, second), (second, first)):
      with torch.no_grad():
        logits = model(**tokenizer(*texts, return_tensors='pt')).logits[0]
      found.append(torch.softmax(logits.float(), -1).numpy())
  return np.array(found)


def answers(session):
  found = []
  for first, second in PAIRS:
    for texts in (first, (first, second), (second, first)):
      (answer,) = session.predict([texts])
      found.append(list(answer['probabilities'].values()))
  return np.array(found)


def check(path, session):
  ours, theirs = answers(session), answers_of_transformers(path)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  assert np.abs(theirs - theirs[::-1]).max() > 1e-2  # other texts have other answers


def test_a_folder_answers_from_text_as_transformers_and_so_does_its_export(classifier, tmp_path):
  session = llm_jax.open(classifier)
  check(classifier, session)
  export(session, tmp_path / 'out')
  check(tmp_path / 'out', session)


def test_a_decoder_that_was_trained_here_is_exported_with_the_ends_of_its_texts(tiny, tmp_path):
  numbered = enumerate(tiny.TEXTS)
  rows = [dict(text=f'{text} {i}', pair=text, label='ab'[i % 2]) for i, text in numbered]
  (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, rows * 3)))
  config = base.get_config().to_dict() | dict(steps=1, batch_size=2, seq_len=64, eval_every=1)
  config |= dict(
    data=dict(
      source='jsonl',
      path=str(tmp_path / 'x.jsonl'),
      pair='pair',
      label='label',
      validation=0.1,
      cache=str(tmp_path),
    ),
    tokenizer=dict(name='byte'),
    model=dict(name='decoder', variant='gpt_tiny', dim=32, layers=1, heads=2, max_len=128),
    objective=dict(name='classify', pool='last', task='multiclass'),
    logging=dict(tensorboard=False),
  )
  config['model']['init_std'] = 0.5  # so that texts differ in their answers
  loop.train(loop.prepare(config_lib.parse(config), tmp_path / 'w'))
  session = llm_jax.open(tmp_path / 'w')
  export(session, tmp_path / 'out')
  check(tmp_path / 'out', session)


def spans_of_transformers(path, question, context):
  """Character spans by the sum of their scores, the best first."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  model = transformers.AutoModelForQuestionAnswering.from_pretrained(path).eval()
  read = tokenizer(question, context, return_tensors='pt', return_offsets_mapping=True)
  offsets, inside = read.pop('offset_mapping')[0].tolist(), read.sequence_ids(0)
  with torch.no_grad():
    found = model(**read)
  starts, ends = (x[0].double().numpy() for x in (found.start_logits, found.end_logits))
  tokens = [i for i, text in enumerate(inside) if text == 1]
  sums = {}
  for i, j in ((i, j) for i in tokens for j in tokens if i <= j < i + 30):
    start, end = offsets[i][0], offsets[j][1]
    start += len(context[start:end]) - len(context[start:end].lstrip())
    sums[start, end] = max(starts[i] + ends[j], sums.get((start, end), -np.inf))
  ranked = sorted(sums, key=lambda span: -sums[span])
  weights = np.exp([sums[span] - sums[ranked[0]] for span in ranked[:20]])
  return ranked[:20], weights / weights.sum()


@pytest.mark.parametrize('name', ['Bert', 'Roberta', 'XLMRoberta'])
def test_questions_are_answered_as_by_transformers_and_so_by_the_export(tiny, name, tmp_path):
  folder = tiny.written(name, 'QuestionAnswering', tmp_path / 'in')
  session = llm_jax.open(folder)
  for path in (folder, tmp_path / 'out'):
    if path != folder:
      export(session, path)
    for question, context in PAIRS:
      (answer,) = llm_jax.open(path).predict([dict(question=question, context=context)])
      spans, probabilities = spans_of_transformers(path, question, context)
      found = [(each['start'], each['end']) for each in answer['answers']]
      assert found[:3] == spans[:3] and len(found) == len(spans)
      ours = [each['probability'] for each in answer['answers']]
      np.testing.assert_allclose(ours, probabilities, atol=1e-4)


def tags_of_transformers(path, text):
  """For each word the tag at its first token, and its probability."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  model = transformers.AutoModelForTokenClassification.from_pretrained(path).eval()
  read = tokenizer(text, return_tensors='pt', return_offsets_mapping=True)
  ends = read.pop('offset_mapping')[0, :, 1].numpy()
  with torch.no_grad():
    found = torch.softmax(model(**read).logits[0], -1).numpy()
  begins = [word.start() for word in re.finditer(r'\S+', text)]
  firsts = found[[np.flatnonzero(ends > begin)[0] for begin in begins]]
  return [model.config.id2label[i] for i in firsts.argmax(-1)], firsts.max(-1)


@pytest.mark.parametrize('name', ['Bert', 'Roberta', 'XLMRoberta', 'Esm', 'ModernBert'])
def test_words_are_tagged_as_by_transformers_and_so_by_the_export(tiny, name, tmp_path):
  folder = tiny.written(name, 'TokenClassification', tmp_path / 'in')
  change_labels(folder, ['O', 'B-PER', 'I-PER'])
  export(llm_jax.open(folder), tmp_path / 'out')
  for path in (folder, tmp_path / 'out'):
    session = llm_jax.open(path)
    tags = set()
    for text in (*PAIRS[0], 'a film was unbelievably good', '  dog  ran'):
      (answer,) = session.predict([text])
      theirs, probabilities = tags_of_transformers(path, text)
      assert answer['tags'] == theirs and answer['words'] == text.split()
      np.testing.assert_allclose(answer['probabilities'], probabilities, atol=1e-4)
      tags |= set(theirs)
    assert len(tags) > 1  # other words have other tags


def test_a_folder_says_which_head_it_has(tiny, tmp_path):
  folder = tiny.written('Bert', 'TokenClassification', tmp_path / 'in')
  objective = dict(name='classify', pool='cls', task='multiclass', classes=('a', 'b', 'c'))
  settings = config_lib.Config(
    steps=1, batch_size=1, init_from=str(folder), objective=objective, model={}, tokenizer={}
  )
  session = llm_jax.inference.session.open_model(None, pretrained.fill_in(settings))
  with pytest.raises(ValueError, match='lacks parameters(.|\n)*heads_classifier'):
    session.predict(['a cat'])


def change_labels(folder, names):
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  config |= dict(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
  path.write_text(json.dumps(config))
