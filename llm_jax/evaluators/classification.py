"""Scores of a classifier or a regressor over a validation set, by scikit-learn and SciPy."""

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.core.contracts import Batch, Predictor, Validation
from llm_jax.evaluators import _slices

TASKS = ('multiclass', 'binary', 'multilabel', 'regression')
KEYS = ('label', 'label_weight')  # what is read of a batch beside the predictions


class Evaluator:
  """Scores of the objective's predictor, which must be a classifier or a regressor."""

  slices = True

  def evaluate(self, validation: Validation) -> tuple[dict[str, float], str]:
    """See the function `evaluate`."""
    predictor = validation.objective.predictor
    task = getattr(predictor, 'task', None)
    if task not in TASKS:
      raise ValueError(
        f"the evaluator 'classification' scores labels, and the objective's task is {task}, not "
        f'one of {", ".join(TASKS)}; name other evaluators in config.evaluators.'
      )
    predict = lambda batch: validation.predict(batch, KEYS)
    return evaluate(predict, validation.batches(), predictor, validation.slices)


def evaluate(
  predict: Callable[[Batch], Mapping[str, Any]],
  batches: Iterable[Batch],
  predictor: Predictor,
  slices: Mapping[str, Sequence[Sequence[str]]] = types.MappingProxyType({}),
) -> tuple[dict[str, float], str]:
  """Scores predictions against labels, text by text; those of label_weight 0 are left out.

  Args:
    predict: this host's rows of a batch -> what `predictor.predict` gives for all hosts' rows,
      [B, G, ...], with the rows' `label` and `label_weight`.
    batches: this host's rows of the validation set.
    predictor: of one of the `TASKS`.
    slices: field -> for each row, its value for each text of the row.

  Returns:
    Scores by name, and a report for people. Multiclass, binary: accuracy, macro_f1 (over the
    classes that occur), mcc. Multilabel: accuracy (all classes of a text right), micro_f1,
    macro_f1. Regression: pearson, spearman, mse; a correlation with constant values is NaN.
    Of each slice the gaps between its groups (`_slices.score`).

  Raises:
    ValueError: no text has a label.
  """
  task, classes = predictor.task, predictor.classes
  key = 'values' if task == 'regression' else 'probabilities'
  predicted, labels, slots = _gather(predict, batches, key)
  if task == 'regression':
    scores, report = _regression(predicted, labels)
  elif task == 'multilabel':
    predicted, labels = predicted > 0.5, labels > 0.5
    scores, report = _multilabel(predicted, labels, classes)
  else:
    predicted = np.argmax(predicted, -1)
    scores, report = _classes(predicted, labels, classes)
  for field, rows in slices.items():
    groups = [rows[row][slot] for row, slot in slots]
    gaps, text = _slices.score(field, groups, predicted, labels, task, classes)
    scores, report = scores | gaps, f'{report}\n{text}'
  return scores, report


def _gather(
  predict: Callable[[Batch], Mapping[str, Any]], batches: Iterable[Batch], key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Predictions and labels of the texts that count, [texts, ...], and the row and the slot of each,
  [texts, 2]; slots are many, so that no batch's stay longer than needed.
  """
  kept, waiting = [], None
  for batch in batches:
    rows = predict(batch)
    kept += _labelled(waiting, key)  # one batch late, so that the device does not wait
    waiting = rows
  kept += _labelled(waiting, key)
  predicted, labels, slots = ([part[i] for part in kept] for i in range(3))
  if not sum(map(len, labels)):
    raise ValueError(
      'no text of the validation set has a label; give labels, or raise config.data.validation or '
      'config.evaluation.rows.'
    )
  firsts = np.cumsum([0, *(part[3] for part in kept[:-1])])
  whole = [part + [first, 0] for part, first in zip(slots, firsts, strict=True)]
  return np.concatenate(predicted), np.concatenate(labels), np.concatenate(whole)


def _labelled(
  rows: Mapping[str, Any] | None, key: str
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
  """Predictions and labels of a batch, the row and the slot of each, and how many rows it has."""
  if rows is None:
    return []
  predicted, label, weight = jax.device_get((rows[key], rows['label'], rows['label_weight']))
  counts = weight > 0
  chosen = np.asarray(predicted)[counts], np.asarray(label)[counts]
  return [(*chosen, np.argwhere(counts), len(weight))]


def _classes(
  predicted_B: np.ndarray, labels_B: np.ndarray, classes: tuple[str, ...]
) -> tuple[dict[str, float], str]:
  from sklearn import metrics

  present = np.union1d(predicted_B, labels_B)
  scores = {
    'accuracy': float(metrics.accuracy_score(labels_B, predicted_B)),
    'macro_f1': float(
      metrics.f1_score(labels_B, predicted_B, labels=present, average='macro', zero_division=0)
    ),
    'mcc': float(metrics.matthews_corrcoef(labels_B, predicted_B)),
  }
  report = metrics.classification_report(
    labels_B,
    predicted_B,
    labels=present,
    target_names=[classes[i] for i in present],
    digits=4,
    zero_division=0,
  )
  return scores, report


def _multilabel(
  predicted_BC: np.ndarray, labels_BC: np.ndarray, classes: tuple[str, ...]
) -> tuple[dict[str, float], str]:
  from sklearn import metrics

  if len(classes) == 1:
    # scikit-learn takes a single column for one label per row, and then refuses its report.
    f1 = float(metrics.f1_score(labels_BC[:, 0], predicted_BC[:, 0], zero_division=0))
    scores = {'accuracy': float(np.mean(predicted_BC == labels_BC)), 'micro_f1': f1, 'macro_f1': f1}
    return scores, f'{classes[0]}: f1 {f1:.4f} over {len(labels_BC)} rows'
  scores = {
    'accuracy': float(metrics.accuracy_score(labels_BC, predicted_BC)),
    'micro_f1': float(metrics.f1_score(labels_BC, predicted_BC, average='micro', zero_division=0)),
    'macro_f1': float(metrics.f1_score(labels_BC, predicted_BC, average='macro', zero_division=0)),
  }
  report = metrics.classification_report(
    labels_BC, predicted_BC, target_names=list(classes), digits=4, zero_division=0
  )
  return scores, report


def _regression(predicted_B: np.ndarray, labels_B: np.ndarray) -> tuple[dict[str, float], str]:
  from scipy import stats

  predicted_B, labels_B = predicted_B.astype(np.float64), labels_B.astype(np.float64)
  scores = {
    'pearson': float('nan'),
    'spearman': float('nan'),
    'mse': float(np.mean((predicted_B - labels_B) ** 2)),
  }
  if np.ptp(predicted_B) > 0 and np.ptp(labels_B) > 0:
    scores['pearson'] = float(stats.pearsonr(predicted_B, labels_B).statistic)
    scores['spearman'] = float(stats.spearmanr(predicted_B, labels_B).statistic)
  return scores, '\n'.join(f'{name:>10} {value:.4f}' for name, value in scores.items())
