"""SQuAD's JSON, and questions about defaults of the standard library; wrong files are named."""

import gzip
import json
import pickle

import pytest

from configs import qa as config_file
from llm_jax.core import config as config_lib
from llm_jax.data import encoding
from llm_jax.data.sources import defaults, squad
from llm_jax.training import corpora


def paragraph(*questions, context='Ann lives in Ur.'):
  return {'context': context, 'qas': list(questions)}


ONE = {'id': 'a', 'question': 'Who?', 'answers': [{'text': 'Ann', 'answer_start': 0}]}
NONE = {
  'id': 'b',
  'question': 'When?',
  'answers': [],
  'is_impossible': True,
  'plausible_answers': [],
}
ASKED = {'question': 'Where?'}
CONTENT = {
  'version': 'v2.0',
  'data': [
    {'title': 'Names', 'paragraphs': [paragraph(ONE, NONE), paragraph(ASKED, context='Nowhere.')]}
  ],
}


def write(path, content):
  text = content if isinstance(content, str) else json.dumps(content)
  path.write_bytes(gzip.compress(text.encode()) if path.suffix == '.gz' else text.encode())
  return str(path)


@pytest.mark.parametrize('name', ['a.json', 'a.json.gz'])
def test_questions_are_records(tmp_path, name):
  path = write(tmp_path / name, CONTENT)
  source = squad.Source(path)
  copy = pickle.loads(pickle.dumps(source))
  for found in (source, copy):
    assert [found[i] for i in range(len(found))] == [
      {
        'id': 'a',
        'question': 'Who?',
        'context': 'Ann lives in Ur.',
        'title': 'Names',
        'answers': ONE['answers'],
      },
      {
        'id': 'b',
        'question': 'When?',
        'context': 'Ann lives in Ur.',
        'title': 'Names',
        'answers': [],
      },
      {'id': None, 'question': 'Where?', 'context': 'Nowhere.', 'title': 'Names'},
    ]
  assert source.where(1) == f'{path}: question b' and source.where(2) == f'{path}: question 2'
  first, second, other = (encoding.digest(source[i]) for i in range(3))
  assert first == second != other  # questions of a context are on one side of a split


def test_further_fields_and_what_is_missing(tmp_path):
  path = write(tmp_path / 'a.json', CONTENT)
  source = squad.Source(path, fields=('title', 'is_impossible'))
  assert source[1]['is_impossible'] is True and source.fingerprint != squad.Source(path).fingerprint
  with pytest.raises(ValueError, match=r"a.json: question a: no field 'is_impossible'"):
    source[0]


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{"data": [', 'a.json: not JSON in UTF-8'),
    ([ONE], 'a.json: not the JSON of SQuAD'),
    ('', 'a.json: the file is empty'),
    ({'data': [{'title': 'x'}]}, "a.json: article 0 has no list 'paragraphs'"),
    ({'data': [{'paragraphs': [{}]}]}, "a.json: article 0, paragraph 0 has no list 'qas'"),
    ({'data': [{'paragraphs': [paragraph('Who?')]}]}, "question 0 is 'Who\\?', no object"),
    ({'data': []}, 'an empty corpus: 1 files without a question'),
    ({'data': [{'paragraphs': [paragraph({'id': 'c'})]}]}, "question c: 'question' is None"),
  ],
)
def test_wrong_files_are_named(tmp_path, content, message):
  source = squad.Source(write(tmp_path / 'a.json', content))
  with pytest.raises(ValueError, match=message):
    source[0]


def test_defaults_stand_where_they_are_said_to():
  lines = [
    'def close(self):',
    "def get(self, key, *, default=None, sep=', '):",
    'def close(self, now=True):',
  ]
  found = list(defaults.questions(lines))
  context = '\n'.join(lines)
  assert [record['question'] for record in found] == [
    'What is default in get by default?',
    'What is sep in get by default?',
    'What is key in get by default?',
  ]
  answers = [record['answers'] for record in found]
  assert [[answer['text'] for answer in given] for given in answers] == [['None'], ["', '"], []]
  for (answer,) in answers[:2]:
    assert context[answer['answer_start'] :].startswith(answer['text'])
  assert list(defaults.questions(['def broken(:', 'def 1():'])) == []


@pytest.mark.slow
def test_the_config_reads_thousands_of_them(tmp_path):
  """As it is shipped, its tokenizer included."""
  settings = config_file.get_config().to_dict()
  del settings['pretrained']
  settings['data']['cache'] = str(tmp_path)
  data = corpora.load(config_lib.parse(settings), tmp_path)
  assert data.tokenizer.vocab_size == 2048 and data.config.objective['no_answer'] is True
  assert len(data.splits.train[0]) > 2000 > len(data.splits.validation[0]) > 50
  source = defaults.Source()
  assert len(source) > 2000 and source.fingerprint == defaults.Source().fingerprint
  for index in range(len(source)):
    record = source[index]
    for answer in record['answers']:
      assert record['context'][answer['answer_start'] :].startswith(answer['text'])
