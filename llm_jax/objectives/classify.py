"""Classification and regression of one text or a pair of texts, as BERT is fine-tuned.

Devlin et al. 2019, "BERT", section 4.1: [CLS] text [SEP] (or [CLS] A [SEP] B [SEP]), a pooler on
the first token, a linear layer. Radford et al. 2018, "GPT", section 3.2 for causal models: BOS text
EOS, a linear layer on the last token.

Short texts share a row (Krell et al. 2021, arXiv:2107.02027, pack BERT's pretraining so): each
stands between special tokens of its own, with positions from 0, in a segment that no other text
sees, and has a slot of the row for its label. Loss and gradient are those of the same texts with a
row each; only the number of rows differs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Documents, Example, Metrics, Net, Tokenizer
from llm_jax.data import pairs
from llm_jax.nn import heads
from llm_jax.objectives.shared import label_losses, mixup, soft, text_rows
from llm_jax.objectives.shared import labels as labels_lib
from llm_jax.objectives.shared.label_losses import LabelLoss, balanced
from llm_jax.objectives.shared.text_rows import TextRows
from llm_jax.objectives.shared.uncertainty import MEASURES, uncertainty

PACKINGS = ('best_fit', 'none')


class Objective(contracts.Objective, contracts.Predictor):
  """Classification or regression of documents; only what is too long for a row loses its end, the
  longer text of a pair first.

  A batch has `config.batch_size` rows, not texts. Where k texts share a row on average (the log
  says how many), an optimizer step learns from k times as many texts as it would without packing,
  and an epoch has k times fewer steps: to keep the number of texts per step, divide batch_size by
  k; or keep the rows, and take fewer steps. Which texts share a row, and so a step, is fixed for
  the run by their lengths, among equal lengths by chance.

  Args:
    tokenizer: makes the ids.
    classes: names of the classes in the order of their numbers; None for regression.
    task: 'multiclass' (one of the classes), 'binary' (the second of two classes or not, one logit),
      'multilabel' (any of them), 'regression' (a number).
    dropout: rate before the last linear layer.
    pool: 'cls' reads the first token through a pooler, as BERT does; 'mean' the mean of all tokens,
      for encoders that were trained by masked LM alone (arXiv:1908.10084, section 3); 'last' the
      last token, for decoders.
    transform: what stands between pool and last layer: 'pooler', BERT's; 'norm', ModernBERT's
      linear map, activation and norm; 'none'. None: a pooler where the first token is read.
    class_weights: how much a text of each class counts, in the order of the classes; in multilabel
      each class's labels that apply. None: all alike, unless `balance`.
    balance: rare classes count more: weights from the training documents, as scikit-learn's
      'balanced'.
    label_smoothing: the share of a label's probability that is spread over all classes.
    focal: the exponent of the focal loss, by which texts that are easy count less; 0 for none.
    r_drop: above 0, each step runs its texts twice under different dropout, learns from both, and
      adds so many times by how much the two answers differ (R-Drop, arXiv:2106.14448; 0.5 to 5).
    mixup: above 0, what is learned from are texts mixed two by two before the last layer, by shares
      from Beta(mixup, mixup); any two texts of a step may be (senMixup, arXiv:1905.08941). A batch
      then has `mix_rank` [B, G] int32 and `mix_share` [B, G] float32 (`shared.mixup`).
    unlabelled: a document without a label is an 'error', counts for nothing ('ignore'), or is
      learned with the model's own answer as its label where that is sure ('learn': Lee 2013,
      "Pseudo-Label"; in the form of FixMatch, arXiv:2001.07685, section 2.2, with dropout for its
      augmentations: what a first pass answers, a second one learns).
    confidence: with 'learn', the probability from which an answer is sure; None for 0.95. In
      multilabel each class is sure or not.
    self_training: with 'learn', the coefficient of what is learned so; None for 1.
    packing: 'best_fit' puts several texts in a row, the longest first, each where least room is
      left; at most one for every 4 tokens, and 128. 'none': one text per row.
  """

  name = 'classify'
  terms = {'classify': 1.0}
  evaluators = ('loss', 'classification')
  derived = ('classes', 'class_weights')
  diverges = True
  distils = True
  answers_texts = True

  def __init__(
    self,
    tokenizer: Tokenizer,
    classes: tuple[str, ...] | None = None,
    task: str = 'multiclass',
    dropout: float = 0.1,
    pool: str = 'cls',
    unlabelled: str = 'error',
    packing: str = 'best_fit',
    transform: str | None = None,
    class_weights: tuple[float, ...] | None = None,
    balance: bool = False,
    label_smoothing: float = 0.0,
    focal: float = 0.0,
    r_drop: float = 0.0,
    mixup: float = 0.0,
    confidence: float | None = None,
    self_training: float | None = None,
  ):
    transform = transform or ('pooler' if pool == 'cls' else 'none')
    for name, value, allowed in (
      ('task', task, labels_lib.TASKS),
      ('pool', pool, heads.POOLS),
      ('transform', transform, (*heads.TRANSFORMS, 'none')),
      ('packing', packing, PACKINGS),
      ('unlabelled', unlabelled, ('error', 'ignore', 'learn')),
    ):
      if value not in allowed:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(allowed)}.')
    if not 0 <= dropout < 1:
      raise ValueError(f'objective.dropout={dropout} must be at least 0 and below 1.')
    if not 0 <= r_drop < float('inf'):
      raise ValueError(f'objective.r_drop={r_drop} must be a number from 0 on.')
    if not 0 <= mixup < float('inf'):
      raise ValueError(f'objective.mixup={mixup} must be a number from 0 on.')
    if mixup and r_drop:
      raise ValueError(
        f'objective.mixup={mixup} and r_drop={r_drop} contradict each other: the one learns from '
        'texts that are mixed, the other from answers to texts as they are; choose one.'
      )
    if mixup and unlabelled == 'learn':
      raise ValueError(
        f"objective.mixup={mixup} mixes texts that have labels, and unlabelled='learn' learns from "
        'others; choose one.'
      )
    _check_self_training(task, unlabelled, confidence, self_training)
    if balance and (task == 'regression' or class_weights is None):
      raise ValueError(
        'objective.balance=True takes weights from the classes of the training documents, and '
        'there are none; set objective.class_weights, or leave it out.'
      )
    self.labels = labels_lib.Labels(classes, task, self.name)
    self.label_loss = LabelLoss(task, len(classes or ()), class_weights, label_smoothing, focal)
    self.tokenizer, self.classes, self.task = tokenizer, classes, task
    self.dropout, self.pool, self.unlabelled, self.packing = dropout, pool, unlabelled, packing
    self.transform_name, self.r_drop, self.mixup = transform, r_drop, mixup
    self.compares = bool(mixup)
    self.learns_unlabelled = unlabelled == 'learn'
    self.confidence = 0.95 if confidence is None else confidence
    self.terms = {self.name: 1.0} | ({'r_drop': r_drop} if r_drop else {})
    if self.learns_unlabelled:
      self.terms['self_training'] = 1.0 if self_training is None else self_training
    self.frame = pairs.frame(tokenizer, causal=pool == 'last')
    self.predictor = self
    self.measures = {'regression': (), 'multilabel': MEASURES[:2]}.get(task, MEASURES)

  @classmethod
  def derive(cls, options: Mapping[str, Any], documents: Sequence[Documents]) -> dict[str, Any]:
    """The classes of the training documents, where the task has any and the config names none; and
    their weights, where they are to be balanced.

    Raises:
      ValueError: no document has a label, labels are fractional numbers, or a class has no document
        to be weighed by.
    """
    found: dict[str, Any] = {}
    if options.get('task') == 'regression':
      return found
    if options.get('unlabelled') == 'learn' and all(map(_all_labelled, documents)):
      logging.warning(
        "objective.unlabelled='learn' has nothing to learn from: every training document has a "
        'label. Add records without one.'
      )
    classes = options.get('classes')
    if not classes:
      found['classes'] = classes = labels_lib.collect_classes(documents)
      logging.info('%d classes: %s', len(classes), ', '.join(classes[:50]))
    if options.get('balance') and options.get('class_weights') is None:
      weights = balanced(classes, options.get('task') or 'multiclass', documents)
      found['class_weights'] = weights
      shown = (f'{name} {weight:.3g}' for name, weight in zip(classes, weights, strict=True))
      logging.info('Weights of the classes: %s', ', '.join(list(shown)[:50]))
    return found

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As any objective's, with labels that fit the task; nameless classes are two."""
    records = super().sample_records(options)
    labels = labels_lib.samples(options.get('task'), options.get('classes') or ('0', '1'))
    return [record | {'label': next(labels)} for record in records]

  def check(self, model: contracts.Model) -> None:
    """A causal model has no pool 'cls'; without dropout two passes are one."""
    if model.causal and self.pool == 'cls':
      raise ValueError(
        "objective.pool='cls' reads the first token, which in a causal model has seen nothing; use "
        "'last' or 'mean'."
      )
    dropout = self.dropout, model.options.dropout, model.options.attention_dropout
    if self.two_passes and not any(dropout):
      option = f'r_drop={self.r_drop} compares' if self.r_drop else "unlabelled='learn' needs"
      raise ValueError(
        f'objective.{option} two passes under dropout, and there is none; set config.model.dropout.'
      )

  def rows(self, documents: Documents, seq_len: int) -> 'LabelRows':
    """The documents in as few rows as they need.

    Logs how many texts a row holds, how much of the rows is used, and how much is cut off.

    Raises:
      ValueError: a label that does not fit the task, naming the document.
    """
    missing = 'are learned by self-training' if self.learns_unlabelled else 'count for nothing here'
    self.labels.check(documents, self.unlabelled == 'error', missing)
    rows = self.plan(documents, seq_len, documents.values('label'))
    rows.log_cut()
    if self.packing != 'none':
      rows.log_packing()
    return rows

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """The label comes with the row; with `mixup` how its texts are mixed is added."""
    if 'label' not in example:
      raise ValueError(
        f'objective {self.name} labels only rows that it lays out itself; in a mix, set '
        f'rows={self.name!r}.'
      )
    if not self.mixup:
      return example
    return example | mixup.drawn(rng, len(example['label']), self.mixup)

  def layout(self, documents: Documents, seq_len: int) -> 'LabelRows':
    """The rows of documents to predict: no label is looked at, all weights are 0."""
    return self.plan(documents, seq_len, None)

  def plan(self, documents: Documents, seq_len: int, labels: Sequence[Any] | None) -> 'LabelRows':
    """The rows of documents, with their labels or for documents to predict None."""
    return LabelRows(self, documents, seq_len, labels)

  def slots(self, seq_len: int) -> int:
    """G: the most texts of a row."""
    return 1 if self.packing == 'none' else text_rows.slots(seq_len)

  def lay_out(
    self, texts: Sequence[tuple[np.ndarray, np.ndarray | None]], labels: Sequence[Any], seq_len: int
  ) -> Example:
    """A row.

    Args:
      texts: ids of each text, and of the second of a pair or None, which fit in the row together.
      labels: one per text; None for no label.
      seq_len: T.
    """
    slots = self.slots(seq_len)
    row = pairs.packed(texts, seq_len, self.frame, slots)
    row['label'] = np.zeros((slots, *self.labels.shape), self.labels.dtype)
    row['label_weight'] = np.zeros(slots, np.float32)
    for slot, label in enumerate(labels):
      if label is not None:
        row['label'][slot] = self.labels.target(label)
        row['label_weight'][slot] = 1
    if self.learns_unlabelled:
      row['unlabelled'] = np.zeros(slots, np.float32)
      row['unlabelled'][: len(labels)] = [label is None for label in labels]
    return row

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """The last linear layer, and what stands before it."""
    bias = self.pool != 'last'
    found: dict[str, Any] = {}
    if self.transform_name != 'none':
      name, module = heads.TRANSFORMS[self.transform_name]
      found[name] = module(model.options)
    found['classifier'] = heads.ClassifierHead(model.options, self.outputs, self.dropout, bias=bias)
    return found

  @property
  def outputs(self) -> int:
    """C: how many numbers the head gives for a text."""
    return len(self.classes) if self.task in ('multiclass', 'multilabel') else 1

  def positions(self, batch: Batch) -> jax.Array | None:
    """What the pooling reads: one index per text, [B, G], or all."""
    return heads.pool_positions(batch, self.pool)

  def logits(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """B G C logits (C = 1 for binary and regression), at least float32; anything finite where a row
    has no text g.
    """
    x_BGD = heads.pool(hidden_BPD, batch, self.pool)
    if self.transform_name != 'none':
      x_BGD = net.heads[heads.TRANSFORMS[self.transform_name][0]](x_BGD)
    logits_BGC = net.heads['classifier'](x_BGD)
    return logits_BGC.astype(jnp.promote_types(logits_BGC.dtype, jnp.float32))

  def loss(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Metrics:
    """Softmax or sigmoid cross-entropy (multilabel: mean over the classes) and accuracy, or the
    squared error. With `mixup` nothing that a row could say alone.

    What is learned of texts without a label is summed over those that are sure, and counts for all
    of them; `self_training_share` is the share of the sure ones. In an evaluation the sum is 0:
    by its loss a model that is sure of nothing would be the best.
    """
    if self.mixup:
      return {}
    logits_BGC = self.logits(net, hidden_BPD, batch)
    weight_BG = batch['label_weight']
    loss_BG, counts_BG = self.label_loss(logits_BGC, batch['label'])
    found: Metrics = {}
    other_BGC = self._second_pass(net, logits_BGC, batch) if self.two_passes else None
    if self.r_drop:
      loss_BG = (loss_BG + self.label_loss(other_BGC, batch['label'])[0]) / 2
      apart_BG = label_losses.disagreement(self.task, logits_BGC, other_BGC)
      found['r_drop'] = jnp.sum(apart_BG * weight_BG), jnp.sum(weight_BG)
    if self.learns_unlabelled:
      own_BG, sure_BG = label_losses.pseudo_label(self.task, self.confidence, logits_BGC, other_BGC)
      unlabelled_BG = batch['unlabelled']
      count = jnp.sum(unlabelled_BG)
      found['self_training'] = net.train * jnp.sum(own_BG * unlabelled_BG), count
      found['self_training_share'] = jnp.sum(sure_BG * unlabelled_BG), count
    found[self.name] = jnp.sum(loss_BG * weight_BG), jnp.sum(counts_BG * weight_BG)
    return found | self._accuracy(logits_BGC, batch)

  def represent(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """With `mixup`: `logits` [B, G, C], and whether texts are to be `mixed` [B], as in training."""
    mixed_B = jnp.full(len(batch['label']), net.train)
    return {'logits': self.logits(net, hidden_BPD, batch), 'mixed': mixed_B}

  def compare(self, found: Mapping[str, jax.Array], batch: Batch) -> Metrics:
    """With `mixup`: the loss of mixed texts, and the accuracy of the texts as they are."""
    logits_BGC = found['logits']
    mixed = mixup.loss(self.label_loss, logits_BGC, batch, found['mixed'][0])
    return {self.name: mixed} | self._accuracy(logits_BGC, batch)

  def _accuracy(self, logits_BGC: jax.Array, batch: Batch) -> Metrics:
    label, weight_BG = batch['label'], batch['label_weight']
    if self.task == 'regression':
      return {}
    if self.task == 'multiclass':
      right_BG = jnp.argmax(logits_BGC, -1) == label
    else:
      label_BGC = label if self.task == 'multilabel' else label[..., None]
      right_BG = jnp.mean((logits_BGC > 0) == (label_BGC > 0.5), -1)
    return {f'{self.name}_accuracy': (jnp.sum(right_BG * weight_BG), jnp.sum(weight_BG))}

  @property
  def two_passes(self) -> bool:
    """Whether each step runs its texts twice."""
    return bool(self.r_drop) or self.learns_unlabelled

  def _second_pass(self, net: Net, logits_BGC: jax.Array, batch: Batch) -> jax.Array:
    """The logits of another pass, [B, G, C]: the same ones without dropout."""
    if not net.train:
      return logits_BGC
    hidden_BPD = net.forward(batch, self.positions(batch)).hidden
    return self.logits(net, hidden_BPD, batch)

  def answer(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """The logits, [B, G, C]."""
    return self.logits(net, hidden_BPD, batch)

  def divergence(self, a: jax.Array, b: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The divergence of Kullback and Leibler in both directions (SMART, arXiv:1911.03437, section
    2.1), in multilabel the mean over the classes; in regression the squared difference. Over the
    texts that have a label.
    """
    apart_BG = label_losses.disagreement(self.task, a, b)
    if self.task != 'regression':
      apart_BG = 2 * apart_BG  # R-Drop has half of it
    weight_BG = batch['label_weight']
    return jnp.sum(apart_BG * weight_BG), jnp.sum(weight_BG)

  def distilled(
    self,
    net: Net,
    hidden_BPD: jax.Array,
    taught: jax.Array,
    batch: Batch,
    temperature: float,
  ) -> tuple[jax.Array, jax.Array]:
    """Over all texts of the batch, those without a label too: a teacher needs none."""
    ours_BGC = self.logits(net, hidden_BPD, batch)
    apart_BG = soft.divergence(self.task, ours_BGC, taught, temperature)
    texts_B = jnp.max(batch['segments'], axis=1)
    weight_BG = jnp.float32(jnp.arange(apart_BG.shape[1])[None] < texts_B[:, None])
    return jnp.sum(apart_BG * weight_BG), jnp.sum(weight_BG)

  def flops(self, model: contracts.Model, batch: Batch) -> float:
    """Those of the second pass, where there is one; heads are small beside it."""
    if not self.two_passes:
      return 0.0
    rows, length = batch['tokens'].shape
    positions = length if self.pool == 'mean' else batch['text_firsts'].shape[1]
    return rows * model.flops(length, positions)

  def predict(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`probabilities` [B, G, C] of the classes (binary: C = 2); in regression `values` [B, G]."""
    logits_BGC = self.logits(net, hidden_BPD, batch)
    if self.task == 'regression':
      return {'values': logits_BGC[..., 0]}
    if self.task == 'multiclass':
      return {'probabilities': jax.nn.softmax(logits_BGC)}
    if self.task == 'binary':
      logits_BGC = jnp.concatenate([-logits_BGC, logits_BGC], -1)
    return {'probabilities': jax.nn.sigmoid(logits_BGC)}

  def describe(self, text: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `predict` says of one text, for JSON.

    Returns:
      label, probability and probabilities by class; for multilabel the labels of probability above
      one half and probabilities; both with `entropy` and `margin` (`shared.uncertainty`). For
      regression the value.
    """
    if self.task == 'regression':
      return {'value': float(text['values'])}
    values = map(float, text['probabilities'])
    probabilities = dict(zip(self.classes, values, strict=True))
    known = {'probabilities': probabilities}
    known |= uncertainty(text['probabilities'], self.task == 'multilabel')
    if self.task == 'multilabel':
      return {'label': [name for name, p in probabilities.items() if p > 0.5]} | known
    best = max(probabilities, key=probabilities.__getitem__)
    return {'label': best, 'probability': probabilities[best]} | known

  def combined(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer by the means of the probabilities, or of the values."""
    if self.task == 'regression':
      return self.describe({'values': np.mean([answer['value'] for answer in answers])})
    each = [list(answer['probabilities'].values()) for answer in answers]
    return self.describe({'probabilities': np.mean(each, axis=0)})


def _all_labelled(documents: Documents) -> bool:
  labels = documents.values('label')
  return labels is not None and None not in labels


def _check_self_training(
  task: str, unlabelled: str, confidence: float | None, self_training: float | None
) -> None:
  """Raises ValueError for options of self-training that are not possible, or that nothing reads."""
  given = {'confidence': confidence, 'self_training': self_training}
  for name, value in given.items():
    if value is not None and unlabelled != 'learn':
      raise ValueError(
        f"objective.{name}={value} is for unlabelled='learn', and unlabelled is {unlabelled!r}; "
        'set it, or leave this out.'
      )
  if unlabelled == 'learn' and task == 'regression':
    raise ValueError(
      "objective.unlabelled='learn' needs classes, of which an answer may be sure, and "
      "objective.task is regression; set unlabelled='ignore'."
    )
  if confidence is not None and not 0 < confidence < 1:
    raise ValueError(
      f'objective.confidence={confidence} must be a probability above 0 and below 1 (0.95 in the '
      'paper).'
    )
  if self_training is not None and not 0 < self_training < float('inf'):
    raise ValueError(f'objective.self_training={self_training} must be a number above 0.')


class LabelRows(TextRows):
  """Rows with labels; None for documents to predict, which have none."""

  def __init__(
    self, objective: Objective, documents: Documents, seq_len: int, labels: Sequence[Any] | None
  ):
    slots = objective.slots(seq_len)
    super().__init__(documents, seq_len, slots, objective.frame, objective.name)
    self.objective, self.labels = objective, labels

  def label(self, text: int) -> Any:
    """The label of a text as a number; None where it has none."""
    given = None if self.labels is None else self.labels[text]
    return None if given is None else self.objective.labels.target(given)

  def example(self, index: int, rng: np.random.Generator) -> Example:
    texts = self.texts(index)
    labels = [] if self.labels is None else [self.labels[text] for text in texts]
    return self.objective.lay_out([self.ids(text) for text in texts], labels, self.seq_len)
