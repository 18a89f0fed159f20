"""Reranking: how well each of several passages answers a query, by a model that reads both together
(Nogueira and Cho 2019, arXiv:1901.04085).

All passages of a query stand in one row, several queries share a row; loss and gradient are those
of the same queries with a row each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.core.contracts import Batch, Documents, Encoded, Metrics, Net, Record, Tokenizer
from llm_jax.objectives.shared import candidates
from llm_jax.objectives.shared.candidates import Candidates

LOSSES = ('softmax', 'pairwise', 'binary')


class Objective(Candidates):
  """The order of passages.

  A record has a `text`, the query; `passages`, a list of texts; and `relevance`, a number from 0 on
  for each of them.

  Args:
    tokenizer: makes the ids.
    loss: per query 'softmax', the cross-entropy of the passages' softmax and their relevance, which
      is divided by its sum (Cao et al. 2007, "ListNet"); 'pairwise', the mean of -log sigmoid of
      the difference of scores over pairs of different relevance (Burges et al. 2005, "RankNet");
      'binary', the mean cross-entropy of each passage alone, relevant above 0.
    dropout: rate before the last linear layer.
    pool: 'cls' reads the first token through a pooler, as BERT does; 'mean' the mean of all tokens;
      'last' the last token, for decoders.
    transform: what stands between pool and last layer: 'pooler', BERT's; 'norm', ModernBERT's;
      'none'. None: a pooler where the first token is read.
    packing: 'best_fit' puts several queries with their passages in a row; 'none': one query.
  """

  name, head = 'rerank', 'classifier'
  terms = {'rerank': 1.0}
  text_fields = ('text', 'pair', 'passages')
  evaluators = ('loss', 'ranking')

  def __init__(
    self,
    tokenizer: Tokenizer,
    loss: str = 'softmax',
    dropout: float = 0.1,
    pool: str = 'cls',
    transform: str | None = None,
    packing: str = 'best_fit',
  ):
    if loss not in LOSSES:
      raise ValueError(f'objective.loss={loss!r} must be one of {", ".join(LOSSES)}.')
    super().__init__(tokenizer, dropout, pool, transform, packing)
    self.kind = loss

  @staticmethod
  def encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """As `candidates.encode`, with `relevance` as it is."""
    encoded = candidates.encode(record, tokenizer, 'passages')
    if record.get('relevance') is not None:
      encoded['relevance'] = record['relevance']
    return encoded

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two passages."""
    del options
    return [{'text': 'some', 'passages': ['words', 'more'], 'relevance': [1, 0]}] * 4

  def numbers(self, documents: Documents, index: int) -> Sequence[float]:
    """The relevance of each passage."""
    values = documents.values('relevance')
    given = None if values is None else values[index]
    count = len(documents.array('candidate_sizes', index))
    fine = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < np.inf
    if not isinstance(given, list | tuple) or len(given) != count or not all(map(fine, given)):
      raise ValueError(
        f"field 'relevance' is {given!r}; it must be a list of {count} numbers from 0 on, one for "
        'each passage.'
      )
    return [float(x) for x in given]

  def no_gradient(self, path: str) -> str | None:
    """With 'binary' everything has one."""
    return None if self.kind == 'binary' else super().no_gradient(path)

  def loss(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Metrics:
    """Per query, of those whose passages the loss can tell apart; and how often a most relevant
    passage comes first.
    """
    score_BG, known_BG = self.scores(net, hidden_BPD, batch), batch['label_weight']
    label_BG, same_BGG = batch['label'] * known_BG, candidates.same_group(batch)
    total = lambda x_BG: jnp.sum(jnp.where(same_BGG, x_BG[:, None], 0), axis=-1)
    highest = lambda x_BG: jnp.max(jnp.where(same_BGG, x_BG[:, None], -jnp.inf), axis=-1)
    # Sums over queries are taken where their first passage stands.
    query_BG = known_BG * (batch['member'] == 0)
    if self.kind == 'softmax':
      share_BG = label_BG / jnp.maximum(total(label_BG), 1e-30)
      loss_BG = -total(share_BG * candidates.log_probabilities(score_BG, batch))
      weight_BG = query_BG * (total(label_BG) > 0)
    elif self.kind == 'pairwise':
      above_BGG = same_BGG & (label_BG[:, :, None] > label_BG[:, None])
      pair_BGG = jax.nn.softplus(score_BG[:, None] - score_BG[:, :, None])
      pairs_BG = total(jnp.sum(above_BGG, axis=-1).astype(score_BG.dtype))
      loss_BG = total(jnp.sum(jnp.where(above_BGG, pair_BGG, 0), axis=-1))
      loss_BG, weight_BG = loss_BG / jnp.maximum(pairs_BG, 1), query_BG * (pairs_BG > 0)
    else:
      relevant_BG = (label_BG > 0).astype(score_BG.dtype)
      each_BG = optax.sigmoid_binary_cross_entropy(score_BG, relevant_BG)
      loss_BG = total(each_BG) / jnp.maximum(total(known_BG), 1)
      weight_BG = query_BG
    best_BG = (score_BG >= highest(score_BG)) & (label_BG >= highest(label_BG))
    found_BG = total(best_BG.astype(score_BG.dtype)) > 0
    return {
      'rerank': (jnp.sum(loss_BG * weight_BG), jnp.sum(weight_BG)),
      'rerank_accuracy': (jnp.sum(found_BG * query_BG), jnp.sum(query_BG)),
    }

  def joined(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`scores` of the passages, and `ranking`, their numbers from the best on."""
    scores = [part['score'] for part in parts]
    order = np.argsort(-np.asarray(scores), kind='stable').tolist()
    return {'scores': scores, 'ranking': order}
