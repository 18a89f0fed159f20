"""How alike two texts are, as a number: both are read together (a cross-encoder), as BERT is
fine-tuned for semantic textual similarity (Devlin et al. 2019, arXiv:1810.04805, section 4.1).

The losses are those of sentence-transformers' CrossEncoder, of each pair alone, and two that
compare the pairs of a whole batch by which has the higher label: whether a step runs the batch in
one part or in several, on one device or on many, the gradient is the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from llm_jax.core.contracts import Batch, Documents, Metrics, Net, Tokenizer
from llm_jax.objectives import classify
from llm_jax.objectives.classify import LabelRows
from llm_jax.objectives.shared.labels import Labels

RANKING = ('pairwise', 'cosent')  # losses that compare
LOSSES = ('bce', 'mse', *RANKING)
FORBIDDEN = -1e30  # a logit; finite, so that what is masked has a gradient of zero


class Objective(classify.Objective):
  """How alike the texts of a pair are.

  A record has a `text`, a `pair` and a `label`, a number within `range`. Its raw score s is the one
  output of a linear layer. Batches and rows are those of `classify`.

  Args:
    tokenizer: makes the ids.
    loss: of each record 'bce', the cross-entropy of sigmoid(s) and the label, which is scaled from
      `range` to 0 and 1, or 'mse', the squared difference of s and the label; over all two records
      of a batch with different labels 'pairwise', the mean of log(1 + exp(scale * (s of the lower -
      s of the higher))) (Burges et al. 2005, "RankNet"), or 'cosent', log(1 + the sum of
      exp(scale * (s of the lower - s of the higher))) (Su 2022, "CoSENT", kexue.fm/archives/8847).
    range: the lowest and the highest label.
    scale: of the losses that compare; raw scores are multiplied by it. CoSENT has 20 for cosines.
    dropout: rate before the last linear layer.
    pool: 'cls' reads the first token through a pooler, as BERT does; 'mean' the mean of all tokens;
      'last' the last token, for decoders.
    transform: what stands between pool and last layer: 'pooler', BERT's; 'norm', ModernBERT's;
      'none'. None: a pooler where the first token is read.
    unlabelled: a record without a label is an 'error', or counts for nothing ('ignore').
    packing: 'best_fit' puts several pairs in a row; 'none': one.
  """

  name = 'pair'
  terms = {'pair': 1.0}
  evaluators = ('loss', 'similarity')
  derived = ()

  def __init__(
    self,
    tokenizer: Tokenizer,
    loss: str = 'bce',
    range: tuple[float, float] = (0.0, 1.0),
    scale: float = 1.0,
    dropout: float = 0.1,
    pool: str = 'cls',
    transform: str | None = None,
    unlabelled: str = 'error',
    packing: str = 'best_fit',
  ):
    if loss not in LOSSES:
      raise ValueError(f'objective.loss={loss!r} must be one of {", ".join(LOSSES)}.')
    if len(range) != 2 or not all(map(_finite, range)) or not range[0] < range[1]:
      raise ValueError(
        f'objective.range={range!r} must be the lowest and the highest label, such as (0, 5).'
      )
    if not 0 < scale < math.inf:
      raise ValueError(f'objective.scale={scale} must be a number above 0.')
    if scale != 1 and loss not in RANKING:
      raise ValueError(
        f'objective.scale={scale} is of the losses that compare ({", ".join(RANKING)}); with '
        f'loss={loss!r} leave it out.'
      )
    super().__init__(
      tokenizer,
      task='regression',
      dropout=dropout,
      pool=pool,
      transform=transform,
      unlabelled=unlabelled,
      packing=packing,
    )
    self.kind, self.scale, self.compares = loss, scale, loss in RANKING
    self.low, self.high = map(float, range)
    self.labels = Labels(None, 'regression', self.name, (self.low, self.high))

  @classmethod
  def derive(cls, options: Mapping[str, Any], documents: Sequence[Documents]) -> dict[str, Any]:
    """Nothing: a number has no classes."""
    del options, documents
    return {}

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs, with the lowest label."""
    low = (options.get('range') or (0.0, 1.0))[0]
    return [{'text': 'some words', 'pair': 'words', 'label': low}] * 4

  def rows(self, documents: Documents, seq_len: int) -> LabelRows:
    """The pairs in as few rows as they need.

    Logs how many a row holds, how much of the rows is used, and how much is cut off.

    Raises:
      ValueError: a record without a second text, or with a label that is no number within the
        range, naming it.
    """
    alone = _alone(documents)
    if len(alone):
      raise ValueError(
        f'{documents.where(int(alone[0]))} has no second text to compare the first with; '
        'config.data.pair names its field.'
      )
    return super().rows(documents, seq_len)

  def layout(self, documents: Documents, seq_len: int) -> LabelRows:
    """The rows of pairs to score: no label is looked at; a text alone gets no score."""
    alone = _alone(documents)
    if len(alone):
      logging.warning(
        'pair: %d of %d records have no second text and get no score, the first: %s; --pair=FIELD '
        'names its field in --mode=predict.',
        len(alone),
        len(documents),
        documents.where(int(alone[0])),
      )
    return super().layout(documents, seq_len)

  def no_gradient(self, path: str) -> str | None:
    """What adds the same to all scores changes no comparison of them."""
    own = self.compares and path == 'heads_classifier/dense/bias'
    return 'it adds the same to every score' if own else None

  def loss(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Metrics:
    """The mean over the pairs of texts; of the losses that compare nothing."""
    if self.compares:
      return {}
    score_BG = self.logits(net, hidden_BPD, batch)[..., 0]
    label_BG, weight_BG = batch['label'], batch['label_weight']
    if self.kind == 'mse':
      loss_BG = jnp.square(score_BG - label_BG)
    else:
      share_BG = (label_BG - self.low) / (self.high - self.low)
      loss_BG = optax.sigmoid_binary_cross_entropy(score_BG, share_BG)
    return {'pair': (jnp.sum(loss_BG * weight_BG), jnp.sum(weight_BG))}

  def represent(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`scores` [B, G], raw; anything finite where a row has no pair g."""
    return {'scores': self.logits(net, hidden_BPD, batch)[..., 0]}

  def compare(self, found: Mapping[str, jax.Array], batch: Batch) -> Metrics:
    """The loss over all two records of the batch whose labels differ; and how often the one with
    the higher label has the higher score. 'cosent' is one number for the whole batch.
    """
    score_N, label_N, known_N = (
      x.reshape(-1) for x in (found['scores'], batch['label'], batch['label_weight'] > 0)
    )
    # [i, j]: record i has the higher label, and by how much j scores above it.
    above_NN = (label_N[:, None] > label_N) & known_N[:, None] & known_N
    wrong_NN = self.scale * (score_N - score_N[:, None])
    count = jnp.sum(above_NN.astype(score_N.dtype))
    right = jnp.sum((above_NN & (wrong_NN < 0)).astype(score_N.dtype))
    if self.kind == 'pairwise':
      loss = jnp.sum(jnp.where(above_NN, jax.nn.softplus(wrong_NN), 0)), count
    else:
      wrong = jnp.where(above_NN, wrong_NN, FORBIDDEN).reshape(-1)
      some = (count > 0).astype(count.dtype)
      loss = jax.nn.logsumexp(jnp.append(wrong, 0)) * some, some
    return {'pair': loss, 'pair_accuracy': (right, count)}

  def predict(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`values` [B, G]: with 'mse' the raw scores, which are in the unit of the labels; else their
    sigmoid, scaled to the range of the labels.
    """
    score_BG = self.logits(net, hidden_BPD, batch)[..., 0]
    if self.kind == 'mse':
      return {'values': score_BG}
    return {'values': self.low + (self.high - self.low) * jax.nn.sigmoid(score_BG)}

  def describe(self, text: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The `score` of one pair."""
    return {'score': float(text['values'])}

  def combined(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean score; None for a text alone."""
    scores = [answer['score'] for answer in answers]
    return {'score': None if None in scores else float(np.mean(scores))}

  def answers(
    self, row: Mapping[str, np.ndarray], rows: LabelRows, index: int
  ) -> Iterator[dict[str, Any]]:
    """The score of each pair of a row; None for a text alone."""
    said = super().answers(row, rows, index)
    for text, answer in zip(rows.texts(index), said, strict=True):
      alone = rows.second is None or not rows.second[text]
      yield {'score': None} if alone else answer


def _alone(documents: Documents) -> np.ndarray:
  """Which documents have no second text, or an empty one."""
  if 'pair_tokens' not in documents.names:
    return np.arange(len(documents))
  return np.flatnonzero(documents.lengths('pair_tokens') == 0)


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)
