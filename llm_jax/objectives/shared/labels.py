"""Labels of texts: the classes of a corpus, and a label as the number that a loss wants."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from absl import logging

from llm_jax.core.contracts import Documents

MISSING = ('-1', 'nan', 'none', 'null', 'n/a', '#n/a', '?')  # names that are likely to be no class
TASKS = ('multiclass', 'binary', 'multilabel', 'regression')


class Labels:
  """How a task reads labels.

  Args:
    classes: their names in the order of their numbers; None for regression.
    task: one of `TASKS`.
    name: of the objective, for messages.
    bounds: in regression the lowest and the highest label; None for any number.

  Raises:
    ValueError: classes that do not fit the task.

  Attributes:
    dtype: of a label in a batch.
    shape: of the label of one text in a batch.
  """

  def __init__(
    self,
    classes: tuple[str, ...] | None,
    task: str,
    name: str = 'classify',
    bounds: tuple[float, float] | None = None,
  ):
    _check_classes(classes, task)
    self.classes, self.task, self.name, self.bounds = classes, task, name, bounds
    self.number = {name: i for i, name in enumerate(classes or ())}
    self.dtype = np.int32 if task in ('multiclass', 'binary') else np.float32
    self.shape = (len(classes),) if task == 'multilabel' else ()

  def target(self, label: Any) -> Any:
    """A label as a number, or for multilabel as [C] zeros and ones.

    Raises:
      ValueError: what is wrong with it.
    """
    if self.task == 'regression':
      return self._number(label)
    if self.task != 'multilabel':
      return self._class(label)
    if not isinstance(label, list | tuple):
      raise ValueError('must be a list of classes (an empty one where none applies)')
    chosen = np.zeros(len(self.classes), np.float32)
    chosen[[self._class(name) for name in label]] = 1
    return chosen

  def check(
    self, documents: Documents, required: bool, missing: str = 'count for nothing here'
  ) -> None:
    """Raises ValueError for a label that does not fit the task, naming the document.

    Args:
      documents: their labels are looked at.
      required: a document without one is an error; otherwise they are counted and logged.
      missing: what becomes of them.
    """
    labels = documents.values('label')
    if labels is None:
      if required:
        raise ValueError(
          f'objective {self.name} needs labels and this corpus has none; name its field by '
          "config.data.label, or set objective.unlabelled='ignore' where another objective learns "
          'from it.'
        )
      logging.info(
        '%s: none of %d documents has a label; they %s.', self.name, len(documents), missing
      )
      return
    count = 0
    for index, label in enumerate(labels):
      if label is None:
        count += 1
        if required:
          raise ValueError(
            f'{documents.where(index)} has no label; give it one, or set '
            '--config.objective.unlabelled=ignore.'
          )
        continue
      try:
        self.target(label)
      except ValueError as error:
        raise ValueError(f'{documents.where(index)} has the label {label!r}; it {error}.') from None
    if count:
      logging.info(
        '%s: %d of %d documents have no label and %s.', self.name, count, len(documents), missing
      )

  def _number(self, label: Any) -> float:
    value = _number(label)
    if self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:
      low, high = self.bounds
      raise ValueError(
        f'must be from {low:g} to {high:g}, or config.objective.range set to the lowest and the '
        'highest label'
      )
    return value

  def _class(self, label: Any) -> int:
    if isinstance(label, list | tuple) or str(label) not in self.number:
      raise ValueError(
        f'must be one of the {len(self.classes)} classes of the training documents '
        f'({_shortened(self.classes)}): give more documents of its class, leave them out, or name '
        'all classes in config.objective.classes'
      )
    return self.number[str(label)]


def collect_classes(documents: Sequence[Documents], objective: str = 'classify') -> tuple[str, ...]:
  """The distinct classes among the labels of documents (a list of classes counts for each of them):
  by value where all are finite numbers, else by letter.

  Labels that may mean something else than they say are named in warnings.

  Raises:
    ValueError: there is no label, labels are fractional numbers, or lists of zeros and ones.
  """
  first: dict[str, str] = {}  # class -> where it stands first
  lists = _Lists()
  for label, where in _labelled(documents):
    if isinstance(label, float):
      raise ValueError(
        f'labels are numbers such as {label!r} ({where()}); set config.objective.task=regression, '
        'or give classes as words or whole numbers.'
      )
    several = isinstance(label, list | tuple)
    if several:
      lists.add(label, where)
    for name in map(str, label if several else [label]):
      if name not in first:
        first[name] = where()
  if not first:
    raise ValueError(
      f'objective {objective} needs labels and this corpus has none; name their field by '
      'config.data.label.'
    )
  lists.check(set(first))
  _warn_of_names(first)
  numbers = {name: _finite(name) for name in first}
  if None in numbers.values():
    return tuple(sorted(first))
  return tuple(sorted(first, key=lambda name: (numbers[name], name)))


def _labelled(documents: Sequence[Documents]) -> Iterator[tuple[Any, Callable[[], str]]]:
  """The labels that there are, each with a function that says where it stands."""
  for split in documents:
    for index, label in enumerate(split.values('label') or ()):
      if label is not None:
        yield label, functools.partial(split.where, index)


class _Lists:
  """What is to be said of labels that are lists of classes."""

  def __init__(self) -> None:
    self._lengths: set[int] = set()
    self._first: tuple[list[Any], str] | None = None
    self._repeat: tuple[list[Any], str] | None = None

  def add(self, label: Sequence[Any], where: Callable[[], str]) -> None:
    """Takes note of one."""
    self._lengths.add(len(label))
    if self._first is None:
      self._first = list(label), where()
    if self._repeat is None and len(set(map(str, label))) < len(label):
      self._repeat = list(label), where()

  def check(self, classes: Set[str]) -> None:
    """Raises ValueError where all are lists of zeros and ones, all as long; warns of the first that
    names a class twice.
    """
    alike = len(self._lengths) == 1 and max(self._lengths) > 1
    if self._first and alike and classes <= {'0', '1'}:
      label, where = self._first
      raise ValueError(
        f'{where}: the label {label} says by zeros and ones which classes apply; give the names of '
        'those that do, such as ["sport", "news"].'
      )
    if self._repeat:
      label, where = self._repeat
      logging.warning('%s: the label %s names a class twice; it counts once.', where, label)


def _warn_of_names(first: Mapping[str, str]) -> None:
  """Says once of each kind which classes are likely to be a mistake, and where they stand."""
  same: dict[Any, str] = {}
  for name, where in first.items():
    if name.strip().lower() in MISSING:
      logging.warning(
        '%s: the class %r often means that there is no label; where so, leave the label empty.',
        where,
        name,
      )
    value = _finite(name)
    key = name.strip().strip('"\'').lower() if value is None else value
    if key in same:
      logging.warning(
        '%s: the classes %r and %r (%s) differ only in how they are written, and are two.',
        where,
        name,
        same[key],
        first[same[key]],
      )
    same.setdefault(key, name)


def _finite(name: str) -> float | None:
  """The finite number that a name spells, or None."""
  try:
    value = float(name)
  except ValueError:
    return None
  return value if math.isfinite(value) else None


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
