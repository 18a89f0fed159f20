"""The loss of `classify` on one text, and how much the text counts.

Cross-entropy with weights of classes (King and Zeng 2001, doi:10.1093/oxfordjournals.pan.a004868)
and smoothed labels (Szegedy et al. 2016, arXiv:1512.00567, section 7), the focal loss (Lin et al.
2017, arXiv:1708.02002, equation 4), the squared error. Weighted and smoothed losses are those of
torch's `CrossEntropyLoss` and `BCEWithLogitsLoss`.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.core.contracts import Documents


@dataclasses.dataclass(frozen=True)
class LabelLoss:
  """A loss by the options of `classify`.

  Attributes:
    task: one of `labels_lib.TASKS`.
    classes: C; 0 in regression.
    class_weights: of each class; None for 1. A text counts as its class does, so that the loss is a
      weighted mean. In multilabel, of each class's positive labels alone.
    label_smoothing: the share of a label's probability that is spread over all classes.
    focal: the exponent gamma; 0 for cross-entropy.

  Raises:
    ValueError: options that do not fit the task or each other.
  """

  task: str
  classes: int
  class_weights: tuple[float, ...] | None = None
  label_smoothing: float = 0.0
  focal: float = 0.0

  def __post_init__(self) -> None:
    weights = self.class_weights
    given = [
      f'objective.{name}={value!r}'
      for name in ('class_weights', 'label_smoothing', 'focal')
      if (value := getattr(self, name))
    ]
    if self.task == 'regression' and given:
      raise ValueError(f'{given[0]} needs classes, and objective.task is regression; leave it out.')
    if weights is not None and (len(weights) != self.classes or min(weights) <= 0):
      raise ValueError(
        f'objective.class_weights={weights!r} must be {self.classes} numbers above 0, in the order '
        'of the classes.'
      )
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(
        f'objective.label_smoothing={self.label_smoothing} must be at least 0 and below 1.'
      )
    if self.focal and self.focal < 1:  # its gradient has no bound where a probability is 1
      raise ValueError(f'objective.focal={self.focal} must be 0, or at least 1 (2 in the paper).')
    if self.focal and self.label_smoothing:
      raise ValueError(
        f'objective.focal={self.focal} and label_smoothing={self.label_smoothing} contradict each '
        'other: one lets easy texts count less, the other makes none easy; choose one.'
      )

  def __call__(self, logits_BGC: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of each text, and what it counts, both [B, G]: their sums make the weighted mean.

    Args:
      logits_BGC: C = 1 for binary and regression.
      label: as a batch has it: [B, G], or [B, G, C] for multilabel.
    """
    if self.task == 'regression':
      loss_BG = jnp.square(logits_BGC[..., 0] - label)
      return loss_BG, jnp.ones_like(loss_BG)
    if self.task == 'multiclass':
      return self._softmax(logits_BGC, label)
    if self.task == 'multilabel':
      loss_BG = jnp.mean(self._sigmoid(logits_BGC, label, self.class_weights), -1)
      return loss_BG, jnp.ones_like(loss_BG)
    counts_BG = self._counts(label, logits_BGC.dtype)
    return self._sigmoid(logits_BGC, label[..., None], None)[..., 0] * counts_BG, counts_BG

  def _softmax(self, logits_BGC: jax.Array, label_BG: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_p_BG = -optax.softmax_cross_entropy_with_integer_labels(logits_BGC, label_BG)
    counts_BG = self._counts(label_BG, log_p_BG.dtype)
    loss_BG = -self._eased(log_p_BG) * counts_BG
    if self.label_smoothing:
      weights_C = jnp.asarray(self.class_weights or (1.0,) * self.classes, log_p_BG.dtype)
      spread_BG = -jnp.mean(jax.nn.log_softmax(logits_BGC) * weights_C, -1)
      loss_BG += self.label_smoothing * (spread_BG - loss_BG)
    return loss_BG, counts_BG

  def _sigmoid(
    self, logits_BGC: jax.Array, label_BGC: jax.Array, positives: tuple[float, ...] | None
  ) -> jax.Array:
    """[B, G, C]; `positives`: the weights of labels that apply."""
    label_BGC = label_BGC.astype(logits_BGC.dtype)
    label_BGC += self.label_smoothing * (0.5 - label_BGC)
    yes_BGC = self._eased(jax.nn.log_sigmoid(logits_BGC))
    no_BGC = self._eased(jax.nn.log_sigmoid(-logits_BGC))
    if positives is not None:
      yes_BGC *= jnp.asarray(positives, yes_BGC.dtype)
    return -label_BGC * yes_BGC - (1 - label_BGC) * no_BGC

  def _eased(self, log_p: jax.Array) -> jax.Array:
    """log p, times (1 - p)^gamma."""
    return log_p * (-jnp.expm1(log_p)) ** self.focal if self.focal else log_p

  def _counts(self, label_BG: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if self.class_weights is None:
      return jnp.ones(label_BG.shape, dtype)
    return jnp.asarray(self.class_weights, dtype)[label_BG]


def disagreement(task: str, a_BGC: jax.Array, b_BGC: jax.Array) -> jax.Array:
  """[B, G]: how far the answers of two passes are apart: half the divergence of Kullback and
  Leibler in both directions (Liang et al. 2021, "R-Drop", arXiv:2106.14448, equation 3), in
  multilabel the mean over the classes; in regression the squared difference.

  Args:
    task: one of `labels_lib.TASKS`.
    a_BGC: logits of one pass.
    b_BGC: of the other.
  """
  if task == 'regression':
    return jnp.square(a_BGC - b_BGC)[..., 0]
  if task == 'multiclass':
    a_BGC, b_BGC = jax.nn.log_softmax(a_BGC), jax.nn.log_softmax(b_BGC)
    return jnp.sum((jnp.exp(a_BGC) - jnp.exp(b_BGC)) * (a_BGC - b_BGC), -1) / 2
  both_BGC = (jax.nn.sigmoid(a_BGC) - jax.nn.sigmoid(b_BGC)) * (a_BGC - b_BGC)
  return jnp.mean(both_BGC, -1) / 2


def pseudo_label(
  task: str, confidence: float, answer_BGC: jax.Array, logits_BGC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """How far a pass is from what another one answers, where that is sure (Sohn et al. 2020,
  "FixMatch", arXiv:2001.07685, equation 4): the cross-entropy of the most likely class of the
  first; in multilabel the mean over the classes, each of which is sure or not.

  Args:
    task: one of `labels_lib.TASKS`, but for regression.
    confidence: the probability from which an answer is sure.
    answer_BGC: logits of the pass that answers; no gradient goes through them.
    logits_BGC: of the one that learns.

  Returns:
    [B, G] both: the loss, 0 where the answer is not sure; and 1 or 0, whether it is (in multilabel
    of how many of the classes).
  """
  answer_BGC = jax.lax.stop_gradient(answer_BGC)
  if task == 'multiclass':
    sure_BG = jnp.max(jax.nn.softmax(answer_BGC), -1) >= confidence
    best_BG = jnp.argmax(answer_BGC, -1)
    loss_BG = optax.softmax_cross_entropy_with_integer_labels(logits_BGC, best_BG)
    return loss_BG * sure_BG, sure_BG.astype(loss_BG.dtype)
  yes_BGC = (answer_BGC > 0).astype(logits_BGC.dtype)
  sure_BGC = jax.nn.sigmoid(jnp.abs(answer_BGC)) >= confidence
  loss_BGC = optax.sigmoid_binary_cross_entropy(logits_BGC, yes_BGC)
  return jnp.mean(loss_BGC * sure_BGC, -1), jnp.mean(sure_BGC.astype(loss_BGC.dtype), -1)


def balanced(
  classes: Sequence[str], task: str, documents: Sequence[Documents]
) -> tuple[float, ...]:
  """Weights by which all classes count alike: n / (C n_c), scikit-learn's 'balanced'; in multilabel
  (n - n_c) / n_c, so that the labels that apply count as much as those that do not.

  Args:
    classes: in the order of their numbers.
    task: 'multiclass', 'binary' or 'multilabel'.
    documents: those of training.

  Raises:
    ValueError: a class of no document, or in multilabel of all of them.
  """
  counts: Counter[str] = Counter()
  texts = 0
  for label in _labels(documents):
    several = isinstance(label, list | tuple)
    counts.update({str(name) for name in label} if several else [str(label)])
    texts += 1
  weights = []
  for name in classes:
    n, others = counts[name], texts - counts[name]
    if not n or (task == 'multilabel' and not others):
      raise ValueError(
        f'objective.balance=True cannot weigh the class {name!r}, which {n} of {texts} training '
        'documents have; set objective.class_weights.'
      )
    weights.append(others / n if task == 'multilabel' else texts / (len(classes) * n))
  return tuple(weights)


def _labels(documents: Sequence[Documents]) -> list[Any]:
  found = [label for split in documents for label in split.values('label') or ()]
  return [label for label in found if label is not None]
