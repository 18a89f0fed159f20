"""`--mode=predict`: an answer for each line, whatever it holds, and none lost."""

import json
import types

import pytest

from llm_jax.modes import predict


class Session:
  """Answers with the length of a text; stops after `most` answers."""

  beside, reads_source = (), False

  def __init__(self, origin, most=None):
    self.origin, self.most, self.asked = origin, most, []
    self.config = types.SimpleNamespace(data={}, objective={'name': 'classify'})

  def answers(self, records):
    for count, record in enumerate(records):
      if count == self.most:
        raise OSError('the machine is gone')
      self.asked.append(record['text'])
      yield {'label': len(record['text'])}


LINES = (
  b'\xef\xbb\xbf{"text": "alpha", "id": "a"}\n'
  b'\xef\xbb\xbf{"text": "beta", "label": "old"}\n'  # files that were put together
  b'{"text": "gamma", "id": "\\ud83d"}\n'
  b'\n'
  b'{"text": 5, "id": NaN}\n'
  b'{"text": \n'
  b'{"text": "delta"}\n'
  b'{"words": "x"}\n'
)
WANT = [
  {'text': 'alpha', 'id': 'a', 'label': 5},
  {'text': 'beta', 'input_label': 'old', 'label': 4},
  {'text': 'gamma', 'id': '\ud83d', 'label': 5},
  {'text': 5, 'id': None, 'error': "x.jsonl:5: field 'text' is 5"},
  {'error': 'x.jsonl:6: not a JSON object'},
  {'text': 'delta', 'label': 5},
  {'words': 'x', 'error': "x.jsonl:8: no field 'text'"},
]


@pytest.fixture
def source(tmp_path):
  (tmp_path / 'x.jsonl').write_bytes(LINES)
  return tmp_path / 'x.jsonl'


def check(target):
  found = [json.loads(line) for line in target.read_text().splitlines()]
  assert len(found) == len(WANT)
  for line, wanted in zip(found, WANT, strict=True):
    error, said = line.pop('error', ''), {**wanted}.pop('error', '')
    assert said in error and bool(said) == bool(error)
    assert line == {key: value for key, value in wanted.items() if key != 'error'}
  assert 'NaN' not in target.read_text()


def test_a_line_that_cannot_be_read_costs_itself_alone(source, tmp_path, caplog):
  predict.predict(Session(tmp_path), source, tmp_path / 'y.jsonl')
  check(tmp_path / 'y.jsonl')
  assert (
    '3 records have no answer but `error`, the first: ' in caplog.text
    and 'x.jsonl:5' in caplog.text
  )
  assert sorted(path.name for path in tmp_path.iterdir()) == ['x.jsonl', 'y.jsonl']


@pytest.mark.parametrize('content, message', [(b'', 'empty corpus'), (b'{"text"', 'no record of')])
def test_a_file_without_an_answer_leaves_nothing(tmp_path, caplog, content, message):
  (tmp_path / 'x.jsonl').write_bytes(content)
  with pytest.raises(ValueError, match=message):
    predict.predict(Session(tmp_path), tmp_path / 'x.jsonl', tmp_path / 'y.jsonl')
  assert [path.name for path in tmp_path.iterdir()] == ['x.jsonl']
  assert 'Interrupted' not in caplog.text


@pytest.mark.parametrize('most', [0, 1, 3])
def test_an_interrupted_call_goes_on(source, tmp_path, most):
  target = tmp_path / 'y.jsonl'
  with pytest.raises(OSError, match='machine is gone'):
    predict.predict(Session(tmp_path, most), source, target)
  assert not target.exists()
  for partial in tmp_path.glob('y.jsonl.*.partial'):
    with open(partial, 'ab') as file:
      file.write(b'{"half a li')
  assert bool(list(tmp_path.glob('*.partial'))) == (most > 0)
  session = Session(tmp_path)
  predict.predict(session, source, target)
  check(target)
  assert session.asked == ['alpha', 'beta', 'gamma', 'delta'][most:]
  assert not list(tmp_path.glob('*.partial'))


def test_another_input_is_answered_from_its_start(source, tmp_path):
  with pytest.raises(OSError, match='machine is gone'):
    predict.predict(Session(tmp_path, 2), source, tmp_path / 'y.jsonl')
  source.write_bytes(LINES + b'{"text": "omega"}\n')
  session = Session(tmp_path)
  predict.predict(session, source, tmp_path / 'y.jsonl')
  assert session.asked[0] == 'alpha' and session.asked[-1] == 'omega'
