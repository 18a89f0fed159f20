"""`--mode=augment`: each record with other words in its text, the same ones however it is run."""

import json
import pathlib
import types

import pytest

from llm_jax.modes.augment import augment

LINES = [
  {'review': 'a good film', 'label': 'x', 'id': 7},
  {'review': '...', 'label': 'y'},
  {'review': 'already a [MASK]', 'label': 'z'},
  {'review': 'too long a text', 'label': 'x'},
  {'review': 'One more word', 'label': 'y'},
]


class Session:
  """Fills in 'neu' or 'old' at each mask; stops after `most` texts."""

  origin, most, beside, causal = pathlib.Path('nowhere'), None, (), False
  config = types.SimpleNamespace(data={'text': 'review', 'label': 'label'})

  def fillings(self, texts, top):
    for count, text in enumerate(texts):
      if count == self.most:
        raise KeyboardInterrupt
      masks = [(('neu', 0.5), ('old', 0.25), ('.', 0.25))] * text.count('[MASK]')
      yield types.SimpleNamespace(masks=masks)

  def fill(self, texts):
    assert not texts

  def check_prompt(self, prompt, sampling):
    if 'long' in prompt:
      raise ValueError('longer than the model takes')


@pytest.fixture
def source(tmp_path):
  (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, LINES)))
  return tmp_path / 'x.jsonl'


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_with_other_words(source, tmp_path):
  augment(Session(), source, tmp_path / 'y.jsonl', rate=0.3)
  first, *faulty, last = found = lines(tmp_path / 'y.jsonl')
  assert [line['label'] for line in found] == list('xyzxy') and first['id'] == 7
  assert first.keys() == {'review', 'label', 'id'}
  for line, old in ((first, LINES[0]), (last, LINES[-1])):
    changed = [
      new
      for new, word in zip(line['review'].split(), old['review'].split(), strict=True)
      if new != word
    ]
    assert len(changed) == 1 and changed[0].lower() in ('neu', 'old')
  for line, message in zip(
    faulty, ('no word', 'holds a [MASK] already', 'longer than'), strict=True
  ):
    assert message in line['error']

  session, target = Session(), tmp_path / 'z.jsonl'
  session.most = 1
  with pytest.raises(KeyboardInterrupt):
    augment(session, source, target, rate=0.3)
  session.most = None
  augment(session, source, target, rate=0.3)
  assert lines(target) == found
  augment(session, source, target, rate=0.9, seed=1)
  assert lines(target)[0]['review'] != first['review']


def test_what_is_not_possible(source, tmp_path):
  with pytest.raises(ValueError, match='--rate=1.5 must be a share of the words'):
    augment(Session(), source, tmp_path / 'y.jsonl', rate=1.5)
  session = Session()
  session.causal = True
  with pytest.raises(ValueError, match='this model is a decoder; a masked LM'):
    augment(session, source, tmp_path / 'y.jsonl')
