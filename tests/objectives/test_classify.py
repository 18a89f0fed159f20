import itertools
import json
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from llm_jax.core import plugins
from llm_jax.data.documents import Memory
from llm_jax.models import encoder
from llm_jax.objectives import classify
from llm_jax.objectives.shared import text_rows
from llm_jax.programs import network as networks

RNG = np.random.default_rng(0)
LETTERS = ('a', 'b', 'c')


def test_row_of_one_text_and_of_a_pair(small):
  tokenizer = small.Tokenizer()
  one = classify.Objective(tokenizer, LETTERS, packing='none').rows(
    small.Documents([[10, 11], [12]], labels=['c', 'a']), 6
  )
  assert len(one) == 2
  row = one.example(0, RNG)
  assert row['tokens'].tolist() == [2, 10, 11, 3, 0, 0] and row['segments'].tolist() == [
    1,
    1,
    1,
    1,
    0,
    0,
  ]
  assert row['positions'].tolist() == [0, 1, 2, 3, 0, 0] and row['token_types'].tolist() == [0] * 6
  assert (row['label'].tolist(), row['label_weight'].tolist()) == ([2], [1]) and row[
    'label'
  ].dtype == np.int32
  assert (row['text_firsts'].tolist(), row['text_lasts'].tolist()) == ([0], [3])
  pair = (
    classify.Objective(tokenizer, LETTERS)
    .rows(small.Documents([[10, 11]], [[20]], ['b']), 8)
    .example(0, RNG)
  )
  assert pair['tokens'].tolist() == [2, 10, 11, 3, 20, 3, 0, 0] and pair[
    'token_types'
  ].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
  last = (
    classify.Objective(tokenizer, LETTERS, pool='last')
    .rows(small.Documents([[10, 11]], [[20]], ['b']), 8)
    .example(0, RNG)
  )
  assert last['tokens'].tolist() == [5, 10, 11, 3, 20, 6, 0, 0]


def test_layout_gives_the_same_row_without_a_label(small):
  tokenizer = small.Tokenizer()
  objective = classify.Objective(tokenizer, LETTERS)
  documents = small.Documents(
    [tokenizer.encode('hello world'), tokenizer.encode('hi')],
    [tokenizer.encode('good'), tokenizer.encode('')],
    ['a', 'b'],
  )
  row, rows = objective.rows(documents, 12).example(0, RNG), objective.layout(documents, 12)
  assert rows.cut == 1 and [rows.texts(i) for i in range(len(rows))] == [[0], [1]]
  encoded = rows.example(0, RNG)
  assert (
    encoded.keys() == row.keys()
    and not encoded['label_weight'].any()
    and row['label_weight'].tolist() == [1, 0, 0]
  )
  for key in row.keys() - {'label', 'label_weight'}:
    np.testing.assert_array_equal(encoded[key], row[key])
  empty = objective.layout(small.Documents([[], [9]]), 8)  # no label: nobody asks
  ids = {0: [2, 3], 1: [2, 9, 3]}
  assert sorted(empty.texts(0)) == [0, 1] and empty.cut == 0
  assert empty.example(0, RNG)['tokens'].tolist() == sum(map(ids.get, empty.texts(0)), []) + [0] * 3


def test_a_packed_row_of_pairs(small):
  documents = small.Documents(
    [[10, 11], [12], [13] * 9], [[20], [21, 22], [23]], labels=['c', None, 'b']
  )
  objective = classify.Objective(small.Tokenizer(), LETTERS, unlabelled='ignore')
  rows = objective.rows(documents, 16)
  assert sorted(map(rows.texts, range(len(rows))), key=len) == [[2], rows.texts(1)] and sorted(
    rows.texts(1)
  ) == [0, 1]
  row, order = rows.example(1, RNG), rows.texts(1)
  ids = {0: [2, 10, 11, 3, 20, 3], 1: [2, 12, 3, 21, 22, 3]}
  types = {0: [0, 0, 0, 0, 1, 1], 1: [0, 0, 0, 1, 1, 1]}
  assert row['tokens'].tolist() == ids[order[0]] + ids[order[1]] + [0] * 4
  assert row['token_types'].tolist() == types[order[0]] + types[order[1]] + [0] * 4
  assert (
    row['segments'].tolist() == [1] * 6 + [2] * 6 + [0] * 4
    and row['positions'].tolist() == [*range(6)] * 2 + [0] * 4
  )
  assert row['text_firsts'].tolist() == [0, 6, 0, 0] and row['text_lasts'].tolist() == [5, 11, 0, 0]
  weights, labels = {0: 1, 1: 0}, {0: 2, 1: 0}
  assert row['label'].tolist() == [labels[i] for i in order] + [0, 0]
  assert row['label_weight'].tolist() == [weights[i] for i in order] + [0, 0]
  assert rows.example(0, RNG).keys() == row.keys()


