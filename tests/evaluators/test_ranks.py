"""Recall, nDCG and reciprocal rank of vectors and of scores."""

import types

import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.evaluators import _ranks, ranking, retrieval, similarity

RNG = np.random.default_rng(0)


def validation(batches=(), said=(), rows=(), predictor=None):
  replies = iter(said)
  return contracts.Validation(
    objective=types.SimpleNamespace(predictor=predictor),
    terms={},
    tokenizer=None,
    batches=lambda: batches,
    losses=None,
    predict=lambda batch, keys: dict(next(replies)) | {key: batch[key] for key in keys},
    rows=rows,
  )


def by_hand(relevance, cutoffs):
  """Of one ranking, `relevance` from the best on: the definitions of Järvelin and Kekäläinen."""
  relevance = np.asarray(relevance, float)
  gain = lambda values, k: (values[:k] / np.log2(np.arange(2, 2 + len(values[:k])))).sum()
  found = {}
  for k in cutoffs:
    found[f'recall_{k}'] = (relevance[:k] > 0).sum() / (relevance > 0).sum()
    found[f'ndcg_{k}'] = gain(relevance, k) / gain(np.sort(relevance)[::-1], k)
  return found | {'mrr': 1 / (1 + np.flatnonzero(relevance)[0])}


def test_scores_are_the_definitions():
  wanted, found, hand = {}, {}, []
  for query in range(20):
    scores = RNG.permutation(15).astype(float)
    relevance = RNG.choice([0, 0, 1, 2], 15)
    relevance[query % 15] = 1
    wanted[str(query)] = {str(i): int(r) for i, r in enumerate(relevance)}
    found[str(query)] = {str(i): float(s) for i, s in enumerate(scores)}
    hand.append(by_hand(relevance[np.argsort(-scores)], (1, 3, 10)))
  for name, value in _ranks.scores(wanted, found, (1, 3, 10)).items():
    assert value == pytest.approx(np.mean([each[name] for each in hand])), name


def test_texts_look_for_their_pairs_among_those_of_all_batches():
  """Six texts in three batches, two of them equal, and a negative."""
  x = RNG.normal(size=(3, 1, 6, 4))
  key = np.arange(3 * 6 * 2).reshape(3, 1, 6, 2).astype(np.int32)
  key[2, 0, 0] = key[0, 0, 0]  # the same text with another pair
  x[2, 0, 0] = x[0, 0, 0]
  group = np.array([[1, 1, 2, 2, 2, 0]], np.int32)
  member = np.array([[0, 1, 0, 1, 2, 0]], np.int32)
  batches = [{'group': group, 'member': member, 'text_key': key[i]} for i in range(3)]
  said = [{'vectors': x[i]} for i in range(3)]
  numbers, report = retrieval.Evaluator(cutoffs=(1, 3)).evaluate(validation(batches, said))
  queries = {(i, slot): [(i, slot + 1)] for i in range(3) for slot in (0, 2)}
  queries[0, 0] += queries.pop((2, 0))
  documents = [(i, slot) for i in range(3) for slot in (1, 3, 4)]
  hand = []
  for (i, slot), pairs in queries.items():
    scores = np.array([x[i, 0, slot] @ x[j, 0, other] for j, other in documents])
    relevance = np.array([place in pairs for place in documents])
    hand.append(by_hand(relevance[np.argsort(-scores)], (1, 3)))
  for name in hand[0]:
    if name != 'mrr':
      assert numbers[name] == pytest.approx(np.mean([each[name] for each in hand])), name
  assert report.startswith('5 texts look for their pairs among 9:')


class Predictor(contracts.Predictor):
  def describe(self, text):
    return {name: value.tolist() for name, value in text.items()}

  def joined(self, parts):
    return parts[0]


class Rows(list):
  """One text per row."""

  def texts(self, index):
    return [index]

  def label(self, index):
    return self[index]

  @property
  def numbers(self):
    return self


def test_candidates_in_order():
  relevance, scores = [[0, 1, 2], [1, 0, 0], [0, 0, 0]], RNG.normal(size=(3, 1, 3))
  rows = Rows(relevance)
  given = validation(
    [{}], [{'scores': scores}], [(rows, i) for i in range(3)], predictor=Predictor()
  )
  numbers, report = ranking.Evaluator(cutoffs=(1, 2)).evaluate(given)
  hand = [by_hand(np.array(relevance[i])[np.argsort(-scores[i, 0])], (1, 2)) for i in range(2)]
  for name, value in numbers.items():
    assert value == pytest.approx(np.mean([each[name] for each in hand])), name
  assert report.startswith('2 texts order their candidates:')


@pytest.mark.parametrize('name', similarity.NAMES)
def test_correlations(name):
  from scipy import stats

  labels = [0.1, None, 3.0, 2.0, 5.0]
  said = RNG.normal(size=(5, 1))
  given = validation(
    [{}], [{name: said}], [(Rows(labels), i) for i in range(5)], predictor=Predictor()
  )
  numbers, report = similarity.Evaluator().evaluate(given)
  x, y = said[[0, 2, 3, 4], 0], [0.1, 3, 2, 5]
  assert numbers['spearman'] == pytest.approx(stats.spearmanr(x, y).statistic)
  assert numbers['pearson'] == pytest.approx(np.corrcoef(x, y)[0, 1])
  assert report.startswith('4 pairs')


def test_nothing_to_score():
  nothing = validation([{'tokens': 1}])
  with pytest.raises(ValueError, match="'retrieval' scores vectors of texts and their pairs"):
    retrieval.Evaluator().evaluate(nothing)
  other = lambda: validation([{}], [{'values': np.zeros((1, 1))}], [(Rows([1.0]), 0)], Predictor())
  with pytest.raises(ValueError, match="'ranking' found no text with scores"):
    ranking.Evaluator().evaluate(other())
  with pytest.raises(ValueError, match="'similarity' found 0 pairs"):
    similarity.Evaluator().evaluate(other())
  with pytest.raises(ValueError, match=r'cutoffs=\(0,\) of an evaluator must be numbers above 0'):
    retrieval.Evaluator(cutoffs=(0,))
