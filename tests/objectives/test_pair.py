import types

import numpy as np
import pytest
from scipy import special

from llm_jax.core import contracts
from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.evaluators import similarity
from llm_jax.objectives import pair

RNG = np.random.default_rng(0)
TOKENIZER = byte.create()


def record(text, other, label=None):
  found = {'text': text, 'pair': other}
  return found if label is None else found | {'label': label}


RECORDS = [record('ab', 'cd', 4), record('e', 'f', '1.5'), record('gh', 'i', 1.5)]
RECORDS += [record('jk', 'l', 0.0), record('m', 'no')]


def memory(*records):
  return Memory(records, pair.Objective.encode, TOKENIZER)


def made(loss='bce', **options):
  return pair.Objective(TOKENIZER, loss, **dict(range=(0, 5), unlabelled='ignore') | options)


def batch_of(objective, records=RECORDS, seq_len=20):
  rows = objective.rows(memory(*records), seq_len)
  examples = [rows.example(i, RNG) for i in range(len(rows))]
  return rows, {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def scored(loss, **options):
  """An objective whose raw scores are drawn, these, their labels, and what it says of the batch."""
  objective = made(loss, **options)
  rows, batch = batch_of(objective)
  assert len(rows) > 1
  scores = np.random.default_rng(3).normal(size=batch['label'].shape)
  objective.logits = lambda net, hidden, batch: scores[..., None].astype(np.float32)
  metrics = objective.loss(None, None, batch)
  if objective.compares:
    assert metrics == {}
    metrics = objective.compare(objective.represent(None, None, batch), batch)
  known = batch['label_weight'] > 0
  metrics = {name: tuple(map(float, value)) for name, value in metrics.items()}
  return objective, batch, scores[known], batch['label'][known].astype(float), metrics


def test_the_losses_of_each_pair():
  _, _, s, y, found = scored('bce')
  assert sorted(y) == [0, 1.5, 1.5, 4]
  p = special.expit(s)
  bce = -(y / 5 * np.log(p) + (1 - y / 5) * np.log(1 - p)).sum()
  assert found == {'pair': (pytest.approx(bce, rel=1e-5), 4)}
  _, _, s, y, found = scored('mse')
  assert found == {'pair': (pytest.approx(((s - y) ** 2).sum(), rel=1e-5), 4)}


def test_the_losses_that_compare_all_records_of_the_batch():
  _, _, s, y, found = scored('pairwise', scale=2.0)
  apart = [s[j] - s[i] for i in range(4) for j in range(4) if y[i] > y[j]]
  assert len(apart) == 5  # of six, two labels are equal
  ranknet = sum(np.log1p(np.exp(2 * d)) for d in apart)
  assert found['pair'] == (pytest.approx(ranknet, rel=1e-5), 5)
  right = sum(d < 0 for d in apart)
  assert found['pair_accuracy'] == (right, 5) and 0 < right < 5
  *_, found = scored('cosent', scale=2.0)
  cosent = np.log(1 + sum(np.exp(2 * d) for d in apart))
  assert found['pair'] == (pytest.approx(cosent, rel=1e-5), 1)


def test_a_batch_of_equal_labels_counts_nothing():
  for loss in pair.RANKING:
    objective = made(loss)
    _, batch = batch_of(objective, [record('a', 'b', 1), record('c', 'd', 1), record('e', 'f')])
    found = objective.compare({'scores': np.zeros(batch['label'].shape, np.float32)}, batch)
    assert found['pair'] == (0, 0) and found['pair_accuracy'] == (0, 0)


def test_answers_lie_in_the_range_of_the_labels():
  objective, batch, *_ = scored('bce', range=(-2, 5))
  rows, raw = objective.layout(memory(*RECORDS, {'text': 'alone'}), 20), objective.logits(0, 0, 0)
  values = np.asarray(objective.predict(None, None, batch)['values'])
  np.testing.assert_allclose(values, -2 + 7 * special.expit(raw[..., 0]), rtol=1e-5)
  plain = scored('mse')[0]
  np.testing.assert_array_equal(plain.predict(None, None, batch)['values'], raw[..., 0])
  said = {}
  for index in range(len(rows)):
    row = {'values': np.arange(5) / 2}
    said |= dict(zip(rows.texts(index), objective.answers(row, rows, index), strict=True))
  assert said[5] == {'score': None}  # a text without a second one
  assert all(isinstance(said[text]['score'], float) for text in range(5))


def test_answers_are_scored_by_correlations():
  from scipy import stats

  objective = made()
  rows, _ = batch_of(objective)
  assert [rows.label(text) for text in range(5)] == [4.0, 1.5, 1.5, 0.0, None]
  values = RNG.normal(size=(len(rows), rows.slots))
  given = contracts.Validation(
    types.SimpleNamespace(predictor=objective),
    terms={},
    tokenizer=None,
    batches=lambda: [{}],
    losses=None,
    predict=lambda batch, keys: {'values': values},
    rows=[(rows, index) for index in range(len(rows))],
  )
  numbers, _ = similarity.Evaluator().evaluate(given)
  by_text = {
    text: values[index, slot]
    for index in range(len(rows))
    for slot, text in enumerate(rows.texts(index))
  }
  wanted = stats.spearmanr([by_text[text] for text in range(4)], [4, 1.5, 1.5, 0]).statistic
  assert numbers['spearman'] == pytest.approx(wanted)


@pytest.mark.parametrize(
  ('records', 'message'),
  [
    ([record('a', 'b', 6)], 'document 0 has the label 6; it must be from 0 to 5, or config.obj'),
    ([record('a', 'b', 1), record('a', 'b', -0.1)], 'document 1 has the label -0.1; it must be'),
    ([record('a', 'b', 'much')], "document 0 has the label 'much'; it must be a finite number"),
    ([record('a', 'b', float('inf'))], 'document 0 has the label inf; it must be a finite'),
    ([record('a', 'b', True)], 'document 0 has the label True; it must be a finite number'),
    ([record('a', 'b', [1.0])], r'document 0 has the label \[1.0\]; it must be a finite number'),
    ([record('a', 'b', 1), record('a', 'b')], 'document 1 has no label; give it one, or set'),
    ([record('a', 'b', 1), record('a', '', 1)], 'document 1 has no second text to compare'),
    ([{'text': 'a', 'label': 1}], 'document 0 has no second text .*config.data.pair names its'),
  ],
)
def test_records_that_cannot_be(records, message):
  with pytest.raises(ValueError, match=message):
    made(unlabelled='error').rows(memory(*records), 20)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(loss='hinge'), "objective.loss='hinge' must be one of bce, mse, pairwise, cosent"),
    (dict(range=(5, 0)), r'objective.range=\(5, 0\) must be the lowest and the highest label'),
    (dict(range=(0, 1, 2)), r'objective.range=\(0, 1, 2\) must be'),
    (dict(range=(0, 'x')), r"objective.range=\(0, 'x'\) must be"),
    (dict(range=(0, float('inf'))), r'objective.range=\(0, inf\) must be'),
    (dict(loss='cosent', scale=0.0), 'objective.scale=0.0 must be a number above 0'),
    (dict(scale=20.0), r"scale=20.0 is of the losses that compare .*with loss='bce' leave it out"),
    (dict(pool='max'), "objective.pool='max' must be one of"),
  ],
)
def test_wrong_options(options, message):
  with pytest.raises(ValueError, match=message):
    made(**options)


def test_what_has_no_gradient():
  bias, kernel = (f'heads_classifier/dense/{name}' for name in ('bias', 'kernel'))
  assert made('cosent').no_gradient(bias) and not made('bce').no_gradient(bias)
  assert made('cosent').no_gradient(kernel) is None
  with pytest.raises(ValueError, match="objective pair labels .* set rows='pair'"):
    made().transform({'tokens': np.zeros(3)}, RNG)
