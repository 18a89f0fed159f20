"""Scores per group, held against scikit-learn, SciPy and a bootstrap of single texts."""

import functools

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from llm_jax.evaluators import _slices

RNG = np.random.default_rng(0)
CLASSES = ('u', 'v', 'w')
GROUPS = RNG.permutation(np.repeat(['mail', 'blog', 'forum', 'rare'], [150, 90, 60, 4]))


def answers(classes):
  """Labels, and predictions that are right less often in some groups."""
  labels = RNG.integers(classes, size=len(GROUPS))
  wrong = RNG.random(len(GROUPS)) < np.where(GROUPS == 'mail', 0.4, 0.1)
  return np.where(wrong, RNG.integers(classes, size=len(GROUPS)), labels), labels


def gap(score, predicted, labels):
  """Over the groups of ten texts or more."""
  values = [score(labels[GROUPS == g], predicted[GROUPS == g]) for g in ('mail', 'blog', 'forum')]
  return np.max(values, axis=0) - np.min(values, axis=0)


def test_gaps_are_those_of_scikit_learn():
  predicted, labels = answers(3)
  numbers, report = _slices.score('source', GROUPS, predicted, labels, 'multiclass', CLASSES)
  f1 = functools.partial(metrics.f1_score, average='macro')
  recall = functools.partial(metrics.recall_score, average=None, labels=range(3))
  selected = lambda _, predicted: np.bincount(predicted, minlength=3) / len(predicted)
  rates = gap(recall, predicted, labels)
  assert numbers == pytest.approx(
    {
      'source_accuracy_gap': gap(metrics.accuracy_score, predicted, labels),
      'source_macro_f1_gap': gap(f1, predicted, labels),
      'source_selection_rate_gap': max(gap(selected, predicted, labels)),
      'source_true_positive_rate_gap': max(rates),
    }
  )
  lines = dict(line.strip().split(' ', 1) for line in report.splitlines())
  assert lines['rare'].strip().startswith('4 texts') and 'fewer than 10 texts' in lines['rare']
  right = int(np.sum((predicted == labels)[GROUPS == 'mail']))
  interval = scipy.stats.binomtest(right, 150).proportion_ci(method='wilson')
  assert f'{right / 150:.4f} [{interval.low:.4f}, {interval.high:.4f}]' in lines['mail']
  assert lines['true_positive_rate'].endswith(f'of {CLASSES[np.argmax(rates)]}')


def test_of_a_binary_task_the_second_class_counts():
  predicted, labels = answers(2)
  numbers, _ = _slices.score('x', GROUPS, predicted, labels, 'binary', ('no', 'yes'))
  assert numbers['x_true_positive_rate_gap'] == pytest.approx(
    gap(metrics.recall_score, predicted, labels)
  )
  assert numbers['x_selection_rate_gap'] == pytest.approx(
    gap(lambda _, predicted: np.mean(predicted), predicted, labels)
  )


def test_several_labels_and_values():
  predicted, labels = RNG.random((2, len(GROUPS), 3)) > 0.5
  numbers, _ = _slices.score('x', GROUPS, predicted, labels, 'multilabel', CLASSES)
  f1 = functools.partial(metrics.f1_score, average='macro')
  assert numbers['x_accuracy_gap'] == pytest.approx(gap(metrics.accuracy_score, predicted, labels))
  assert numbers['x_macro_f1_gap'] == pytest.approx(gap(f1, predicted, labels))
  predicted, labels = RNG.normal(size=(2, len(GROUPS)))
  numbers, report = _slices.score('x', GROUPS, predicted, labels, 'regression', None)
  wanted = gap(metrics.mean_squared_error, predicted, labels)
  assert numbers == pytest.approx({'x_mse_gap': wanted}) and 'mse gap' in report


def test_the_interval_of_a_gap_is_that_of_texts_drawn_one_by_one():
  predicted, labels = answers(3)
  _, report = _slices.score('x', GROUPS, predicted, labels, 'multiclass', CLASSES)
  (line,) = (line for line in report.splitlines() if 'accuracy gap' in line)
  found = [float(number) for number in line.split('[')[1].rstrip(']').split(', ')]
  rng, draws = np.random.default_rng(1), []
  for _ in range(2000):
    shares = [
      np.mean(rng.choice((predicted == labels)[GROUPS == g], np.sum(GROUPS == g)))
      for g in ('mail', 'blog', 'forum')
    ]
    draws.append(max(shares) - min(shares))
  np.testing.assert_allclose(found, np.quantile(draws, [0.025, 0.975]), atol=0.02)


def test_without_two_groups_there_is_no_gap():
  numbers, report = _slices.score('x', ['a'] * 20, *np.zeros((2, 20), int), 'binary', ('n', 'y'))
  assert all(np.isnan(value) for value in numbers.values()) and len(numbers) == 4
  assert 'a      20 texts  accuracy 1.0000' in report
