"""Losses of labels against torch, scikit-learn and the papers' equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn.utils.class_weight import compute_class_weight

from llm_jax.objectives import classify
from llm_jax.objectives.shared.label_losses import LabelLoss, balanced

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (2, 3, 4))
LABELS = RNG.integers(0, 4, (2, 3))
SEVERAL = RNG.integers(0, 2, (2, 3, 4))
WEIGHTS = (0.5, 1.0, 2.0, 4.0)


def value(loss, logits=LOGITS, label=LABELS):
  """The weighted mean over all texts."""
  losses, counts = loss(jnp.asarray(logits, jnp.float32), jnp.asarray(label))
  assert losses.shape == counts.shape == np.shape(logits)[:2]
  return float(losses.sum() / counts.sum())


@pytest.mark.parametrize('gamma', [0.0, 1.0, 2.0, 3.5])
def test_the_focal_loss_is_the_papers(gamma):
  p = np.take_along_axis(special.softmax(LOGITS, -1), LABELS[..., None], -1)[..., 0]
  expected = -((1 - p) ** gamma) * np.log(p)
  assert value(LabelLoss('multiclass', 4, focal=gamma)) == pytest.approx(expected.mean(), rel=1e-5)
  counts = np.array(WEIGHTS)[LABELS]
  weighted = (expected * counts).sum() / counts.sum()
  assert value(LabelLoss('multiclass', 4, WEIGHTS, focal=gamma)) == pytest.approx(
    weighted, rel=1e-5
  )
  p = special.expit(np.where(SEVERAL, LOGITS, -LOGITS))
  expected = np.mean(-((1 - p) ** gamma) * np.log(p))
  found = value(LabelLoss('multilabel', 4, focal=gamma), label=SEVERAL)
  assert found == pytest.approx(expected, rel=1e-5)


def test_what_is_certain_has_a_finite_gradient():
  logits, label = jnp.array([[[60.0, -60.0], [-60.0, 60.0]]]), jnp.array([[0, 0]])
  for options in (dict(focal=1.0), dict(focal=2.0), dict(label_smoothing=0.1)):
    loss = LabelLoss('multiclass', 2, **options)
    gradient = jax.grad(lambda x, loss=loss: loss(x, label)[0].sum())(logits)
    assert np.isfinite(gradient).all() and np.abs(gradient[0, 1]).max() > 0.1


def test_easy_texts_count_less_by_the_focal_loss_alone():
  easy, hard = [[[4.0, 0.0]]], [[[0.0, 1.0]]]
  share = lambda loss: value(loss, easy, [[0]]) / value(loss, hard, [[0]])
  assert share(LabelLoss('multiclass', 2, focal=2.0)) < share(LabelLoss('multiclass', 2)) / 100


@pytest.mark.parity
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('weights', [None, WEIGHTS])
def test_weights_and_smoothing_are_torchs(smoothing, weights):
  import torch

  tensor = lambda x: torch.tensor(np.reshape(x, (6, *np.shape(x)[2:])))
  weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
  theirs = torch.nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
  ours = LabelLoss('multiclass', 4, weights, smoothing)
  assert value(ours) == pytest.approx(float(theirs(tensor(LOGITS), tensor(LABELS))), rel=1e-5)

  theirs = torch.nn.BCEWithLogitsLoss(pos_weight=weight)
  label = SEVERAL * (1 - smoothing) + smoothing / 2
  ours = LabelLoss('multilabel', 4, weights, smoothing)
  expected = float(theirs(tensor(LOGITS), tensor(label)))
  assert value(ours, label=SEVERAL) == pytest.approx(expected, rel=1e-5)

  two = None if weights is None else weights[:2]
  label = SEVERAL[..., 0]
  counts = np.ones(label.shape) if two is None else np.array(two)[label]
  theirs = torch.nn.BCEWithLogitsLoss(tensor(counts), reduction='sum')
  smooth = tensor(label * (1 - smoothing) + smoothing / 2)
  expected = float(theirs(tensor(LOGITS[..., 0]), smooth)) / counts.sum()
  ours = LabelLoss('binary', 2, two, smoothing)
  assert value(ours, LOGITS[..., :1], label) == pytest.approx(expected, rel=1e-5)


def test_balanced_weights_are_scikit_learns(small):
  names = ['b', 'a', 'b', None, 'c', 'b']
  documents = [small.Documents([[9]] * 6, labels=names)]
  given = [name for name in names if name is not None]
  expected = compute_class_weight('balanced', classes=np.array(['a', 'b', 'c']), y=given)
  options = dict(balance=True, unlabelled='ignore')
  found = classify.Objective.derive(options, documents)
  assert found['classes'] == ('a', 'b', 'c')
  assert found['class_weights'] == pytest.approx(tuple(expected))
  said = classify.Objective.derive(options | dict(class_weights=(1.0, 2.0, 3.0)), documents)
  assert said.keys() == {'classes'}
  classify.Objective(small.Tokenizer(), **found, **options)
  several = [small.Documents([[9]] * 4, labels=[['a'], ['a', 'b'], [], ['a']])]
  assert balanced(('a', 'b'), 'multilabel', several) == (1 / 3, 3.0)
  with pytest.raises(ValueError, match="cannot weigh the class 'd', which 0 of 5 training"):
    balanced(('a', 'd'), 'multiclass', documents)
  with pytest.raises(ValueError, match="cannot weigh the class 'a', which 1 of 1"):
    balanced(('a',), 'multilabel', [small.Documents([[9]], labels=[['a']])])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(class_weights=(1.0, 2.0)), r'class_weights=\(1.0, 2.0\) must be 3 numbers above 0'),
    (dict(class_weights=(1.0, 2.0, 0.0)), 'must be 3 numbers above 0'),
    (dict(label_smoothing=1.0), 'label_smoothing=1.0 must be at least 0 and below 1'),
    (dict(focal=0.5), 'focal=0.5 must be 0, or at least 1'),
    (dict(focal=2.0, label_smoothing=0.1), 'contradict each other'),
    (dict(balance=True), 'balance=True takes weights from the classes'),
    (dict(task='regression', focal=2.0), 'focal=2.0 needs classes'),
    (dict(task='regression', balance=True), 'balance=True takes weights from the classes'),
  ],
)
def test_refuses(small, options, message):
  classes = None if options.get('task') == 'regression' else ('a', 'b', 'c')
  with pytest.raises(ValueError, match=message):
    classify.Objective(small.Tokenizer(), classes, **options)
