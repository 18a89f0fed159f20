"""SQuAD's scores, on answers that are awkward. The numbers beside them are those of transformers
4.46.3 (`squad_metrics`, 2.0) and torchmetrics 1.9.0 (1.1), but for F1 in 1.1 of right answers
without a word: there torchmetrics counts as 2.0 does, and evaluate-v1.1.py gives 0.
"""

import itertools
import types

import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.evaluators import squad
from llm_jax.evaluators.squad import Question

# right answers, what was said, and exact match and F1 of versions 1.1 and 2.0
TABLE = [
  (['Denver Broncos'], 'denver  broncos!', (1, 1), (1, 1)),
  (['The Broncos', 'Denver'], 'a Denver', (1, 1), (1, 1)),
  (['U.S.'], 'us', (1, 1), (1, 1)),
  (['$1,000'], '1000', (1, 1), (1, 1)),
  (['ten years'], 'ten', (0, 2 / 3), (0, 2 / 3)),
  (['to be or not to be'], 'to be to', (0, 2 / 3), (0, 2 / 3)),
  (['caf\u00e9'], 'cafe', (0, 0), (0, 0)),
  (['\u201cno\u201d'], 'no', (0, 0), (0, 0)),  # these marks are not ASCII
  (['well-known'], 'well known', (0, 0), (0, 0)),
  # Nothing is left of the right answer: in 1.1 no word is in common, in 2.0 it does not count.
  (['the'], 'a', (1, 0), (1, 1)),
  (['the'], '', (1, 0), (1, 1)),
  (['the', 'cat'], '', (1, 0), (0, 0)),
  (['cat'], '', (0, 0), (0, 0)),
  ([], '', (0, 0), (1, 1)),
  ([], 'the', (0, 0), (1, 1)),
  ([], 'cat', (0, 0), (0, 0)),
]


def question(right, said, none_score=0.0):
  return Question(right, said, said, none_score)


@pytest.mark.parametrize('version', squad.VERSIONS)
@pytest.mark.parametrize(('right', 'said', 'old', 'new'), TABLE)
def test_awkward_answers(right, said, old, new, version):
  numbers = squad.scores([question(right, said)], version)
  wanted = old if version == '1.1' else new
  assert (numbers['exact_match'], numbers['f1']) == pytest.approx(wanted)


def test_numbers_of_several_questions():
  questions = [
    question(['cat'], 'cat'),
    question(['a big dog'], 'dog'),
    question([], ''),
    question([], 'no'),
  ]
  numbers = squad.scores(questions, '2.0')
  assert numbers['exact_match'] == 0.5 and numbers['f1'] == pytest.approx((1 + 2 / 3 + 1) / 4)
  assert numbers['has_answer_exact_match'] == 0.5
  assert numbers['has_answer_f1'] == pytest.approx((1 + 2 / 3) / 2)
  assert numbers['no_answer_accuracy'] == 0.5
  assert set(squad.scores(questions[:2], '1.1')) == {'exact_match', 'f1'}


@pytest.mark.parametrize('seed', range(20))
def test_the_threshold_is_the_best_of_all(seed):
  """By brute force over all thresholds, ties included."""
  rng = np.random.default_rng(seed)
  questions = []
  for _ in range(rng.integers(1, 9)):
    right = ['cat'] if rng.random() < 0.5 else []
    best = str(rng.choice(['cat', 'dog', 'big cat', '']))
    score = float(rng.integers(-2, 3)) if best else float('inf')
    questions.append(Question(right, '', best, score))
  value, threshold = squad.best_threshold(questions, squad.word_f1)

  def mean(threshold):
    said = [q._replace(said=q.best if q.none_score <= threshold else '') for q in questions]
    return squad.scores(said, '2.0')['f1']

  assert (
    value
    == pytest.approx(mean(threshold))
    == pytest.approx(max(mean(level) for level in np.arange(-3.5, 4)))
  )


def validation(answers, parts, no_answer=True, slices=None):
  """A validation set of one row per part, as an objective with these answers would give it."""
  texts = list(range(len(answers)))
  order = [text for text in texts for _ in range(parts[text])]
  rows = types.SimpleNamespace(
    texts=lambda index: [order[index]],
    parts=lambda text: 2,
    answers=lambda text: answers[text][0],
  )
  predictor = types.SimpleNamespace(
    no_answer=no_answer,
    answers=lambda row, rows, index: iter([{'spans': answers[order[index]][1]}]),
    joined=lambda found: found[0]['spans'],
  )
  batches = [{'x': np.zeros(2)}] * -(-len(order) // 2)
  return contracts.Validation(
    objective=types.SimpleNamespace(predictor=predictor),
    terms={},
    tokenizer=None,
    batches=lambda: iter(batches),
    losses=None,
    predict=lambda batch, keys: {'x': batch['x']},
    slices=slices or {},
    rows=[(rows, index) for index in range(len(order))],
  )


def said(best, score, answered=True):
  return {
    'answer': best if answered else '',
    'answers': [{'text': best}],
    'no_answer_score': score,
  }


def test_questions_count_where_all_their_windows_were_seen():
  answers = [
    (['cat'], said('cat', -1.0)),
    ([], said('dog', 2.0, answered=False)),
    (['cat'], said('dog', 0.0)),
    (None, said('?', 0.0)),
  ]
  evaluator = squad.Evaluator()
  numbers, report = evaluator.evaluate(validation(answers, [2, 2, 1, 2]))
  assert numbers['f1'] == 1.0 and numbers['best_f1'] == 1.0
  assert -1 < numbers['best_f1_threshold'] < 2
  assert 'SQuAD 2.0, 2 questions (1 not seen whole)' in report
  numbers, report = evaluator.evaluate(validation(answers, [2, 2, 2, 2]))
  assert numbers['f1'] == pytest.approx(2 / 3) and 'right: cat  said: dog' in report
  slices = {'kind': [['x']] * 2 + [['y']] * 6}
  numbers, report = evaluator.evaluate(validation(answers, [2] * 4, slices=slices))
  assert np.isnan(numbers['kind_f1_gap']) and 'fewer than 10' in report
  with pytest.raises(ValueError, match='no question of the validation set has both'):
    evaluator.evaluate(validation(answers[2:], [1, 2]))


def test_groups_have_gaps():
  good, bad = (['cat'], said('cat', -1.0)), (['cat'], said('dog', -1.0))
  answers = [good] * 10 + [good, bad] * 5
  groups = list(itertools.chain([['x']] * 20, [['y']] * 20))
  numbers, _ = squad.Evaluator('1.1').evaluate(
    validation(answers, [2] * 20, no_answer=False, slices={'kind': groups})
  )
  assert numbers['f1'] == 0.75 and numbers['kind_f1_gap'] == 0.5 and 'best_f1' not in numbers


def test_what_cannot_be_scored_is_refused():
  with pytest.raises(ValueError, match="evaluators.squad.version='3'"):
    squad.Evaluator('3')
  other = validation([([], said('x', 0.0))], [2])
  other = other._replace(objective=types.SimpleNamespace(predictor=object()))
  with pytest.raises(ValueError, match='the objective gives none'):
    squad.Evaluator().evaluate(other)
