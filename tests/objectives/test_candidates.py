"""Scores of the candidates of a text: `choice` and `rerank`."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.models import decoder, encoder
from llm_jax.objectives import choice, rerank
from llm_jax.programs import network as networks
from llm_jax.training import step

RNG = np.random.default_rng(0)
TOKENIZER = byte.create()
SHAPE = dict(
  vocab_size=TOKENIZER.vocab_size,
  dim=8,
  layers=1,
  heads=2,
  mlp_dim=16,
  max_len=64,
  dropout=0.0,
  attention_dropout=0.0,
  dtype='float64',
  param_dtype='float64',
  unroll=0,
)


def memory(module, *records):
  return Memory(records, module.Objective.encode, TOKENIZER)


def batch_of(objective, documents, seq_len=64):
  rows = objective.rows(documents, seq_len)
  examples = [rows.example(i, RNG) for i in range(len(rows))]
  return rows, {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def scored(objective, batch, seed=0):
  """Random scores, and what the objective says of them."""
  score_BG = np.random.default_rng(seed).normal(size=batch['group'].shape)
  net = types.SimpleNamespace(heads={objective.head: lambda x: x})
  hidden = jnp.asarray(score_BG[..., None])
  found = objective.loss(net, hidden, batch)
  return score_BG, {name: (float(a), float(b)) for name, (a, b) in found.items()}


def by_text(rows, values_BG):
  """Text -> values of its candidates, in their order."""
  found = {}
  for row in range(len(rows)):
    for slot, document in enumerate(rows.texts(row)):
      found.setdefault(document, []).append(values_BG[row, slot])
  return {document: np.array(values) for document, values in found.items()}


CHOICES = (
  {'text': 'ab', 'choices': ['c', 'de'], 'label': '1'},
  {'text': 'f', 'choices': ['g', 'h', 'ijk'], 'label': 'g'},
  {'text': 'l', 'choices': ['m', 'n'], 'label': '0'},
)
RERANKED = (
  {'text': 'ab', 'passages': ['c', 'de', 'f'], 'relevance': [0, 2, 1]},
  {'text': 'g', 'passages': ['h', 'i'], 'relevance': [0, 0]},
  {'text': 'j', 'passages': ['k', 'l', 'm', 'n'], 'relevance': [1, 0, 1, 0]},
)


def test_candidates_stand_with_their_text_in_one_row():
  objective = choice.Objective(TOKENIZER)
  rows, batch = batch_of(objective, memory(choice, *CHOICES[:2]))
  assert len(rows) == 1 and rows.texts(0) in ([0, 0, 1, 1, 1], [1, 1, 1, 0, 0])
  start = 0 if rows.texts(0)[0] == 0 else 3
  inside = batch['segments'][0] == start + 2
  wanted = [2, ord('a') + 7, ord('b') + 7, 3, ord('d') + 7, ord('e') + 7, 3]
  assert batch['tokens'][0][inside].tolist() == wanted
  assert batch['token_types'][0][inside].tolist() == [0, 0, 0, 0, 1, 1, 1]
  labels = by_text(rows, batch['label'])
  assert labels[0].tolist() == [0, 1] and labels[1].tolist() == [1, 0, 0]
  assert batch['label_weight'].sum() == 5


def test_the_softmax_is_over_the_candidates_of_one_text():
  objective = choice.Objective(TOKENIZER, pool='mean')
  objective.pool = 'last'  # scores as they are
  rows, batch = batch_of(objective, memory(choice, *CHOICES))
  score_BG, found = scored(objective, batch)
  losses, right = [], []
  for document, scores in by_text(rows, score_BG).items():
    target = (1, 0, 0)[document]
    losses.append(-special.log_softmax(scores)[target])
    right.append(scores.argmax() == target)
  assert found['choice'] == (pytest.approx(sum(losses)), 3)
  assert found['choice_accuracy'] == (sum(right), 3)


def test_what_is_not_labelled_counts_for_nothing():
  objective = choice.Objective(TOKENIZER, pool='last', unlabelled='ignore')
  records = [*CHOICES, {'text': 'o', 'choices': ['p', 'q']}]
  _, batch = batch_of(objective, memory(choice, *records))
  assert scored(objective, batch)[1]['choice'][1] == 3
  with pytest.raises(ValueError, match=r'document 3: no label; .*unlabelled=ignore'):
    choice.Objective(TOKENIZER).rows(memory(choice, *records), 64)


@pytest.mark.parametrize('loss', rerank.LOSSES)
def test_losses_of_rankings(loss):
  objective = rerank.Objective(TOKENIZER, loss=loss, pool='last')
  rows, batch = batch_of(objective, memory(rerank, *RERANKED))
  score_BG, found = scored(objective, batch)
  losses, right = [], []
  for document, scores in by_text(rows, score_BG).items():
    relevance = np.array(RERANKED[document]['relevance'], float)
    right.append(relevance[scores.argmax()] == relevance.max())
    if loss == 'binary':
      sign = np.where(relevance > 0, 1, -1)
      losses.append(np.mean(np.log1p(np.exp(-sign * scores))))
    elif relevance.any():
      if loss == 'softmax':
        losses.append(-relevance / relevance.sum() @ special.log_softmax(scores))
      else:
        above = relevance[:, None] > relevance
        losses.append(np.mean(np.log1p(np.exp(scores[None] - scores[:, None]))[above]))
  assert len(losses) == (3 if loss == 'binary' else 2)
  assert found['rerank'] == (pytest.approx(sum(losses)), len(losses))
  assert found['rerank_accuracy'] == (sum(right), 3)


def test_answers():
  parts = [{'score': 0.0}, {'score': 1.0}, {'score': -1.0}]
  answer = choice.Objective(TOKENIZER).joined(parts)
  assert answer['choice'] == 1
  assert answer['probabilities'] == pytest.approx(special.softmax([0, 1, -1]).tolist())
  answer = rerank.Objective(TOKENIZER).joined(parts)
  assert answer == {'scores': [0, 1, -1], 'ranking': [1, 0, 2]}


@pytest.mark.parametrize(
  ('module', 'record', 'message'),
  [
    (choice, {'text': 'a'}, "field 'choices' is None; it must be a list of texts"),
    (choice, {'text': 'a', 'choices': 'bc'}, "field 'choices' is 'bc'"),
    (choice, {'text': 'a', 'choices': ['b', 'c'], 'label': '2'}, "label '2' is none of the 2"),
    (choice, {'text': 'a', 'choices': ['1', '2'], 'label': '1'}, "label '1' may be several"),
    (choice, {'text': 'a', 'choices': ['b', 'b'], 'label': 'b'}, "label 'b' may be several"),
    (rerank, {'text': 'a', 'passages': []}, "field 'passages' is \\[\\]"),
  ],
)
def test_records_that_cannot_be(module, record, message):
  with pytest.raises(ValueError, match=message):
    memory(module, record)


@pytest.mark.parametrize('given', [None, [1], [1, -1], [1, float('nan')], ['1', '0'], [True, 0]])
def test_relevance_that_cannot_be(given):
  record = {'text': 'a', 'passages': ['b', 'c'], 'relevance': given}
  with pytest.raises(ValueError, match='it must be a list of 2 numbers from 0 on'):
    rerank.Objective(TOKENIZER).rows(memory(rerank, record), 64)


def test_wrong_options():
  with pytest.raises(ValueError, match="objective.loss='x' must be one of"):
    rerank.Objective(TOKENIZER, loss='x')
  with pytest.raises(ValueError, match="objective.unlabelled='x' must be one of"):
    choice.Objective(TOKENIZER, unlabelled='x')
  with pytest.raises(ValueError, match='objective.dropout=1.0 must be'):
    choice.Objective(TOKENIZER, dropout=1.0)
  model = decoder.Model(**SHAPE | dict(dtype='float32', param_dtype='float32'))
  with pytest.raises(ValueError, match="use 'last' or 'mean'"):
    choice.Objective(TOKENIZER).check(model)


@pytest.mark.slow
@pytest.mark.parametrize(('module', 'records'), [(choice, CHOICES), (rerank, RERANKED)])
def test_packed_texts_learn_as_if_alone(module, records):
  with jax.enable_x64(True):
    results = []
    for packing in ('best_fit', 'none'):
      objective = module.Objective(TOKENIZER, dropout=0.0, packing=packing)
      rows, batch = batch_of(objective, memory(module, *records))
      model = encoder.Model(**SHAPE)
      network = networks.Network(model, objective.heads(model), objective)
      shapes = nn.meta.unbox(jax.eval_shape(network.init, jax.random.PRNGKey(0), batch)['params'])
      rng = np.random.default_rng(1)
      params = jax.tree.map(lambda s, rng=rng: rng.normal(0.3, 0.5, s.shape), shapes)
      learn = jax.jit(lambda batch, n=network, p=params: step.gradient(p, batch, None, network=n))
      results.append(learn(batch))
      assert (len(rows) < len(records)) == (packing == 'best_fit')
    wrong = learn(batch | {'segments': np.minimum(batch['segments'], 1)})
    packed, alone = ((grads, metrics[objective.name]) for grads, metrics in results)
    for x, y in zip(jax.tree.leaves(packed), jax.tree.leaves(alone), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)
    head = f'heads_{objective.head}'
    assert np.abs(alone[0][head]['dense']['bias']).max() < 1e-15
    assert objective.no_gradient(f'{head}/dense/bias')
    assert abs(float(wrong[1]['loss'][0] - results[1][1]['loss'][0])) > 1e-6
