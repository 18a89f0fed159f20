"""Contrastive learning of vectors of texts: texts that belong together get vectors that are alike,
others do not.

Each text is compared with all texts of the whole batch (van den Oord et al. 2018,
arXiv:1807.03748; Henderson et al. 2017, arXiv:1705.00652, "multiple negatives"), whether a step
runs it in one part or in several, on one device or on many. A record with one text alone is
compared with itself under another dropout (Gao et al. 2021, "SimCSE", arXiv:2104.08821, section 3);
one with a pair and negatives is SimCSE's supervised form (section 4).
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from llm_jax.core import contracts
from llm_jax.core.contracts import (
  Batch,
  Documents,
  Encoded,
  Example,
  Metrics,
  Net,
  Record,
  Tokenizer,
)
from llm_jax.data import pairs
from llm_jax.nn import heads
from llm_jax.objectives.shared import labels as labels_lib
from llm_jax.objectives.shared.groups import GroupRows

LOSSES = ('softmax', 'cosine')
PACKINGS = ('best_fit', 'none')
FORBIDDEN = -1e30  # a logit; finite, so that a row of nothing else has a gradient of zero


class Objective(contracts.Objective, contracts.Predictor):
  """Vectors of texts, by what is alike.

  A record has a `text`; `pair`, a text that is like it; `negatives`, a text or a list of texts that
  are not, though they look so; and with the loss 'cosine' a `label`, how alike text and pair are.
  Texts that are equal, and pairs of equal texts, are no negatives of one another.

  A batch has, beside tokens, `group` and `member` [B, G] int32 (`shared.groups`): member 0 is the
  text, 1 its pair, further ones its negatives; `text_key` [B, G, 2] int32, equal for equal texts;
  and with 'cosine' `label` and `label_weight` [B, G] float32, at member 0.

  Args:
    tokenizer: makes the ids.
    loss: 'softmax', the cross-entropy of picking a text's pair among all pairs and negatives of the
      batch by cosine; 'cosine', the squared difference of the cosine and the label (Reimers and
      Gurevych 2019, arXiv:1908.10084, section 3).
    temperature: cosines are divided by it before the softmax.
    symmetric: pairs pick their texts too, and the two losses are averaged.
    dims: the vectors' first so many numbers shall be good vectors too (Kusupati et al. 2022,
      "Matryoshka", arXiv:2205.13147); the loss is the mean over these and the whole. () for none.
    pool: 'mean' of all tokens of a text, 'cls' its first, 'last' its last, for decoders.
    projection: while it learns, vectors go through a linear layer and tanh, which embedding leaves
      out (SimCSE, section 3 and table 7).
    unlabelled: with 'cosine', a pair without a label is an 'error', or counts for nothing
      ('ignore').
    packing: 'best_fit' puts several groups in a row; 'none': one.
  """

  terms = {'contrast': 1.0}
  text_fields = ('text', 'pair', 'negatives')
  compares = True

  def __init__(
    self,
    tokenizer: Tokenizer,
    loss: str = 'softmax',
    temperature: float = 0.05,
    symmetric: bool = False,
    dims: tuple[int, ...] = (),
    pool: str = 'mean',
    projection: bool = False,
    unlabelled: str = 'error',
    packing: str = 'best_fit',
  ):
    for name, value, known in (
      ('loss', loss, LOSSES),
      ('pool', pool, heads.POOLS),
      ('unlabelled', unlabelled, ('error', 'ignore')),
      ('packing', packing, PACKINGS),
    ):
      if value not in known:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(known)}.')
    if not 0 < temperature < float('inf'):
      raise ValueError(f'objective.temperature={temperature} must be a number above 0.')
    if loss == 'cosine' and symmetric:
      raise ValueError("objective.symmetric=True needs loss='softmax': a cosine has no direction.")
    if len(set(dims)) < len(dims) or any(dim < 1 for dim in dims):
      raise ValueError(f'objective.dims={dims} must be different numbers above 0.')
    self.kind, self.temperature, self.symmetric, self.dims = loss, temperature, symmetric, dims
    self.pool = self.embedding_pool = pool
    self.projection, self.unlabelled, self.packing = projection, unlabelled, packing
    self.labels = labels_lib.Labels(None, 'regression', 'contrast')
    self.frame = pairs.frame(tokenizer, causal=pool == 'last', closed=False)
    self.predictor = self
    self.evaluators = ('loss', 'retrieval' if loss == 'softmax' else 'similarity')

  @staticmethod
  def encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """As any objective's; and `negative_tokens`, those of all negatives end to end, with
    `negative_sizes`, how many each has.
    """
    encoded = contracts.Objective.encode(record, tokenizer)
    negatives = record.get('negatives') or []
    negatives = [negatives] if isinstance(negatives, str) else negatives
    if not isinstance(negatives, list) or not all(isinstance(text, str) for text in negatives):
      raise ValueError(f"field 'negatives' is {negatives!r}; it must be a text or a list of texts.")
    if negatives:
      ids = [tokenizer.encode(text) for text in negatives]
      encoded['negative_tokens'] = np.concatenate(ids)
      encoded['negative_sizes'] = np.array([len(text) for text in ids], np.int32)
    return encoded

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs, alike by half."""
    del options
    return [{'text': 'some words', 'pair': 'words', 'label': 0.5}] * 4

  def check(self, model: contracts.Model) -> None:
    """Decoders are read at the last token, encoders are not; vectors are as long as `dims` say."""
    if model.causal != (self.pool == 'last'):
      raise ValueError(
        f'objective.pool={self.pool!r} does not suit this model: '
        + (
          "in a causal model only the last token has seen the whole text; use 'last'."
          if model.causal
          else "an encoder is read by 'mean' or 'cls'."
        )
      )
    if any(dim >= model.options.dim for dim in self.dims):
      raise ValueError(
        f'objective.dims={self.dims} must be below {model.options.dim}, the length of a vector.'
      )

  def rows(self, documents: Documents, seq_len: int) -> '_Rows':
    """The groups in as few rows as they need.

    Raises:
      ValueError: a group that a row does not take, or with 'cosine' a label that is no number or a
        text without a pair, naming the document.
    """
    if self.kind == 'cosine':
      self.labels.check(documents, required=self.unlabelled == 'error')
      if 'pair_tokens' not in documents.names:
        raise ValueError(
          "objective.loss='cosine' compares pairs; config.data.pair names the field of the second "
          'text.'
        )
    rows = _Rows(self, documents, seq_len, learn=True)
    rows.log()
    if not rows.paired:
      logging.info('contrast: texts have no pairs; each is compared with itself, under dropout.')
    return rows

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """Nothing to add: groups come with the row."""
    if 'text_key' not in example:
      raise ValueError(
        'objective contrast compares only texts of rows that it lays out itself; in a mix, set '
        "rows='contrast'."
      )
    return example

  def layout(self, documents: Documents, seq_len: int) -> '_Rows':
    """The rows of texts to compare: no label is looked at, and a text alone stays so."""
    return _Rows(self, documents, seq_len, learn=False)

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """What `projection` says; predicting needs nothing."""
    return {'projection': heads.Pooler(model.options)} if self.projection else {}

  def positions(self, batch: Batch) -> jax.Array | None:
    """What the pooling reads: one index per text, [B, G], or all."""
    return heads.pool_positions(batch, self.pool)

  def loss(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Metrics:
    """Nothing that a row could say alone."""
    del net, hidden_BPD, batch
    return {}

  def represent(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`vectors` [B, G, D], at least float32; anything finite where a row has no text g."""
    x_BGD = heads.pool(hidden_BPD, batch, self.pool)
    if self.projection:
      x_BGD = net.heads['projection'](x_BGD)
    return {'vectors': x_BGD.astype(jnp.promote_types(x_BGD.dtype, jnp.float32))}

  def compare(self, found: Mapping[str, jax.Array], batch: Batch) -> Metrics:
    """The loss over the texts that have a pair in this batch; with 'softmax' also how often the
    pair is the first choice.
    """
    x_BGD = found['vectors']
    sizes = (*self.dims, x_BGD.shape[-1])
    cut = [_normalized(x_BGD[..., :size]) for size in sizes]
    if self.kind == 'cosine':
      weight_BG = batch['label_weight']
      errors = [(_cosines(x) - batch['label']) ** 2 for x in cut]
      return {'contrast': (jnp.sum(_mean(errors) * weight_BG), jnp.sum(weight_BG))}
    texts = _Texts.of(batch)
    weight_N = texts.query_N.astype(x_BGD.dtype)
    chosen = [self._choices(x.reshape(-1, x.shape[-1]), texts) for x in cut]
    losses_N, right_N = zip(*chosen, strict=True)
    weight = jnp.sum(weight_N)
    return {
      'contrast': (jnp.sum(_mean(losses_N) * weight_N), weight),
      'contrast_accuracy': (jnp.sum(right_N[-1] * weight_N), weight),
    }

  def _choices(self, x_ND: jax.Array, texts: '_Texts') -> tuple[jax.Array, jax.Array]:
    """The loss of each text of the batch, and whether it finds its pair; anything where a text is
    no query.
    """
    logits_NN = jnp.einsum('ND,MD->NM', x_ND, x_ND, precision='highest') / self.temperature
    target_NN, other_NN = texts.target_NN, texts.other_NN
    loss_N, right_N = _choice(logits_NN, target_NN, other_NN & texts.candidate_N)
    if self.symmetric:
      back_N, _ = _choice(logits_NN, target_NN.T, other_NN.T & texts.query_N)
      # The loss of a pair is counted where its text stands.
      loss_N = (loss_N + target_NN.astype(back_N.dtype) @ back_N) / 2
    return loss_N, right_N

  def predict(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`vectors` [B, G, D] of length 1, as `--mode=embed` makes them."""
    del net
    x_BGD = heads.pool(hidden_BPD, batch, self.pool)
    return {'vectors': _normalized(x_BGD.astype(jnp.promote_types(x_BGD.dtype, jnp.float32)))}

  def describe(self, text: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The vector of one text."""
    return {'vector': np.asarray(text['vectors'])}

  def joined(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`similarity`, the cosine of a text and its pair, None for a text alone."""
    if len(parts) == 1:
      return {'similarity': None}
    return {'similarity': float(parts[0]['vector'] @ parts[1]['vector'])}


class _Texts(NamedTuple):
  """The N = B G texts of a batch, compared with one another.

  Attributes:
    query_N: texts that look for their pair.
    candidate_N: texts that may be it.
    target_NN: [i, j]: j is the pair of i.
    other_NN: [i, j]: j is not known to be like i.
  """

  query_N: jax.Array
  candidate_N: jax.Array
  target_NN: jax.Array
  other_NN: jax.Array

  @classmethod
  def of(cls, batch: Batch) -> '_Texts':
    """Of arrays of a batch."""
    group_BG, member_BG, key_BGK = batch['group'], batch['member'], batch['text_key']
    rows, slots = group_BG.shape
    anchor_BG = jnp.arange(slots) - member_BG
    at = lambda slot_BG: jnp.take_along_axis(key_BGK, slot_BG[..., None], axis=1)
    following_BG = jnp.minimum(anchor_BG + 1, slots - 1)
    found = key_BGK, at(anchor_BG), at(following_BG)
    key, anchor, pair = (keys.reshape(rows * slots, -1) for keys in found)
    number_N = (jnp.arange(rows)[:, None] * slots + anchor_BG).reshape(-1)
    member_N, real_N = member_BG.reshape(-1), group_BG.reshape(-1) > 0
    same_NN = number_N[:, None] == number_N
    target_NN = same_NN & (member_N == 1) & (member_N == 0)[:, None] & real_N & real_N[:, None]
    pair_of_equal_NN = _equal(key, anchor) & (member_N == 1)
    alike_NN = _equal(pair, key) | _equal(key, key) | pair_of_equal_NN
    return cls(
      query_N=real_N & jnp.any(target_NN, axis=1),
      candidate_N=real_N & (member_N > 0),
      target_NN=target_NN,
      other_NN=~alike_NN,
    )


class _Rows(GroupRows):
  """Rows of texts with what they are like and unlike.

  Args:
    objective: whose rows they are.
    documents: the groups.
    seq_len: T.
    learn: negatives are read, and a text without a pair is one with itself; otherwise it is alone.

  Attributes:
    paired: whether any text has a pair of its own.
  """

  def __init__(self, objective: Objective, documents: Documents, seq_len: int, learn: bool):
    self.objective, self.learn, count = objective, learn, len(documents)
    self.paired = 'pair_tokens' in documents.names
    lengths = documents.lengths('tokens')
    seconds = documents.lengths('pair_tokens') if self.paired else lengths * learn
    self.lone = np.zeros(count, bool) if learn else seconds == 0
    negatives = [np.zeros(0, np.int64)] * count
    if learn and 'negative_sizes' in documents.names:
      negatives = [documents.array('negative_sizes', index) for index in range(count)]
      if not self.paired:
        raise ValueError(
          'objective contrast: records have negatives and no pair; config.data.pair names the '
          'field of the text that is like the first.'
        )
    sizes = [
      np.array([first] if lone else [first, second, *others])
      for first, second, lone, others in zip(lengths, seconds, self.lone, negatives, strict=True)
    ]
    super().__init__(
      documents,
      seq_len,
      objective.frame,
      'contrast',
      counts=np.array([len(each) for each in sizes], np.int64),
      first=np.concatenate([np.zeros(0, np.int64), *sizes]),
      alone=objective.packing == 'none',
    )

  def pieces(self, document: int) -> list[tuple[np.ndarray, None]]:
    """The ids of the text, its pair and its negatives."""
    take = self.documents.array
    found = [take('tokens', document)]
    if not self.lone[document]:
      found.append(take('pair_tokens', document) if self.paired else found[0])
    if self.counts[document] > len(found):
      ends = np.cumsum(take('negative_sizes', document))[:-1]
      found += np.split(take('negative_tokens', document), ends)
    return [(ids, None) for ids in found]

  def label(self, document: int) -> float | None:
    """How alike the texts of a document are, if it says so."""
    labels = self.documents.values('label')
    return None if labels is None or labels[document] is None else float(labels[document])

  def example(self, index: int, rng: np.random.Generator) -> Example:
    """A row, with keys of its texts, and labels."""
    row = super().example(index, rng)
    row['text_key'] = np.zeros((self.slots, 2), np.int32)
    pieces = itertools.chain.from_iterable(map(self.pieces, self.groups(index)))
    for slot, (ids, _) in enumerate(pieces):
      row['text_key'][slot] = _key(ids)
    if self.objective.kind == 'cosine':
      row['label'] = np.zeros(self.slots, np.float32)
      row['label_weight'] = np.zeros(self.slots, np.float32)
      firsts = np.flatnonzero((row['group'] > 0) & (row['member'] == 0))
      for slot, document in zip(firsts, self.groups(index), strict=True):
        label = self.label(document)
        if label is not None:
          row['label'][slot], row['label_weight'][slot] = label, 1
    return row


def _choice(
  logits_NN: jax.Array, target_NN: jax.Array, other_NN: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The cross-entropy of picking the target among itself and the others, and whether it is the
  best; [N] each, anything finite where there is no target.
  """
  allowed_NN = jnp.where(target_NN | other_NN, logits_NN, FORBIDDEN)
  wanted_N = jnp.sum(jnp.where(target_NN, logits_NN, 0), axis=1)
  return jax.nn.logsumexp(allowed_NN, axis=1) - wanted_N, wanted_N >= jnp.max(allowed_NN, axis=1)


def _cosines(x_BGD: jax.Array) -> jax.Array:
  """[B, G]: the cosine of each text with the next one of its row."""
  return jnp.sum(x_BGD * jnp.roll(x_BGD, -1, axis=1), axis=-1)


def _normalized(x: jax.Array) -> jax.Array:
  """Vectors of length 1; one of zeros stays, with a gradient that is finite."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _equal(a_NK: jax.Array, b_NK: jax.Array) -> jax.Array:
  """[i, j]: key i of `a` is key j of `b`."""
  return jnp.all(a_NK[:, None] == b_NK[None], axis=-1)


def _mean(losses: Sequence[jax.Array]) -> jax.Array:
  return sum(losses[1:], losses[0]) / len(losses)


def _key(ids: np.ndarray) -> np.ndarray:
  """[2] int32 that is another for other ids."""
  digest = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=8).digest()
  return np.frombuffer(digest, np.int32)
