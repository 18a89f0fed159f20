"""Two texts in arrays of their own: how near their vectors are is to be a score (arXiv:1908.10084,
section 3, the regression objective).

loss = (cosine(mean of source, mean of target) - score) ** 2
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Documents, Encoded, Example, Metrics, Net, Record
from llm_jax.data import pack

ROW = ('tokens', 'segments', 'positions')


class Objective(contracts.Objective, contracts.Predictor):
  """The `score` of `source` and `target`; one record per row, each text in arrays of T tokens."""

  terms = {'score': 1.0}

  def __init__(self, tokenizer: contracts.Tokenizer):
    del tokenizer  # ids come encoded
    self.predictor = self

  @staticmethod
  def encode(record: Record, tokenizer: contracts.Tokenizer) -> Encoded:
    texts = {'tokens': record['source'], 'target_tokens': record['target']}
    encoded = {name: tokenizer.encode(text) for name, text in texts.items()}
    return encoded | ({'score': record['score']} if 'score' in record else {})

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{'source': 'two', 'target': '2', 'score': 1.0}] * 4

  def rows(self, documents: Documents, seq_len: int) -> '_Rows':
    return _Rows(documents, seq_len)

  def layout(self, documents: Documents, seq_len: int) -> '_Rows':
    return _Rows(documents, seq_len)

  def cosine(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> jax.Array:
    """[B]: of the mean vectors of both texts."""
    target = {name: batch[f'target_{name}'] for name in ROW}
    source_BD = _mean(hidden_BTD, batch['segments'])
    target_BD = _mean(net.forward(target).hidden, target['segments'])
    return jnp.sum(source_BD * target_BD, -1)

  def loss(self, net: Net, hidden_BTD: Any, batch: Batch) -> Metrics:
    error_B = self.cosine(net, hidden_BTD, batch) - batch['score']
    weight_B = batch['score_weight']
    return {'score': (jnp.sum(jnp.square(error_B) * weight_B), jnp.sum(weight_B))}

  def predict(self, net: Net, hidden_BTD: Any, batch: Batch) -> dict[str, jax.Array]:
    return {'cosine': self.cosine(net, hidden_BTD, batch)[:, None]}

  def describe(self, text: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {'score': float(text['cosine'])}


class _Rows:
  def __init__(self, documents: Documents, seq_len: int):
    self.documents, self.seq_len, self.scores = documents, seq_len, documents.values('score')
    longest = np.maximum(documents.lengths('tokens'), documents.lengths('target_tokens'))
    self.cut = int(np.sum(longest > seq_len))

  def __len__(self) -> int:
    return len(self.documents)

  def texts(self, index: int) -> list[int]:
    return [index]

  def example(self, index: int, rng: np.random.Generator) -> Example:
    del rng
    source, target = (
      pack.assemble([self.documents.array(name, index, 0, self.seq_len)], self.seq_len)
      for name in ('tokens', 'target_tokens')
    )
    score = None if self.scores is None else self.scores[index]
    row = source | {f'target_{name}': values for name, values in target.items()}
    row['score'] = np.float32(score or 0)
    row['score_weight'] = np.float32(score is not None)
    return row


def _mean(hidden_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """[B, D]: the direction of the mean over the tokens of each row."""
  sum_BD = jnp.sum(jnp.where(segments_BT[..., None] > 0, hidden_BTD, 0), 1)
  return sum_BD * jax.lax.rsqrt(jnp.sum(jnp.square(sum_BD), -1, keepdims=True) + 1e-9)
