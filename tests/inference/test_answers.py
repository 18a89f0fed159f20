"""Answers in files: the same in each kind, gone on with where a call was interrupted."""

import csv
import json
import math

import numpy as np
import pyarrow.parquet
import pytest

from llm_jax.data.sources import parquet
from llm_jax.inference import answers
from llm_jax.inference.records import Records

ROWS = [
  {'text': 'a, "b"\tc', 'n': 1, 'p': math.nan, 'mixed': 1, 'v': np.float32([0.5, math.inf])},
  {'text': '学而\n', 'n': 2, 'p': 0.25, 'mixed': 'x', 'v': np.float32([1, 2])},
  {'error': 'e', 'text': '\ud83d', 'n': None, 'mixed': {'y': 2}},
]


def test_what_is_not_a_number_is_null(tmp_path):
  answers.write(tmp_path / 'x.jsonl', ROWS)
  text = (tmp_path / 'x.jsonl').read_text()
  assert 'NaN' not in text and 'Infinity' not in text
  found = [json.loads(line) for line in text.splitlines()]
  assert found[0]['p'] is None and found[0]['v'] == [0.5, None]
  assert found[1] == {'text': '学而\n', 'n': 2, 'p': 0.25, 'mixed': 'x', 'v': [1.0, 2.0]}
  assert found[2]['text'] == '\ud83d'


def test_tables_hold_the_same(tmp_path):
  answers.write(tmp_path / 'x.csv', ROWS)
  with open(tmp_path / 'x.csv', newline='', encoding='utf-8') as file:
    found = list(csv.DictReader(file))
  assert list(found[0]) == ['text', 'n', 'p', 'mixed', 'v', 'error']  # what is wrong comes last
  assert [row['text'] for row in found] == ['a, "b"\tc', '学而\n', '?']
  assert [row['p'] for row in found] == ['', '0.25', '']
  assert json.loads(found[0]['v']) == [0.5, None] and found[2]['mixed'] == '{"y": 2}'
  answers.write(tmp_path / 'x.tsv', ROWS)
  lines = (tmp_path / 'x.tsv').read_text().splitlines()
  assert len(lines) == 4 and lines[1].startswith('a, "b" c\t1\t')


def test_a_column_of_parquet_has_one_type(tmp_path, monkeypatch):
  monkeypatch.setattr(answers, 'GROUP', 2)  # the third row is of another group
  rows = [*ROWS[:2], {**ROWS[2], 'text': 'z', 'n': 2.5}]
  answers.write(tmp_path / 'x.parquet', rows)
  table = pyarrow.parquet.read_table(tmp_path / 'x.parquet')
  types = {field.name: str(field.type) for field in table.schema}
  assert types == {
    'text': 'string',
    'n': 'double',
    'p': 'double',
    'mixed': 'string',
    'v': 'list<element: double>',
    'error': 'string',
  }
  assert table['mixed'].to_pylist() == ['1', 'x', '{"y": 2}']
  assert table['n'].to_pylist() == [1.0, 2.0, 2.5]
  assert parquet.Table(str(tmp_path / 'x.parquet')).values(0)['v'] == [0.5, None]


def source(tmp_path, lines=7):
  path = tmp_path / 'x.txt'
  if not path.exists():
    path.write_bytes(b''.join(b'%d\n' % i if i != 2 else b'\xff\n' for i in range(lines)))
  return Records(path, {})


def asking(most=None):
  """Vectors of numbers, up to one that fails."""

  def ask(numbered):
    for number, record in numbered:
      if number == most:
        raise KeyboardInterrupt
      yield {'embedding': np.float32([number, int(record['text'])])}

  return ask


@pytest.mark.parametrize('name', ['y.npy', 'y.jsonl', 'y.csv', 'y.parquet'])
def test_an_interrupted_call_goes_on(tmp_path, name, caplog):
  target, whole = tmp_path / name, tmp_path / f'whole-{name}'
  answers.write_answers(source(tmp_path), asking(), whole, 'm', width=2)
  for most in (4, 6):
    with pytest.raises(KeyboardInterrupt):
      answers.write_answers(source(tmp_path), asking(most), target, 'm', width=2)
    assert not target.exists()
    (partial,) = tmp_path.glob('*.partial')
    with open(partial, 'ab') as file:
      file.write(b'{"h')  # half an answer
  with caplog.at_level('INFO', logger='absl'):
    answers.write_answers(source(tmp_path), asking(), target, 'm', width=2)
  assert '6 answers are in' in caplog.text and not list(tmp_path.glob('*.partial'))
  assert target.read_bytes() == whole.read_bytes()
  if name == 'y.npy':
    wanted = [[i, i] if i != 2 else [np.nan, np.nan] for i in range(7)]
    np.testing.assert_array_equal(np.load(target), wanted)


def test_a_target_that_cannot_be_written_says_so(tmp_path):
  records = source(tmp_path)
  with pytest.raises(FileNotFoundError, match='nowhere'):
    answers.write_answers(records, asking(), tmp_path / 'nowhere' / 'y.jsonl', 'm')


def test_another_maker_begins_anew(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    answers.write_answers(source(tmp_path), asking(4), tmp_path / 'y.jsonl', 'm')
  asked = []

  def ask(numbered):
    for number, _ in numbered:
      asked.append(number)
      yield {}

  answers.write_answers(source(tmp_path), ask, tmp_path / 'y.jsonl', 'other')
  assert asked == [0, 1, 3, 4, 5, 6]
  change = lambda row: {'n': len(row)}
  answers.write_answers(source(tmp_path), ask, tmp_path / 'z.jsonl', 'other', change=change)
  assert (tmp_path / 'z.jsonl').read_text().splitlines()[:3] == ['{"n": 1}', '{"n": 1}', '{"n": 1}']


def test_what_a_model_is_known_by(tmp_path):
  (tmp_path / 'model.safetensors').write_bytes(b'1')
  key = answers.model_key(tmp_path, 'x')
  assert key == answers.model_key(tmp_path, 'x') != answers.model_key(tmp_path, 'y')
  (tmp_path / 'model.safetensors').write_bytes(b'12')
  assert key != answers.model_key(tmp_path, 'x')
