"""Labels of `classify`: the classes of a corpus, and a label as the number that a loss wants."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from llm_jax.core.contracts import Documents

TASKS = ('multiclass', 'binary', 'multilabel', 'regression')


class Labels:
  """How a task reads labels.

  Args:
    classes: their names in the order of their numbers; None for regression.
    task: one of `TASKS`.

  Raises:
    ValueError: classes that do not fit the task.

  Attributes:
    dtype: of a label in a batch.
    shape: of the label of one text in a batch.
  """

  def __init__(self, classes: tuple[str, ...] | None, task: str):
    _check_classes(classes, task)
    self.classes, self.task = classes, task
    self.number = {name: i for i, name in enumerate(classes or ())}
    self.dtype = np.int32 if task in ('multiclass', 'binary') else np.float32
    self.shape = (len(classes),) if task == 'multilabel' else ()

  def target(self, label: Any) -> Any:
    """A label as a number, or for multilabel as [C] zeros and ones.

    Raises:
      ValueError: what is wrong with it.
    """
    if self.task == 'regression':
      return _number(label)
    if self.task != 'multilabel':
      return self._class(label)
    if not isinstance(label, list | tuple):
      raise ValueError('must be a list of classes (an empty one where none applies)')
    chosen = np.zeros(len(self.classes), np.float32)
    chosen[[self._class(name) for name in label]] = 1
    return chosen

  def check(self, documents: Documents, required: bool) -> None:
    """Raises ValueError for a label that does not fit the task, naming the document.

    Args:
      documents: their labels are looked at.
      required: a document without one is an error; otherwise they are counted and logged.
    """
    labels = documents.values('label')
    if labels is None:
      if required:
        raise ValueError(
          'objective classify needs labels and this corpus has none; name its field by '
          "config.data.label, or set objective.unlabelled='ignore' where another objective learns "
          'from it.'
        )
      logging.info(
        'classify: none of %d documents has a label; they count for nothing here.', len(documents)
      )
      return
    missing = 0
    for number, label in zip(documents.ids, labels, strict=True):
      if label is None:
        missing += 1
        if required:
          raise ValueError(
            f"document {number} has no label; give it one, or set objective.unlabelled='ignore'."
          )
        continue
      try:
        self.target(label)
      except ValueError as error:
        raise ValueError(f'document {number} has the label {label!r}; it {error}.') from None
    if missing:
      logging.info(
        'classify: %d of %d documents have no label and count for nothing here.',
        missing,
        len(documents),
      )

  def _class(self, label: Any) -> int:
    if isinstance(label, list | tuple) or str(label) not in self.number:
      raise ValueError(
        f'must be one of the {len(self.classes)} classes of the training set: '
        f'{_shortened(self.classes)}'
      )
    return self.number[str(label)]


def collect_classes(labels: Iterable[Any]) -> tuple[str, ...]:
  """The distinct classes among labels (a list of classes counts for each of them), numbers by
  value, the rest by letter.

  Raises:
    ValueError: there is no label, or labels are fractional numbers.
  """
  labels = [label for label in labels if label is not None]
  if not labels:
    raise ValueError(
      'objective classify needs labels and this corpus has none; name their field by '
      'config.data.label.'
    )
  found = set()
  for label in labels:
    if isinstance(label, float):
      raise ValueError(
        f'labels are numbers such as {label!r}; set config.objective.task=regression, or give '
        'classes as words or whole numbers.'
      )
    found.update(map(str, label if isinstance(label, list | tuple) else [label]))
  try:
    return tuple(sorted(found, key=lambda name: (float(name), name)))
  except ValueError:
    return tuple(sorted(found))


def samples(task: str | None, classes: Sequence[str]) -> Iterator[Any]:
  """Made-up labels that fit a task, without end."""
  for name in itertools.cycle(classes):
    if task == 'regression':
      yield 0.0
    else:
      yield [name] if task == 'multilabel' else name


def _number(label: Any) -> float:
  try:
    value = math.nan if isinstance(label, bool) else float(label)
  except (TypeError, ValueError):
    value = math.nan
  if not math.isfinite(value):
    raise ValueError('must be a finite number')
  return value


def _check_classes(classes: tuple[str, ...] | None, task: str) -> None:
  if task == 'regression':
    if classes is not None:
      raise ValueError(
        f'objective.classes={_shortened(classes)} has no meaning with task=regression; leave it '
        'unset.'
      )
    return
  given, least = classes or (), 1 if task == 'multilabel' else 2
  too_many = task == 'binary' and len(given) > 2
  if len(given) < least or too_many or len(set(given)) < len(given):
    wanted = f'{"exactly" if task == "binary" else "at least"} {least} different classes'
    raise ValueError(
      f'objective classify with task={task} needs {wanted}, not {_shortened(given) or "none"}; '
      'look at the labels of the training set, or choose another task.'
    )


def _shortened(names: Sequence[str]) -> str:
  shown = ', '.join(names[:20])
  return f'{shown}, ... ({len(names) - 20} more)' if len(names) > 20 else shown
