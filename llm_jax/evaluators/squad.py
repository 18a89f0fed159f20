"""Exact match and F1 of answers, as the official evaluations of SQuAD 1.1 (Rajpurkar et al. 2016,
arXiv:1606.05250) and 2.0 (Rajpurkar et al. 2018, arXiv:1806.03822) define them.

Both lower case, punctuation, articles and white space of an answer aside; F1 is that of its words.
With several right answers the best counts. In 2.0 a right answer of which nothing is left does not
count, and to say nothing where there is no answer is right; in 1.1 something must be said.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.core.contracts import Validation
from llm_jax.evaluators import _answers, _slices

VERSIONS = ('1.1', '2.0')
WORST = 10  # answers in the report

Score = Callable[[str, str], float]


class Question(NamedTuple):
  """A question that was answered.

  Attributes:
    right: the answers that are right; none where there is none.
    said: what was answered, '' for no answer.
    best: the best answer, whether it was said or not; '' where there was none at all.
    none_score: by how much no answer scores above `best`; infinite where there is no best.
  """

  right: Sequence[str]
  said: str
  best: str
  none_score: float


class Evaluator:
  """Scores of an objective whose answers have `answer` and `answers`.

  Only questions all of whose windows are evaluated count: with `config.evaluation.rows` some may
  not be.

  Args:
    version: '1.1' or '2.0'; None for 2.0 where the objective has questions without an answer.

  Raises:
    ValueError: another version.
  """

  slices = True

  def __init__(self, version: str | None = None):
    if version not in (None, *VERSIONS):
      raise ValueError(f'evaluators.squad.version={version!r} must be one of {VERSIONS}.')
    self.version = version

  def evaluate(self, validation: Validation) -> tuple[dict[str, float], str]:
    """See `scores`.

    Raises:
      ValueError: an objective of another kind, or no question whose right answers are given.
    """
    predictor = validation.objective.predictor
    if not hasattr(predictor, 'no_answer'):
      raise ValueError(
        "the evaluator 'squad' scores answers to questions, and the objective gives none; name "
        'other evaluators in config.evaluators.'
      )
    questions, positions, left_out = [], [], 0
    for rows, text, answer, position, parts in _answers.answered(validation):
      right = rows.answers(text)
      if right is None:
        continue
      if parts < rows.parts(text):
        left_out += 1
        continue
      best = answer['answers'][0]['text'] if answer['answers'] else ''
      score = answer.get('no_answer_score')
      questions.append(
        Question(right, answer['answer'], best, float('inf') if score is None else score)
      )
      positions.append(position)
    if not questions:
      raise ValueError(
        'no question of the validation set has both right answers and all its windows; give '
        'answers, or raise config.data.validation, or set config.evaluation.rows=0.'
      )
    version = self.version or ('2.0' if predictor.no_answer else '1.1')
    numbers = scores(questions, version)
    report = [_report(questions, numbers, version, left_out)]
    for field, rows in validation.slices.items():
      groups = [rows[row][slot] for row, slot in positions]
      gaps, table = _by_group(field, groups, questions, version)
      numbers |= gaps
      report.append(table)
    return numbers, '\n\n'.join(report)


def scores(questions: Sequence[Question], version: str) -> dict[str, float]:
  """Scores from 0 to 1 by name.

  Args:
    questions: at least one.
    version: one of `VERSIONS`.

  Returns:
    `exact_match` and `f1`. In 2.0 also those of questions with an answer, as `has_answer_f1`; of
    those without the `no_answer_accuracy`; and `best_f1` and `best_exact_match`, with the
    thresholds of `none_score` by which they are reached.
  """
  exact = np.array([_best(exact_match, question, question.said, version) for question in questions])
  f1 = np.array([_best(word_f1, question, question.said, version) for question in questions])
  numbers = {'exact_match': float(exact.mean()), 'f1': float(f1.mean())}
  if version == '1.1':
    return numbers
  has_answer = np.array([bool(question.right) for question in questions])
  if has_answer.any():
    numbers['has_answer_exact_match'] = float(exact[has_answer].mean())
    numbers['has_answer_f1'] = float(f1[has_answer].mean())
  if not has_answer.all():
    numbers['no_answer_accuracy'] = float(exact[~has_answer].mean())
  for name, score in (('exact_match', exact_match), ('f1', word_f1)):
    value, threshold = best_threshold(questions, score)
    numbers[f'best_{name}'], numbers[f'best_{name}_threshold'] = value, threshold
  return numbers


def best_threshold(questions: Sequence[Question], score: Score) -> tuple[float, float]:
  """The highest mean of a score of SQuAD 2.0 over the questions if the best answer is given where
  `none_score` is no higher than a threshold, and the lowest such threshold.

  A threshold lies in the middle between two scores, so that rounding decides nothing.
  """
  order = sorted(questions, key=lambda question: question.none_score)
  silent = np.array([_best(score, question, '', '2.0') for question in order])
  spoken = np.array([_best(score, question, question.best, '2.0') for question in order])
  # By how many of the first ones are answered.
  totals = np.append(0, np.cumsum(spoken)) + np.append(np.cumsum(silent[::-1])[::-1], 0)
  levels = np.array([question.none_score for question in order])
  possible = np.append(True, np.append(levels[1:] > levels[:-1], True))
  possible[1:] &= np.isfinite(levels)  # who has no best answer cannot give one
  count = int(np.argmax(np.where(possible, totals, -np.inf)))
  finite = levels[np.isfinite(levels)]
  if not len(finite):
    return float(totals[count] / len(order)), 0.0
  bounds = np.concatenate([[finite[0] - 1], finite, [finite[-1] + 1]])
  return float(totals[count] / len(order)), float((bounds[count] + bounds[count + 1]) / 2)


def exact_match(right: str, said: str) -> float:
  """1 where two answers are the same but for what `normalized` takes away, else 0."""
  return float(normalized(right) == normalized(said))


def word_f1(right: str, said: str) -> float:
  """F1 of the words; where one of the answers has none, whether both have none.

  Example:
    >>> word_f1('the white cat', 'A white dog')
    0.5
  """
  wanted, found = normalized(right).split(), normalized(said).split()
  if not wanted or not found:
    return float(wanted == found)
  common = sum((collections.Counter(wanted) & collections.Counter(found)).values())
  return 2 * common / (len(wanted) + len(found))


def normalized(text: str) -> str:
  """An answer in lower case, without ASCII punctuation, articles and further white space.

  Example:
    >>> normalized('The  U.S. Army')
    'us army'
  """
  kept = ''.join(char for char in text.lower() if char not in string.punctuation)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', kept).split())


def _best(score: Score, question: Question, said: str, version: str) -> float:
  right = question.right
  if version == '2.0':
    right = [answer for answer in right if normalized(answer)] or ['']
  elif score is word_f1:  # of two answers without a word nothing is common in 1.1
    right = [answer for answer in right if normalized(answer)]
  return max((score(answer, said) for answer in right), default=0.0)


def _by_group(
  field: str, groups: Sequence[str], questions: Sequence[Question], version: str
) -> tuple[dict[str, float], str]:
  """The largest less the smallest F1 of a group of at least `_slices.FEW` questions, NaN where
  there are not two; and a table.
  """
  found, lines = [], [f'by {field}:']
  for group in sorted(set(groups)):
    chosen = [q for q, name in zip(questions, groups, strict=True) if name == group]
    numbers = scores(chosen, version)
    few = len(chosen) < _slices.FEW
    found += [] if few else [numbers['f1']]
    mark = f'  (fewer than {_slices.FEW}: in no gap)' if few else ''
    lines.append(
      f'{group:>18} {len(chosen):>7} questions  exact match {numbers["exact_match"]:.4f}  '
      f'f1 {numbers["f1"]:.4f}{mark}'
    )
  gap = max(found) - min(found) if len(found) > 1 else float('nan')
  return {f'{field}_f1_gap': gap}, '\n'.join(lines)


def _report(
  questions: Sequence[Question], numbers: dict[str, float], version: str, left_out: int
) -> str:
  lines = [f'SQuAD {version}, {len(questions)} questions:']
  if left_out:
    lines[0] = f'SQuAD {version}, {len(questions)} questions ({left_out} not seen whole):'
  lines += [f'{name:>28} {value:.4f}' for name, value in numbers.items()]
  worst = [(_best(word_f1, question, question.said, version), question) for question in questions]
  worst = sorted((pair for pair in worst if pair[0] < 1), key=lambda pair: pair[0])[:WORST]
  for f1, question in worst:
    right = ' | '.join(dict.fromkeys(question.right)) or '(no answer)'
    lines.append(f'f1 {f1:.2f}  right: {right}  said: {question.said or "(no answer)"}')
  return '\n'.join(lines)
