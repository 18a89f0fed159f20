import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.objectives.shared import mixup
from llm_jax.objectives.shared.label_losses import LabelLoss


def test_each_text_has_a_partner_and_is_the_partner_of_one():
  rank = jnp.array([5, 1, 9, 3, 7])
  real = jnp.array([True, True, False, True, True])
  found = mixup.partners(rank, real)
  assert found[jnp.flatnonzero(real)].tolist() == [4, 3, 0, 1]  # the order is 1, 3, 0, 4
  assert mixup.partners(rank, rank == 9)[2] == 2  # alone
  assert mixup.partners(rank, rank == 0).shape == (5,)  # none at all


def test_what_is_drawn_is_of_the_beta_distribution():
  rng = np.random.default_rng(0)
  rows = [mixup.drawn(rng, 8, 0.4) for _ in range(2000)]
  share = np.stack([row['mix_share'] for row in rows])
  assert share.mean() == pytest.approx(0.5, abs=0.01)
  assert share.var() == pytest.approx(0.25 / (2 * 0.4 + 1), rel=0.03)  # of Beta(a, a)
  rank = np.stack([row['mix_rank'] for row in rows])
  assert rank.dtype == np.int32 and rank.min() >= 0 and len(np.unique(rank)) > 15_990


@pytest.mark.parametrize('task', ['multiclass', 'multilabel', 'binary', 'regression'])
def test_the_loss_is_that_of_mixed_vectors_through_the_last_layer(task):
  """By the equations of the paper, text by text, in float64."""
  rng = np.random.default_rng(1)
  B, G, D, C = 3, 4, 5, 3
  outputs = C if task in ('multiclass', 'multilabel') else 1
  z, w, bias = rng.normal(size=(B, G, D)), rng.normal(size=(D, outputs)), rng.normal(size=outputs)
  label = {
    'multiclass': rng.integers(0, C, (B, G)),
    'multilabel': rng.integers(0, 2, (B, G, C)).astype(float),
    'binary': rng.integers(0, 2, (B, G)),
    'regression': rng.normal(size=(B, G)),
  }[task]
  weight = (rng.random((B, G)) < 0.7).astype(float)
  drawn = [mixup.drawn(rng, G, 1.0) for _ in range(B)]
  batch = {key: np.stack([row[key] for row in drawn]) for key in drawn[0]}
  batch |= {'label': label, 'label_weight': weight}
  weights = (0.5, 1.0, 2.0) if task == 'multiclass' else None
  label_loss = jax.jit(LabelLoss(task, 0 if task == 'regression' else C, weights))

  flat = lambda x: x.reshape(-1, *x.shape[2:])
  texts = [i for i in np.argsort(flat(batch['mix_rank'])) if flat(weight)[i]]
  value = total = 0.0
  with jax.enable_x64(True):
    for i, j in zip(texts, texts[1:] + texts[:1], strict=True):
      share = float(flat(batch['mix_share'])[i])
      logits = (share * flat(z)[i] + (1 - share) * flat(z)[j]) @ w + bias
      for part, index in ((share, i), (1 - share, j)):
        loss, counts = label_loss(jnp.asarray(logits)[None, None], flat(label)[index][None, None])
        value, total = value + part * float(loss[0, 0]), total + part * float(counts[0, 0])
    logits = jnp.asarray(z @ w + bias)
    found = mixup.loss(label_loss, logits, batch, jnp.array(True))
    np.testing.assert_allclose(found, (value, total), rtol=1e-10)
    alone = mixup.loss(label_loss, logits, batch, jnp.array(False))
    loss, counts = label_loss(logits, label)
    np.testing.assert_allclose(alone, ((loss * weight).sum(), (counts * weight).sum()), rtol=1e-12)
    assert abs(float(found[0]) - float(alone[0])) > 1e-3
