"""`unlabelled='learn'`: FixMatch's equation 4 by hand, and what cannot be learned so."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from llm_jax.models import encoder
from llm_jax.objectives import classify

LETTERS = ('a', 'b', 'c')
RNG = np.random.default_rng(0)
LABELS = {
  'multiclass': ['c', None, None, None],
  'binary': ['b', None, None, None],
  'multilabel': [['a'], None, None, None],
}


def made(small, task='multiclass', **options):
  classes = LETTERS[:2] if task == 'binary' else LETTERS
  options = dict(task=task, pool='last', packing='none', unlabelled='learn') | options
  return classify.Objective(small.Tokenizer(), classes, **options)


def batch_of(small, objective, labels):
  rows = objective.rows(small.Documents([[10], [11], [12], [13]], labels=labels), 6)
  return small.stack([rows.example(i, RNG) for i in range(4)])


@pytest.mark.parametrize('task', LABELS)
def test_sure_answers_are_learned_by_the_other_pass(small, task):
  objective = made(small, task, confidence=0.8, self_training=2.0)
  assert objective.terms == {'classify': 1.0, 'self_training': 2.0}
  batch = batch_of(small, objective, LABELS[task])
  assert (
    batch['unlabelled'][:, 0].tolist() == [0, 1, 1, 1] == (1 - batch['label_weight'][:, 0]).tolist()
  )
  size = 1 if task == 'binary' else 3
  a, b = np.random.default_rng(1).normal(0, 3, size=(2, 4, 1, size))
  a[1, 0, 0] = 9.0  # sure, of one class at least
  a[2] = 0.1  # of none
  forward = lambda batch, positions: types.SimpleNamespace(hidden=b)
  net = types.SimpleNamespace(heads={'classifier': jnp.asarray}, forward=forward, train=True)
  found = {name: tuple(map(float, pair)) for name, pair in objective.loss(net, a, batch).items()}
  losses, shares = [], []
  for answer, learned in zip(a[1:, 0], b[1:, 0], strict=True):
    if task == 'multiclass':
      p, q = special.softmax(answer), special.softmax(learned)
      shares.append(float(p.max() >= 0.8))
      losses.append(-np.log(q[p.argmax()]) * shares[-1])
    else:
      p, q = special.expit(answer), special.expit(learned)
      sure = np.maximum(p, 1 - p) >= 0.8
      shares.append(sure.mean())
      losses.append(np.mean(-np.log(np.where(p > 0.5, q, 1 - q)) * sure))
  assert 0 < sum(shares) < 3 and shares[1] == 0
  assert found['self_training'] == (pytest.approx(sum(losses), rel=1e-5), 3)
  assert found['self_training_share'] == (pytest.approx(sum(shares), rel=1e-5), 3)
  plain = made(small, task, unlabelled='ignore').loss(net, a, batch)
  assert found['classify'] == tuple(map(float, plain['classify'])) and found['classify'][1] == 1

  # Nothing of it is in the loss of an evaluation, which would be lowest of a model that is sure of
  # nothing; the weight is that of the batch, whatever the pass is for.
  net.train = False
  still = objective.loss(net, a, batch)
  assert tuple(map(float, still['self_training'])) == (0, 3)
  assert tuple(map(float, still['self_training_share'])) == found['self_training_share']
  net.train = True

  # The gradient goes through the pass that learns alone.
  def term(a, b):
    net.forward = lambda batch, positions: types.SimpleNamespace(hidden=b)
    return objective.loss(net, a, batch)['self_training'][0]

  to_a, to_b = jax.grad(term, (0, 1))(jnp.asarray(a), jnp.asarray(b))
  assert not np.any(to_a) and np.any(to_b[1]) and not np.any(to_b[0]) and not np.any(to_b[2])


def test_a_batch_without_such_texts_learns_nothing_of_them(small, caplog):
  objective = made(small)
  batch = batch_of(small, objective, ['a', 'b', 'c', 'a'])
  net = types.SimpleNamespace(heads={'classifier': jnp.asarray}, train=False)
  found = objective.loss(net, RNG.normal(size=(4, 1, 3)), batch)
  assert tuple(map(float, found['self_training'])) == (0, 0)
  documents = [small.Documents([[10], [11]], labels=['a', 'b'])]
  classify.Objective.derive({'unlabelled': 'learn'}, documents)
  assert 'has nothing to learn from: every training document has a label' in caplog.text
  asked = objective.layout(small.Documents([[10], [11]]), 6).example(0, RNG)
  assert asked['unlabelled'].tolist() == [0]  # what is to be answered is not learned
  assert 'unlabelled' not in made(small, unlabelled='ignore').lay_out([], [], 6)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(unlabelled='ignore', confidence=0.9), "confidence=0.9 is for unlabelled='learn', and"),
    (dict(unlabelled='error', self_training=1.0), "self_training=1.0 is for unlabelled='learn'"),
    (dict(confidence=95.0), 'confidence=95.0 must be a probability above 0 and below 1'),
    (dict(self_training=0.0), 'self_training=0.0 must be a number above 0'),
    (dict(unlabelled='guess'), "unlabelled='guess' must be one of error, ignore, learn"),
  ],
)
def test_options_that_are_not_possible(small, options, message):
  with pytest.raises(ValueError, match=message):
    made(small, **options)


def test_it_needs_classes_and_dropout(small):
  with pytest.raises(ValueError, match="unlabelled='learn' needs classes"):
    classify.Objective(small.Tokenizer(), None, task='regression', unlabelled='learn')
  model = encoder.Model(vocab_size=50, dim=8, layers=1, heads=2, mlp_dim=16, max_len=8, dropout=0.0)
  with pytest.raises(ValueError, match="unlabelled='learn' needs two passes under dropout"):
    made(small, dropout=0.0, pool='mean').check(model.clone(attention_dropout=0.0))
