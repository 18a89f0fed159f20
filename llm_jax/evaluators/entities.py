"""Scores of tags of words: entities by seqeval in both its modes, and words by scikit-learn.

An entity is right where its type and all its words are (Sang and De Meulder 2003). seqeval reads
tags as conlleval.pl does by default, so that an I without a B begins an entity; in its strict mode
only what the scheme spells is one.

Every word counts, also those that the model does not see: what is scored is what `--mode=predict`
answers.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.core.contracts import Validation
from llm_jax.evaluators import _answers, _slices

NO_SCHEME = 'none'
_CONLL = str.maketrans('LU', 'ES')  # seqeval's default mode has BILOU by the letters of IOBES

Tags = list[list[str]]  # of each text


class Evaluator:
  """Scores of an objective whose answers have `tags`.

  Raises:
    ImportError: seqeval is not installed.
  """

  slices = True

  def __init__(self):
    _seqeval()  # now, and not after the first steps

  def evaluate(self, validation: Validation) -> tuple[dict[str, float], str]:
    """See `scores`.

    Raises:
      ValueError: an objective that gives words no tags, or no text with tags.
    """
    predictor = validation.objective.predictor
    if not hasattr(predictor, 'tags') or not hasattr(predictor, 'scheme'):
      raise ValueError(
        "the evaluator 'entities' scores tags of words, and the objective gives none; name other "
        'evaluators in config.evaluators.'
      )
    right, said, positions = [], [], []
    for rows, text, answer, position, _ in _answers.answered(validation):
      wanted = rows.tags(text)
      if wanted is not None:
        right.append(wanted)
        said.append(answer['tags'])
        positions.append(position)
    if not sum(map(len, right)):
      raise ValueError(
        'no word of the validation set has a tag; give tags, or raise config.data.validation or '
        'config.evaluation.rows.'
      )
    numbers, report = scores(right, said, predictor.scheme)
    for field, rows in validation.slices.items():
      groups = [rows[row][slot] for row, slot in positions]
      gaps, text = _by_group(field, groups, right, said, predictor.scheme)
      numbers, report = numbers | gaps, f'{report}\n{text}'
    return numbers, report


def scores(right: Tags, said: Tags, scheme: str) -> tuple[dict[str, float], str]:
  """Scores by name, and a report for people.

  Args:
    right: the tags of the words of each text.
    said: those that were answered, as many.
    scheme: one of seqeval's IOB1, IOB2, IOBES, BILOU; 'none' for tags that spell no entities.

  Returns:
    `word_accuracy`, and of entities `precision`, `recall`, `f1` and, in the strict mode,
    `strict_precision`, `strict_recall`, `strict_f1`, all micro averages; without a scheme
    `macro_f1` over the tags that occur. The report has these per type, or per tag.
  """
  words = np.concatenate([np.array(tags, object) for tags in right])
  answers = np.concatenate([np.array(tags, object) for tags in said])
  numbers = {'word_accuracy': float(np.mean(words == answers))}
  if scheme == NO_SCHEME:
    return _tags(words, answers, numbers)
  return _entities(right, said, scheme, numbers)


def _by_group(
  field: str, groups: Sequence[str], right: Tags, said: Tags, scheme: str
) -> tuple[dict[str, float], str]:
  """Gaps between groups of texts: the largest less the smallest accuracy of words and F1 of a group
  of at least `_slices.FEW` texts, NaN where there are not two; and a table.
  """
  names = ('word_accuracy', 'macro_f1' if scheme == NO_SCHEME else 'f1')
  found, lines = [], [f'by {field}:']
  for group in sorted(set(groups)):
    chosen = [i for i, name in enumerate(groups) if name == group and right[i]]
    if not chosen:
      continue
    numbers, _ = scores([right[i] for i in chosen], [said[i] for i in chosen], scheme)
    few = len(chosen) < _slices.FEW
    found += [] if few else [numbers]
    shown = '  '.join(f'{name} {numbers[name]:.4f}' for name in names)
    mark = f'  (fewer than {_slices.FEW} texts: in no gap)' if few else ''
    lines.append(f'{group:>18} {len(chosen):>7} texts  {shown}{mark}')
  gaps = {}
  for name in names:
    values = [numbers[name] for numbers in found]
    gaps[f'{field}_{name}_gap'] = max(values) - min(values) if len(values) > 1 else float('nan')
  return gaps, '\n'.join(lines)


def _tags(
  right: np.ndarray, said: np.ndarray, numbers: dict[str, float]
) -> tuple[dict[str, float], str]:
  from sklearn import metrics

  right, said = right.astype(str), said.astype(str)
  numbers['macro_f1'] = float(metrics.f1_score(right, said, average='macro', zero_division=0))
  return numbers, metrics.classification_report(right, said, digits=4, zero_division=0)


def _entities(
  right: Tags, said: Tags, scheme: str, numbers: dict[str, float]
) -> tuple[dict[str, float], str]:
  seqeval = _seqeval()
  lenient = [[[_conll(tag) for tag in tags] for tags in texts] for texts in (right, said)]
  strict = dict(mode='strict', scheme=getattr(seqeval.scheme, scheme))
  report = [f'word accuracy {numbers["word_accuracy"]:.4f}']
  for prefix, title, given, how in (
    ('', 'entities, as conlleval reads them', lenient, {}),
    ('strict_', f'entities, strictly by {scheme}', (right, said), strict),
  ):
    table = _report(seqeval, *given, **how, output_dict=True)
    average = table.get('micro avg', {})
    for name, key in (('precision', 'precision'), ('recall', 'recall'), ('f1', 'f1-score')):
      numbers[f'{prefix}{name}'] = float(average.get(key, 0.0))
    text = _report(seqeval, *given, **how, digits=4)
    report.append(f'{title}:\n{text or "none, given or answered"}')
  return numbers, '\n\n'.join(report)


def _report(seqeval: Any, right: Tags, said: Tags, **how: Any) -> Any:
  """seqeval's report; nothing where there is no entity, of which it knows no maximum."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # it passes a type of NumPy by an old name
    try:
      return seqeval.metrics.classification_report(right, said, zero_division=0, **how)
    except ValueError as error:
      if 'empty' in str(error):
        return {}
      raise


def _conll(tag: str) -> str:
  return tag[:1].translate(_CONLL) + tag[1:]


def _seqeval() -> Any:
  try:
    import seqeval.metrics
    import seqeval.scheme
  except ImportError as error:
    raise ImportError(
      "the evaluator 'entities' needs the package seqeval: pip install 'llm_jax[tag]', or "
      'pip install seqeval==1.2.2; or name others: config.evaluators = dict(loss={}).'
    ) from error
  return seqeval
