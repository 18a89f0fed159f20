"""report.html: what a run says at its end, in one file, with nothing from the data as markup."""

import json
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn import metrics

from llm_jax.training import evaluation, page

LINES = [
  {'step': 1, 'split': 'train', 'loss': 2.0},
  {'step': 1, 'split': 'validation', 'loss': 2.0, 'accuracy': 0.5},
  {'step': 2, 'split': 'validation', 'loss': 1.0, 'accuracy': 0.75, 'x$y$_gap': None},
]
CLASSES = ('<b>', 'v$', 'w')


class Page(HTMLParser):
  """Its tags, its text, and what it would load."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self.sources = [], '', []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.sources += [value for name, value in attributes if name in ('src', 'href')]

  def handle_data(self, data):
    self.text += data


def write(folder, monkeypatch, rows, task, classes):
  """The page of a run whose batches answer themselves."""
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in LINES))
  monkeypatch.setattr(evaluation, 'predictions', lambda *_: lambda batch, keys: batch)
  monkeypatch.setattr(evaluation, 'batches', lambda _, examples: examples)
  predictor = types.SimpleNamespace(task=task, classes=classes) if task else None
  program = types.SimpleNamespace(objective=types.SimpleNamespace(predictor=predictor))
  tokenizer = types.SimpleNamespace(decode=lambda ids: f'<script>{ids.tolist()}')
  page.write(folder, 2, {'loss': 1.0, 'gap': float('nan')}, program, None, tokenizer, rows)
  return Page((folder / 'report.html').read_text())


def batches(key, said, labels):
  """Two rows of two texts of two tokens; the last is not there."""
  rng = np.arange(16).reshape(4, 4)
  weights = np.array([[1, 1], [1, 0]])
  segments = np.tile([1, 1, 2, 2], (2, 1))
  return [
    {
      key: said[i : i + 4].reshape(2, 2, *said.shape[1:]),
      'label': labels[i : i + 4].reshape(2, 2, *labels.shape[1:]),
      'label_weight': weights,
      'tokens': rng[i // 2 : i // 2 + 2],
      'segments': segments,
    }
    for i in (0, 4)
  ]


def test_of_a_classifier(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  said, labels = rng.dirichlet(np.ones(3), 8), np.array([0, 1, 2, 0, 1, 2, 0, 1])
  (tmp_path / 'report.txt').write_text('a <i>report</i>')
  rows = batches('probabilities', said, labels)
  found = write(tmp_path, monkeypatch, rows, 'multiclass', CLASSES)
  counted = [0, 1, 2, 4, 5, 6]
  answer = np.argmax(said, -1)
  wrong = [i for i in counted if answer[i] != labels[i]]
  assert f'{len(wrong)} of 6 answers differ' in found.text and 0 < len(wrong) < 6
  for i in wrong:  # each with its own tokens, which are 2 i and 2 i + 1
    line = (
      f'{said[i].max():.4f}{CLASSES[labels[i]]}{CLASSES[answer[i]]}<script>[{2 * i}, {2 * i + 1}]'
    )
    assert line in found.text.replace('\n', '')
  worst = max(wrong, key=lambda i: said[i].max())
  assert found.text.index('<script>') == found.text.index(f'<script>[{2 * worst},')
  assert 'a <i>report</i>' in found.text and not {'script', 'i', 'b', 'link'} & {*found.tags}
  assert len(found.sources) == 3 and all(s.startswith('data:image/png') for s in found.sources)
  assert 'gapnan' in found.text.replace('\n', '')
  monkeypatch.setattr(page, '_picture', lambda *_: '')
  drawn = []
  monkeypatch.setattr(page, '_confusion', lambda counts, classes: drawn.append(counts))
  write(tmp_path, monkeypatch, rows, 'multiclass', CLASSES)
  wanted = metrics.confusion_matrix(labels[counted], answer[counted], labels=range(3))
  np.testing.assert_array_equal(drawn[0], wanted)


@pytest.mark.parametrize('task', ['regression', 'multilabel'])
def test_of_values_and_of_several_labels(tmp_path, monkeypatch, task):
  said, labels = np.full((8, 3), 0.2), np.zeros((8, 3))
  said[5, 1], labels[1, 2] = 0.9, 1
  key = 'probabilities'
  if task == 'regression':
    key, said, labels = 'values', said[:, 1], labels[:, 2]
  found = write(tmp_path, monkeypatch, batches(key, said, labels), task, CLASSES)
  text = found.text.replace('\n', '')
  if task == 'regression':
    assert 'Largest errors6 of 6' in text and '0.900000.9<script>[10, 11]0.800010.2' in text
  else:
    assert '2 of 6' in text and '0.9000nonev$<script>[10, 11]0.8000wnone<script>[2, 3]' in text
  assert len(found.sources) == 2  # no confusion matrix


def test_of_a_decoder(tmp_path, monkeypatch):
  (tmp_path / 'samples.txt').write_text("step 1\n  'a' -> 'b'\nstep 2\n  'a' -> '<c>'\n")
  found = write(tmp_path, monkeypatch, [{}], None, None)
  assert "step 2\n  'a' -> '<c>'" in found.text and "-> 'b'" not in found.text