@settings(deadline=None)
@given(
  lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40),
  seq_len=st.integers(4, 70),
  paired=st.booleans(),
  packing=st.sampled_from(['best_fit', 'none']),
)
def test_every_text_has_one_slot_and_no_row_overflows(small, lengths, seq_len, paired, packing):
  second, labels = (
    [[8] * (n // 2) for n in lengths] if paired else None,
    [LETTERS[i % 3] for i in range(len(lengths))],
  )
  documents = small.Documents([[9 + i % 40] * n for i, n in enumerate(lengths)], second, labels)
  objective = classify.Objective(small.Tokenizer(), LETTERS, packing=packing)
  rows, seen = objective.rows(documents, seq_len), []
  slots = 1 if packing == 'none' else max(1, seq_len // 4)
  for index in range(len(rows)):
    row, texts = rows.example(index, RNG), rows.texts(index)
    seen += texts
    assert (
      row['label'].shape == (slots,)
      and row['tokens'].shape == (seq_len,)
      and 1 <= len(texts) <= slots
    )
    assert row['label_weight'].tolist() == [1] * len(texts) + [0] * (slots - len(texts))
    for slot, text in enumerate(texts):
      first, last = row['text_firsts'][slot], row['text_lasts'][slot]
      n, m = text_rows.fit(
        lengths[text], lengths[text] // 2 if paired else None, seq_len, 2 + paired
      )
      assert row['tokens'][first : last + 1].tolist() == [
        2,
        *[9 + text % 40] * n,
        3,
        *([*[8] * m, 3] if paired else []),
      ]
      assert (row['segments'][first : last + 1] == slot + 1).all() and row['label'][
        slot
      ] == text % 3
  assert sorted(seen) == list(range(len(lengths)))


def test_packing_is_dense_mixes_neighbours_and_says_what_it_does(small, monkeypatch):
  lines = []
  for level in ('info', 'warning'):
    monkeypatch.setattr(logging, level, lambda message, *values: lines.append(message % values))
  lengths = np.random.default_rng(0).integers(4, 40, 2000)
  documents = small.Documents([[9] * n for n in lengths], labels=['a'] * 2000)
  rows = classify.Objective(small.Tokenizer(), LETTERS).rows(documents, 128)
  tokens = int(np.sum(lengths + 2))
  assert tokens / (128 * len(rows)) > 0.99
  assert lines == [
    f'classify: 2000 texts in {len(rows)} rows of 128 tokens, '
    f'{100 * tokens / 128 / len(rows):.1f}% of which are used (one text per row: '
    f'{100 * tokens / 128 / 2000:.1f}%). With {2000 / len(rows):.2f} texts per row, a step of '
    'batch_size rows learns from so many times more texts.'
  ]
  again = classify.Objective(small.Tokenizer(), LETTERS).rows(documents, 128)
  assert [rows.texts(i) for i in range(len(rows))] == [again.texts(i) for i in range(len(rows))]
  lines.clear()
  same = classify.Objective(small.Tokenizer(), LETTERS).rows(
    small.Documents([[9] * 6] * 400, labels=['a'] * 400), 32
  )
  apart = [np.ptp(same.texts(i)) for i in range(len(same))]
  assert len(same) == 100 and np.mean(apart) > 100  # four neighbours of the corpus would be 3 apart
  classify.Objective(small.Tokenizer(), LETTERS).rows(
    small.Documents([[]] * 400, labels=['a'] * 400), 32
  )
  assert 'takes at most 8 texts, and most rows have so many' in lines[-1]
  lines.clear()
  classify.Objective(small.Tokenizer(), LETTERS, packing='none').rows(documents, 128)
  assert not lines


def test_fit_takes_arrays():
  first, second = np.random.default_rng(0).integers(0, 30, (2, 200))
  for both in (second, None):
    special = 2 if both is None else 3
    n, m = text_rows.fit(first, both, 17, special)
    for i, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
      alone = text_rows.fit(a, None if both is None else b, 17, special)
      assert (n[i], None if both is None else m[i]) == alone


@given(st.integers(0, 40), st.none() | st.integers(0, 40), st.integers(4, 30))
def test_fit_cuts_the_longer_text_first(first, second, seq_len):
  n, m = text_rows.fit(first, second, seq_len, 2 if second is None else 3)
  if second is None:
    assert (n, m) == (min(first, seq_len - 2), None)
    return
  while first + second > seq_len - 3:  # BERT's own loop
    first, second = (first - 1, second) if first > second else (first, second - 1)
  assert n + m == first + second and {n, m} == {first, second}


def test_cuts_are_counted_and_logged_once(small, monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'warning', lambda message, *values: lines.append(message % values))
  documents = small.Documents([[9] * 10, [9] * 4, [9] * 7], labels=['a', 'b', 'a'])
  objective = classify.Objective(small.Tokenizer(), LETTERS)
  rows = objective.rows(documents, 7)
  assert rows.cut == 2
  assert len(lines) == 1 and '2 of 3 documents' in lines[0] and 'lose 7 of 21 tokens' in lines[0]
  assert [rows.example(i, RNG)['tokens'].tolist() for i in (0, 2)] == [[2, 9, 9, 9, 9, 9, 3]] * 2
  objective.rows(documents, 12)
  assert len(lines) == 1


@pytest.mark.parametrize(
  'options, labels, message',
  [
    (
      {},
      ['a', 'd'],
      r"document 1 has the label 'd'; it must be one of the 3 classes of .*documents \(a, b, c\)",
    ),
    ({}, ['a', ['b']], r"document 1 has the label \['b'\]"),
    ({}, ['a', None], 'document 1 has no label.*unlabelled=ignore'),
    ({}, None, 'needs labels and this corpus has none.*config.data.label'),
    ({'task': 'multilabel'}, [['a'], 'b'], "document 1 has the label 'b'; it must be a list"),
    (
      {'task': 'multilabel'},
      [['a'], ['b', 'x']],
      r"document 1 has the label \['b', 'x'\]; it must be one of",
    ),
    (
      {'task': 'regression'},
      [1.5, 'much'],
      "document 1 has the label 'much'; it must be a finite number",
    ),
    (
      {'task': 'regression'},
      [1.5, float('nan')],
      'document 1 has the label nan; it must be a finite number',
    ),
    (
      {'task': 'regression'},
      [1.5, True],
      'document 1 has the label True; it must be a finite number',
    ),
  ],
)
def test_labels_that_cannot_be(small, options, labels, message):
  classes = None if options.get('task') == 'regression' else LETTERS
  with pytest.raises(ValueError, match=message):
    classify.Objective(small.Tokenizer(), classes, **options).rows(
      small.Documents([[9], [9]], labels=labels), 8
    )


def test_labels_that_can_be(small):
  def labels(classes, given, **options):
    documents = small.Documents([[9], [9]], labels=given)
    rows = classify.Objective(small.Tokenizer(), classes, packing='none', **options).rows(
      documents, 8
    )
    examples = [rows.example(i, RNG) for i in range(2)]
    return [
      (example['label'][0].tolist(), float(example['label_weight'][0])) for example in examples
    ]

  assert labels(LETTERS, ['b', None], unlabelled='ignore') == [(1, 1.0), (0, 0.0)]
  assert labels(LETTERS, None, unlabelled='ignore') == [(0, 0.0), (0, 0.0)]
  assert labels(('0', '1'), ['1', '0'], task='binary') == [(1, 1.0), (0, 1.0)]
  assert labels(LETTERS, [['c', 'a'], []], task='multilabel') == [
    ([1, 0, 1], 1.0),
    ([0, 0, 0], 1.0),
  ]
  assert labels(None, [2.5, '-1'], task='regression') == [(2.5, 1.0), (-1.0, 1.0)]


def test_classes_are_derived_from_the_training_documents(small, monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'info', lambda message, *values: lines.append(message % values))

  def derived(*labels, **options):
    documents = [small.Documents([[9]] * len(names), labels=names) for names in labels]
    return classify.Objective.derive(options, documents)

  assert derived(['10', '9', '9', '-1', None]) == {'classes': ('-1', '9', '10')}
  assert lines == ['3 classes: -1, 9, 10']
  assert derived(['10'], ['9', 'b'], classes=None) == {'classes': ('10', '9', 'b')}
  assert derived([['b', 'a'], []], [['c']], task='multilabel') == {'classes': ('a', 'b', 'c')}
  assert derived([None], ['x']) == {'classes': ('x',)}
  assert derived(['a', 'b'], classes=('b', 'a')) == {} == derived([1.5], task='regression')
  for labels in ([None], ([])):
    with pytest.raises(ValueError, match='needs labels and this corpus has none'):
      derived(labels)
  with pytest.raises(ValueError, match=r'numbers such as 1.5 .document 1.; set config.*task'):
    derived(['a'], ['b', 1.5])
  with pytest.raises(ValueError, match=r"document 0: the label \['1', '0'\] says by zeros"):
    derived([['1', '0'], ['0', '0']], task='multilabel')
  lists = [['1', '0'], ['0', '1', '1']]  # of different lengths: names, if odd ones
  assert derived(lists, task='multilabel') == {'classes': ('0', '1')}


@pytest.mark.parametrize(
  'labels, said',
  [
    (['1', '2', '1.0'], r"document 2: the classes '1.0' and '1' .document 0. differ only in how"),
    (['x', 'y', ' x'], r"document 2: the classes ' x' and 'x' .document 0. differ only"),
    (['x', '"x"'], r"document 1: the classes '\"x\"' and 'x'"),
    (['b', 'NaN'], r"document 1: the class 'NaN' often means that there is no label"),
    (['-1', '0', '1'], r"document 0: the class '-1' often means"),
  ],
)
def test_labels_that_may_be_a_mistake_are_named(small, caplog, labels, said):
  found = classify.Objective.derive({}, [small.Documents([[9]] * len(labels), labels=labels)])
  assert set(found['classes']) == set(labels)
  assert re.search(said, caplog.text)


def test_classes_are_in_an_order_without_chance(small):
  """'nan' is no number to sort by: with it, an order by value would depend on the set's."""
  names = ['3.0', 'nan', '1.0', '2.0', '0.0']
  for labels in itertools.permutations(names):
    found = classify.Objective.derive({}, [small.Documents([[9]] * 5, labels=list(labels))])
    assert found['classes'] == ('0.0', '1.0', '2.0', '3.0', 'nan')


@pytest.mark.parametrize('paired', [False, True])
@pytest.mark.parametrize('task', ['multiclass', 'binary', 'multilabel', 'regression'])
def test_made_up_records_give_rows_like_real_ones(small, task, paired):
  classes = {'regression': None, 'binary': ('a', 'b')}.get(task, LETTERS)
  objective, tokenizer = classify.Objective(small.Tokenizer(), classes, task), small.Tokenizer()
  options = {'task': task, 'classes': classes}
  records = classify.Objective.sample_records(options)
  if paired:
    records = [record | {'pair': 'x'} for record in records]
  template = objective.rows(Memory(records, objective.encode, tokenizer), 32).example(0, RNG)
  label = {'regression': 2.0, 'multilabel': []}.get(task, 'a')
  real = small.Documents([[9], [10]], [[8], [7]] if paired else None, [label] * 2)
  row = objective.rows(real, 32).example(0, RNG)
  assert {k: (v.shape, v.dtype) for k, v in template.items()} == {
    k: (v.shape, v.dtype) for k, v in row.items()
  }
  assert template['label_weight'].any() and objective.flops(None, {}) == 0
  options['classes'] = None  # made-up records have two
  memory = Memory(classify.Objective.sample_records(options), objective.encode, tokenizer)
  derived = classify.Objective.derive(options, [memory])
  assert derived == ({} if task == 'regression' else {'classes': ('0', '1')})


@pytest.mark.parametrize(
  'options, message',
  [
    ({'task': 'many'}, "task='many'.*multiclass, binary, multilabel, regression"),
    ({'pool': 'max'}, "pool='max'.*cls, mean, last"),
    ({'packing': 'windows'}, "packing='windows' must be one of best_fit, none"),
    ({'unlabelled': 'skip'}, "unlabelled='skip'"),
    ({'dropout': 1.0}, 'dropout=1.0'),
    ({'classes': None}, 'at least 2 different classes, not none'),
    ({'classes': ('a',)}, 'at least 2 different classes, not a;'),
    ({'classes': ('a', 'a')}, 'not a, a'),
    ({'task': 'binary'}, 'exactly 2 different classes, not a, b, c'),
    ({'task': 'regression'}, 'classes=a, b, c has no meaning'),
  ],
)
def test_refuses(small, options, message):
  with pytest.raises(ValueError, match=message):
    classify.Objective(small.Tokenizer(), **{'classes': LETTERS} | options)


def test_other_refusals_and_the_config_section(small):
  with pytest.raises(ValueError, match="rows='classify'"):
    classify.Objective(small.Tokenizer(), LETTERS).transform({'tokens': np.zeros(4, np.int32)}, RNG)
  with pytest.raises(ValueError, match='seq_len=3 must be more than the 3'):
    classify.Objective(small.Tokenizer(), LETTERS).layout(small.Documents([[9]], [[9]]), 3)
  made = plugins.construct(
    'objective',
    classify.Objective,
    {'classes': ['x', 'y'], 'dropout': 0},
    tokenizer=small.Tokenizer(),
  )
  assert made.classes == ('x', 'y')
  with pytest.raises(ValueError, match="config.objective.droput.*'dropout'"):
    plugins.construct('objective', classify.Objective, {'droput': 0.2}, tokenizer=small.Tokenizer())


def values(small, task, pool='cls'):
  """Loss metrics, predictions and float64 logits on five rows, the last of them unlabelled."""
  rng = np.random.default_rng(5)
  classes = {
    'multiclass': LETTERS,
    'multilabel': LETTERS,
    'binary': ('no', 'yes'),
    'regression': None,
  }[task]
  objective = classify.Objective(small.Tokenizer(), classes, task=task, pool=pool)
  net = small.network(classifier=3 if classes == LETTERS else 1)
  hidden, lengths = rng.normal(size=(5, 7, 6)).astype(np.float32), np.array([7, 3, 1, 4, 0])
  lasts = np.maximum(lengths - 1, 0)
  label = {
    'multiclass': np.array([0, 2, 1, 1, 0], np.int32),
    'binary': np.array([1, 0, 1, 1, 0], np.int32),
    'multilabel': rng.integers(0, 2, (5, 3)).astype(np.float32),
    'regression': rng.normal(size=5).astype(np.float32),
  }[task]
  batch = {
    'segments': (np.arange(7) < lengths[:, None]).astype(np.int32),
    'label': label[:, None],
    'label_weight': np.array([1, 1, 1, 1, 0], np.float32)[:, None],
    'text_firsts': np.zeros((5, 1), np.int32),
    'text_lasts': lasts[:, None],
  }
  read = {
    'cls': hidden[:, 0],
    'last': hidden[np.arange(5), lasts],
    'mean': np.stack([h[: max(n, 1)].mean(0) for h, n in zip(hidden, lengths, strict=True)]),
  }[pool]
  logits = read.astype(np.float64) @ net.matrices['classifier']
  metrics = {
    k: [float(x) for x in v]
    for k, v in objective.loss(net, small.read(objective, hidden, batch), batch).items()
  }
  predictions = {
    k: np.asarray(v)[:, 0]
    for k, v in objective.predict(net, small.read(objective, hidden, batch), batch).items()
  }
  return objective, metrics, predictions, logits[:4], label[:4]


def test_a_teacher_teaches_texts_without_labels_too(small):
  texts = [[10, 11], [12], [13] * 6, [14, 15]]
  documents = small.Documents(texts, labels=['c', None, 'b', None])
  objective = classify.Objective(small.Tokenizer(), LETTERS, unlabelled='ignore')
  rows = objective.rows(documents, 16)
  batch = small.stack([rows.example(i, RNG) for i in range(len(rows))])
  rng, net = np.random.default_rng(0), small.network(classifier=3)
  hidden = rng.normal(size=(*batch['tokens'].shape, 6)).astype(np.float32)
  taught = rng.normal(size=(*batch['label'].shape, 3))
  read = small.read(objective, hidden, batch)
  total, count = objective.distilled(net, read, jnp.float32(taught), batch, 2.0)
  assert count == len(texts) and batch['label_weight'].sum() == 2
  wanted = 0
  for row, slot in np.argwhere(batch['text_lasts'] > 0):
    ours = hidden[row, batch['text_firsts'][row, slot]] @ net.matrices['classifier'] / 2
    p, q = (np.exp(x) / np.exp(x).sum() for x in (taught[row, slot] / 2, ours))
    wanted += 4 * (p * np.log(p / q)).sum()
  assert total == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize('pool', ['cls', 'mean', 'last'])
def test_multiclass(small, pool):
  objective, metrics, predictions, logits, label = values(small, 'multiclass', pool)
  np.testing.assert_allclose(
    metrics['classify'], [small.cross_entropy(logits, label).sum(), 4], rtol=1e-5
  )
  assert metrics['classify_accuracy'] == [(logits.argmax(-1) == label).sum(), 4]
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(predictions['probabilities'][:4], p, rtol=1e-4)
  said = objective.describe({'probabilities': predictions['probabilities'][1]})
  assert said['label'] == LETTERS[p[1].argmax()]
  assert said['probability'] == pytest.approx(p[1].max(), rel=1e-4)
  assert json.loads(json.dumps(said)) == said and list(said['probabilities']) == list(LETTERS)
  assert objective.terms == {'classify': 1.0} and objective.predictor is objective
  assert objective.evaluators == ('loss', 'classification')
  assert objective.targets({}) is None and objective.summary({}) == {}


def test_binary(small):
  objective, metrics, predictions, logits, label = values(small, 'binary')
  p = 1 / (1 + np.exp(-logits[:, 0]))
  np.testing.assert_allclose(
    metrics['classify'], [-np.log(np.where(label == 1, p, 1 - p)).sum(), 4], rtol=1e-5
  )
  assert metrics['classify_accuracy'] == [((p > 0.5) == label).sum(), 4]
  np.testing.assert_allclose(predictions['probabilities'][:4], np.stack([1 - p, p], -1), rtol=1e-4)
  assert objective.describe({'probabilities': predictions['probabilities'][0]})['label'] == (
    'yes' if p[0] > 0.5 else 'no'
  )


def test_multilabel(small):
  objective, metrics, predictions, logits, label = values(small, 'multilabel')
  p = 1 / (1 + np.exp(-logits))
  np.testing.assert_allclose(
    metrics['classify'], [-np.log(np.where(label == 1, p, 1 - p)).mean(-1).sum(), 4], rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics['classify_accuracy'], [((p > 0.5) == label).mean(-1).sum(), 4], rtol=1e-6
  )
  np.testing.assert_allclose(predictions['probabilities'][:4], p, rtol=1e-4)
  said = objective.describe({'probabilities': predictions['probabilities'][0]})
  assert said['label'] == [name for name, x in zip(LETTERS, p[0], strict=True) if x > 0.5]


def test_regression(small):
  objective, metrics, predictions, logits, label = values(small, 'regression')
  np.testing.assert_allclose(
    metrics['classify'], [((logits[:, 0] - label) ** 2).sum(), 4], rtol=1e-5
  )
  assert metrics.keys() == {'classify'}
  np.testing.assert_allclose(predictions['values'][:4], logits[:, 0], rtol=1e-4, atol=1e-6)
  assert objective.describe({'values': predictions['values'][0]}) == {
    'value': float(predictions['values'][0])
  }


def test_head_dropout_acts_only_where_the_stream_is_given(small):
  model = encoder.Model(vocab_size=50, dim=8, layers=1, heads=2, mlp_dim=16, max_len=8)
  objective = classify.Objective(small.Tokenizer(), LETTERS, dropout=0.5)
  heads = objective.heads(model)
  assert set(heads) == {'pooler', 'classifier'}
  assert heads['classifier'].bias
  last = classify.Objective(small.Tokenizer(), LETTERS, pool='last').heads(model)
  assert set(last) == {'classifier'} and not last['classifier'].bias
  with pytest.raises(ValueError, match="pool='cls' reads the first token, which in a causal model"):
    objective.check(types.SimpleNamespace(causal=True))

  class Net(nn.Module):
    heads: dict

    def __call__(self, hidden_B1D):
      return objective.logits(types.SimpleNamespace(heads=self.heads), hidden_B1D, {})

  net, hidden = Net(heads), jnp.ones((2, 1, 8))
  variables = net.init(jax.random.PRNGKey(0), hidden)
  plain, again = net.apply(variables, hidden), net.apply(variables, hidden)
  dropped = net.apply(variables, hidden, rngs={'dropout': jax.random.PRNGKey(1)})
  assert plain.shape == (2, 1, 3)
  np.testing.assert_array_equal(plain, again)
  assert np.abs(dropped - plain).max() > 1e-3


@pytest.mark.parametrize('task', ['multiclass', 'binary', 'multilabel', 'regression'])
def test_r_drop(small, task):
  """Equations 3 and 4 of its paper, with the mean of both passes' losses."""
  classes = {'multiclass': LETTERS, 'binary': LETTERS[:2], 'multilabel': LETTERS}.get(task)
  labels = {
    'multiclass': ['c', 'a'],
    'binary': ['b', 'a'],
    'multilabel': [['a', 'c'], []],
    'regression': [1.5, -1.0],
  }[task]
  options = dict(task=task, pool='last', packing='none')
  objective = classify.Objective(small.Tokenizer(), classes, r_drop=3.0, **options)
  assert objective.terms == {'classify': 1.0, 'r_drop': 3.0}
  rows = objective.rows(small.Documents([[10], [12]], labels=labels), 6)
  batch = small.stack([rows.example(i, RNG) for i in range(2)])
  size = 3 if task in ('multiclass', 'multilabel') else 1
  a, b = np.random.default_rng(1).normal(size=(2, 2, 1, size))
  forward = lambda batch, positions: types.SimpleNamespace(hidden=b)
  net = types.SimpleNamespace(heads={'classifier': jnp.asarray}, forward=forward, train=True)
  found = objective.loss(net, a, batch)
  plain = classify.Objective(small.Tokenizer(), classes, **options)
  alone = [float(plain.loss(net, x, batch)['classify'][0]) for x in (a, b)]
  assert float(found['classify'][0]) == pytest.approx(np.mean(alone), rel=1e-5)
  if task == 'regression':
    wanted = ((a - b) ** 2).sum()
  elif task == 'multiclass':
    p, q = special.softmax(a, -1), special.softmax(b, -1)
    wanted = (special.rel_entr(p, q) + special.rel_entr(q, p)).sum() / 2
  else:
    p, q = special.expit(a), special.expit(b)
    both = special.rel_entr(p, q) + special.rel_entr(q, p)
    both += special.rel_entr(1 - p, 1 - q) + special.rel_entr(1 - q, 1 - p)
    wanted = both.sum() / 2 / size
  assert tuple(map(float, found['r_drop'])) == (pytest.approx(wanted, rel=1e-4), 2)
  net.train = False  # without dropout the second pass is the first
  silent = objective.loss(net, a, batch)
  assert float(silent['r_drop'][0]) == 0
  assert float(silent['classify'][0]) == pytest.approx(alone[0], rel=1e-6)


@pytest.mark.slow
def test_the_two_passes_of_r_drop_have_different_dropout(small):
  shape = dict(vocab_size=50, dim=8, layers=2, heads=2, mlp_dim=16, max_len=8)
  model = encoder.Model(**shape, dropout=0.2, attention_dropout=0.0, unroll=0)
  objective = classify.Objective(small.Tokenizer(), LETTERS, r_drop=1.0, dropout=0.0)
  rows = objective.rows(small.Documents([[10, 11], [12]], labels=['c', 'a']), 8)
  batch = small.stack([rows.example(i, RNG) for i in range(len(rows))])
  network = networks.Network(model, objective.heads(model), objective)
  params = nn.meta.unbox(network.init(jax.random.PRNGKey(0), batch)['params'])
  rngs = {'dropout': jax.random.PRNGKey(1)}
  trained = networks.apply(network, params, batch, rngs=rngs, train=True)
  assert float(trained['r_drop'][0]) > 0
  assert float(networks.apply(network, params, batch)['r_drop'][0]) == 0
  still = model.clone(dropout=0.0)
  with pytest.raises(ValueError, match='r_drop=1.0 compares two passes under dropout, and there'):
    objective.check(still)
  with pytest.raises(ValueError, match='objective.r_drop=-1.0 must be a number from 0 on'):
    classify.Objective(small.Tokenizer(), LETTERS, r_drop=-1.0)
