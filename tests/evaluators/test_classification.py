import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.evaluators import classification


def run(task, classes, predictions, labels, weights, each=2, slices=None):
  """Scores in batches of `each` rows of two texts, the last row filled up; the step gives device
  arrays.
  """
  key = 'values' if task == 'regression' else 'probabilities'
  even = lambda x: np.append(x, np.zeros_like(x[: len(x) % 2]), axis=0)
  predictions, labels, weights = (
    x.reshape(-1, 2, *x.shape[1:]) for x in map(even, (predictions, labels, weights))
  )
  batches = [
    {
      'label': labels[i : i + each],
      'label_weight': weights[i : i + each],
      'x': predictions[i : i + each],
    }
    for i in range(0, len(labels), each)
  ]
  predict = lambda b: {
    key: jnp.asarray(b['x']),
    'label': b['label'],
    'label_weight': b['label_weight'],
  }
  return classification.evaluate(
    predict, batches, types.SimpleNamespace(task=task, classes=classes), slices or {}
  )


def f1(truth, guess):
  hits = np.sum(truth & guess)
  return 2 * hits / max(np.sum(truth) + np.sum(guess), 1)


def test_multiclass_by_hand():
  truth, guess = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 0]), np.array([0, 0, 1, 1, 2, 2, 2, 0, 2, 3])
  weights = np.array([1] * 9 + [0], np.float32)  # the last row fills up the batch
  scores, report = run(
    'multiclass', ('u', 'v', 'w', 'x'), np.eye(4)[guess] * 0.9 + 0.02, truth, weights
  )
  t, g = truth[:9], guess[:9]
  assert scores['accuracy'] == pytest.approx(6 / 9)
  assert scores['macro_f1'] == pytest.approx(np.mean([f1(t == c, g == c) for c in range(3)]))
  # Gorodkin's R_K (2004) from the confusion counts.
  s, c = 9, 6
  guessed, true = np.bincount(g, minlength=4), np.bincount(t, minlength=4)
  mcc = (c * s - guessed @ true) / math.sqrt((s * s - guessed @ guessed) * (s * s - true @ true))
  assert scores['mcc'] == pytest.approx(mcc)
  assert all(name in report for name in ('u', 'v', 'w', 'macro avg')) and ' x ' not in report


def test_binary_by_hand():
  truth, p = np.array([1, 1, 0, 0, 0, 1]), np.array([0.9, 0.4, 0.2, 0.6, 0.1, 0.8])
  scores, report = run('binary', ('no', 'yes'), np.stack([1 - p, p], -1), truth, np.ones(6))
  tp, tn, fp, fn = 2, 2, 1, 1
  mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  assert (
    scores == pytest.approx({'accuracy': 4 / 6, 'macro_f1': 4 / 6, 'mcc': mcc}) and 'yes' in report
  )


def test_multilabel_by_hand():
  truth = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], np.float32)
  p = np.array([[0.9, 0.2, 0.8], [0.6, 0.7, 0.1], [0.8, 0.3, 0.2], [0.1, 0.1, 0.1], [0, 0, 0]])
  scores, report = run('multilabel', ('u', 'v', 'w'), p, truth, np.array([1, 1, 1, 1, 0]))
  t, g = truth[:4] > 0, p[:4] > 0.5
  macro = np.mean([f1(t[:, c], g[:, c]) for c in range(3)])
  assert scores == pytest.approx({'accuracy': 2 / 4, 'micro_f1': f1(t, g), 'macro_f1': macro})
  assert 'micro avg' in report
  scores, report = run('multilabel', ('u',), p[:, :1], truth[:, :1], np.array([1, 1, 1, 1, 0]))
  assert (
    scores == pytest.approx({'accuracy': 3 / 4, 'micro_f1': 0.8, 'macro_f1': 0.8})
    and 'u: f1 0.8000' in report
  )


def test_regression_by_hand():
  rng = np.random.default_rng(0)
  truth = rng.normal(size=11)
  guess = truth**3 + 0.3 * rng.normal(size=11)
  weights = np.array([1] * 10 + [0])
  scores, report = run(
    'regression', None, guess.astype(np.float32), truth.astype(np.float32), weights
  )
  t, g = truth[:10], guess[:10]
  rank = lambda x: np.argsort(np.argsort(x))
  wanted = {
    'pearson': np.corrcoef(t, g)[0, 1],
    'spearman': np.corrcoef(rank(t), rank(g))[0, 1],
    'mse': np.mean((t - g) ** 2),
  }
  assert scores == pytest.approx(wanted, rel=1e-5) and 'spearman' in report
  constant, _ = run('regression', None, np.zeros(11), truth, weights)
  assert math.isnan(constant['pearson']) and constant['mse'] == pytest.approx(np.mean(t**2))


def test_as_a_plug_in():
  """It asks the objective's predictor, and for the labels of all hosts' rows."""
  batches = [{'x': [[0.9], [0.2]], 'y': [[0], [1]]}, {'x': [[0.7], [0.1]], 'y': [[1], [1]]}]

  def predict(batch, keys):
    p = np.asarray(batch['x'])
    rows = {'label': np.asarray(batch['y']), 'label_weight': np.ones((2, 1))}
    return {'probabilities': jnp.stack([p, 1 - p], -1)} | {key: rows[key] for key in keys}

  def validation(predictor):
    return contracts.Validation(
      objective=types.SimpleNamespace(predictor=predictor),
      terms={},
      tokenizer=None,
      batches=lambda: iter(batches),
      losses=None,
      predict=predict,
    )

  predictor = types.SimpleNamespace(task='binary', classes=('no', 'yes'))
  numbers, report = classification.Evaluator().evaluate(validation(predictor))
  assert numbers['accuracy'] == 3 / 4 and 'yes' in report
  for other in (None, types.SimpleNamespace(task='spans')):
    with pytest.raises(ValueError, match="'classification' scores labels.*not one of multiclass"):
      classification.Evaluator().evaluate(validation(other))


def test_slices_follow_their_texts():
  """Each group's texts are found in the rows and slots where they stand, past those without a
  label.
  """
  truth = np.arange(50) % 2
  groups = np.array(['ab'[(i // 3) % 2] for i in range(50)])
  guess = np.where(groups == 'a', truth, 0)  # right in one group, half right in the other
  weights = (np.arange(50) % 5 > 0).astype(np.float32)
  scores, report = run(
    'binary', ('n', 'y'), np.eye(2)[guess], truth, weights, slices={'g': groups.reshape(-1, 2)}
  )
  right = (guess == truth)[(groups == 'b') & (weights > 0)]
  assert scores['g_accuracy_gap'] == pytest.approx(1 - np.mean(right)) and len(right) < 25
  assert scores['g_true_positive_rate_gap'] == 1 and 'by g, with intervals' in report


def test_nothing_labelled():
  with pytest.raises(ValueError, match='no text of the validation set has a label'):
    run('multiclass', ('u', 'v'), np.eye(2), np.array([0, 1]), np.zeros(2))
