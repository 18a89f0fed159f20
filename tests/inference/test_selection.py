"""The records that are worth a label: chosen from the answers to a file, whatever interrupts it."""

import csv
import json
import types

import numpy as np
import pytest
from scipy import stats

from llm_jax.inference.selection import Selection
from llm_jax.modes import predict
from llm_jax.objectives.shared.uncertainty import MEASURES, uncertainty

PROBABILITIES = np.random.default_rng(0).dirichlet([1.0] * 3, 9)
PROBABILITIES[7] = PROBABILITIES[4]  # equally unsure
BROKEN = 2  # the line that cannot be read


class Session:
  """Answers with made-up probabilities; stops after `most` answers."""

  beside, reads_source = (), False

  def __init__(self, origin, most=None, measures=MEASURES):
    self.origin, self.most, self.asked = origin, most, 0
    self.config = types.SimpleNamespace(data={}, objective={'name': 'classify'})
    predictor = types.SimpleNamespace(measures=measures)
    self.program = types.SimpleNamespace(objective=types.SimpleNamespace(predictor=predictor))

  def answers(self, records):
    for count, record in enumerate(records):
      if count == self.most:
        raise OSError('the machine is gone')
      self.asked += 1
      p_C = PROBABILITIES[int(record['text'])]
      yield {'probability': p_C.max()} | uncertainty(p_C)


@pytest.fixture
def source(tmp_path):
  lines = [{'text': str(number)} for number in range(len(PROBABILITIES))]
  lines[BROKEN] = {'text': 5}
  (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  return tmp_path / 'x.jsonl'


def order(by):
  """The lines from the least sure on, by a sort that keeps the order of equal ones."""
  known = [number for number in range(len(PROBABILITIES)) if number != BROKEN]
  best = np.sort(PROBABILITIES)
  keys = {
    'entropy': -stats.entropy(PROBABILITIES, axis=-1),
    'margin': best[:, -1] - best[:, -2],
    'confidence': best[:, -1],
  }
  return sorted(known, key=lambda number: round(keys[by][number], 12))


@pytest.mark.parametrize('by', ['entropy', 'margin', 'confidence'])
def test_the_least_sure_come_first(source, tmp_path, by):
  wanted = order(by)
  assert wanted != sorted(wanted) and wanted.index(7) == wanted.index(4) + 1
  for count in (1, 6, 8):
    target = tmp_path / 'y.jsonl'
    predict.predict(Session(tmp_path), source, target, selection=Selection(count, by))
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [int(line['text']) for line in found] == wanted[:count]
    assert all(set(line) == {'text', 'entropy', 'margin', 'probability'} for line in found)


def test_a_table_of_what_an_interrupted_call_has_answered(source, tmp_path, caplog):
  """The answers go on where they stopped; what is chosen from them may be another."""
  target = tmp_path / 'y.csv'
  with pytest.raises(OSError, match='machine is gone'):
    predict.predict(Session(tmp_path, 3), source, target, selection=Selection(2))
  session = Session(tmp_path)
  with caplog.at_level('INFO', 'absl'):
    predict.predict(session, source, target, selection=Selection(9, 'margin'))
  assert session.asked == len(PROBABILITIES) - 1 - 3
  with open(target, newline='') as file:
    assert [int(row['text']) for row in csv.DictReader(file)] == order('margin')
  assert 'Only 8 records have an answer to choose by; --select asks for 9' in caplog.text
  assert '8 records chosen by margin' in caplog.text
  assert sorted(path.name for path in tmp_path.iterdir()) == ['x.jsonl', 'y.csv']


@pytest.mark.parametrize(
  ('count', 'by', 'measures', 'message'),
  [
    (0, 'entropy', MEASURES, '--select=0 must be at least 1'),
    (
      10,
      'entropy',
      MEASURES,
      '--select=10 is more than the 9 records of --input; choose at most 9',
    ),
    (3, 'entropy', (), 'this objective, classify, have no entropy; leave --select out'),
    (3, 'confidence', MEASURES[:2], 'have no probability; choose by entropy or margin'),
    (3, 'margins', MEASURES, r"--by=margins must be .* \(did you mean 'margin'\?\)"),
  ],
)
def test_what_cannot_be_chosen(source, tmp_path, count, by, measures, message):
  session = Session(tmp_path, measures=measures)
  with pytest.raises(ValueError, match=message):
    predict.predict(session, source, tmp_path / 'y.jsonl', selection=Selection(count, by))
  assert not session.asked and [path.name for path in tmp_path.iterdir()] == ['x.jsonl']
