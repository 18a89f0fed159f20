"""`--mode=explain`: what the session says of each line, and what it is worth."""

import csv
import json
import pathlib
import types

import pytest

from llm_jax.inference.explanation import Options
from llm_jax.modes import explain


class Session:
  """Each text's only token has the score 1, and the sum of scores is off by 0.25."""

  config = types.SimpleNamespace(data={'text': 'review'}, objective={'name': 'classify'})
  origin, beside = pathlib.Path('nowhere'), ()

  def explanations(self, records, options):
    for record in records:
      deletion = {'masked': [0, 1], 'by_score': [0.75, 0.25], 'random': [0.75, 0.5]}
      parts = [{'text': record['text'], 'field': 'text', 'span': [0, 1], 'score': 1.0}]
      numbers = {'score': 0.75, 'baseline': 0.5, 'sum': 0.5}
      yield {'label': options.method} | numbers | {'parts': parts, 'deletion': deletion}


def test_an_explanation_per_line(tmp_path, caplog):
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_text('{"review": "ä"}\n{"review": "b"}\n')
  caplog.set_level('INFO', logger='absl')
  explain.explain(Session(), source, target, Options())
  lines = [json.loads(line) for line in target.read_text().splitlines()]
  assert [line['parts'][0]['text'] for line in lines] == ['ä', 'b']
  assert '0.5000 with the highest scores masked first, 0.6250 in random' in caplog.text
  assert 'off by 2.5e-01 at most' in caplog.text
  caplog.clear()
  explain.explain(Session(), source, target, Options('occlusion'))
  assert 'Deletion' in caplog.text and 'Completeness' not in caplog.text


def test_a_line_that_cannot_be_read_and_files_that_are_not_possible(tmp_path, caplog):
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.csv'
  source.write_text('{"review": "a"}\n{"words": "b"}\n')
  explain.explain(Session(), source, target, Options(), text='review')
  with open(target, newline='') as file:
    first, second = csv.DictReader(file)
  assert first['label'] == 'integrated_gradients' and json.loads(first['parts'])[0]['text'] == 'a'
  assert "x.jsonl:2: no field 'review'" in second['error'] and second['label'] == ''
  with pytest.raises(ValueError, match='y.npy must be a .jsonl or .csv'):
    explain.explain(Session(), source, tmp_path / 'y.npy', Options())
  with pytest.raises(ValueError, match='--input=.*x.txt must be a file that exists, one of .jsonl'):
    explain.explain(Session(), tmp_path / 'x.txt', tmp_path / 'y.jsonl', Options())
