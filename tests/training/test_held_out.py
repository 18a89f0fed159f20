"""Groups of validation texts: each text has its own field, and refusals come before any work."""

import json
import types

import numpy as np
import pytest

from configs import classify
from llm_jax.core import config
from llm_jax.programs import assemble
from llm_jax.training import held_out


class Rows:
  """Rows of the texts of a plan."""

  def __init__(self, plan):
    self.texts, self._count = plan.__getitem__, len(plan)

  def __len__(self):
    return self._count


def settings(path, fields, **changes):
  tree = classify.get_config().to_dict()
  tree['data'] |= dict(source='jsonl', path=str(path), label='label')
  tree['evaluation'] = dict(rows=0, slices=fields)
  return config.parse(tree | changes)


@pytest.fixture
def path(tmp_path):
  with open(tmp_path / 'x.jsonl', 'w') as file:
    for number in range(200):
      group = [None, '', 7, 'mail'][number % 4]
      record = {'text': 'a', 'label': 'u', 'kind': group, 'number': number}
      file.write(json.dumps(record) + '\n')
  return tmp_path / 'x.jsonl'


def test_each_text_has_its_own_field(path):
  split = types.SimpleNamespace(ids=np.array([3, 6, 9, 12, 101, 0]))
  rows = [Rows([[1, 0], [4], [2, 5, 3]])]
  found = held_out.read_slices(settings(path, ['kind,number']), 'validation', [split], rows)
  assert found == {
    'kind': [['7', 'mail'], ['(none)'], ['(none)'] * 3],
    'number': [['6', '3'], ['101'], ['9', '0', '12']],
  }
  part = {'source': 'jsonl', 'path': str(path), 'label': 'label'}
  data = dict(source='mixture', parts=dict(a=part, b=part | {'weight': 2.0}), validation=0.1)
  two = settings(path, ['kind'], data=data)
  both = held_out.read_slices(two, 'validation', [split, split], [Rows([[0]]), Rows([[1]])])
  assert both == {'kind': [['mail'], ['7']]}
  assert held_out.read_slices(settings(path, []), 'test', [split], rows) == {}


def test_given_sets_are_read_from_their_own_sources(path, tmp_path):
  (tmp_path / 'dev.jsonl').write_text('{"text": "b", "label": "u", "kind": "post"}\n')
  given = settings(path, ['kind'], validation=dict(path=str(tmp_path / 'dev.jsonl')))
  first = types.SimpleNamespace(ids=np.array([0]))
  assert held_out.read_slices(given, 'validation', [first], [Rows([[0]])]) == {'kind': [['post']]}
  assert held_out.read_slices(given, 'test', [first], [Rows([[0]])]) == {'kind': [['(none)']]}
  assert held_out.read_slices(given, 'test', [], []) == {'kind': []}
  (tmp_path / 'dev.jsonl').write_text('{"text": "b", "label": "u"}\n')
  with pytest.raises(ValueError, match="slices=.'kind',.*no field 'kind'"):
    held_out.check_slices(given)


def test_what_is_refused(path):
  held_out.check_slices(settings(path, ['kind']))
  with pytest.raises(ValueError, match="slices=.'knid',.*no field 'knid' .did you mean 'kind'"):
    held_out.check_slices(settings(path, ['knid']))
  with pytest.raises(ValueError, match='names fields of records: config.data.fields is not an'):
    held_out.check_slices(settings(path, ['kind'], data=dict(source='stdlib', validation=0.1)))
  with pytest.raises(ValueError, match='needs rows of whole texts, and the objective classify'):
    held_out.read_slices(settings(path, ['kind']), 'validation', [], [[1, 2]])
  split = types.SimpleNamespace(ids=np.arange(200))
  with pytest.raises(ValueError, match="'number' has 200 values .* such as '0'; .* may have 100"):
    held_out.read_slices(settings(path, ['number']), 'test', [split], [Rows([list(range(200))])])
  alone = dict(source='jsonl', path=str(path), label='label', validation=0.0)
  with pytest.raises(ValueError, match='groups of validation and test texts, and there are none'):
    assemble.check(settings(path, ['kind'], data=alone))
  with pytest.raises(ValueError, match='and the objective mlm gives no answers'):
    assemble.check(settings(path, ['kind'], objective=dict(name='mlm')))
  with pytest.raises(ValueError, match='groups that none of the evaluators loss scores'):
    assemble.check(settings(path, ['kind'], evaluators=dict(loss={})))
