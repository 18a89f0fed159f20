"""Tagging: a label for each word of a text, read at the word's first token."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Documents, Encoded, Example, Metrics, Net, Record
from llm_jax.data import pack
from llm_jax.nn import heads


class Objective(contracts.Objective, contracts.Predictor):
  """A tag for each of a record's `words`, as its `tags` say; texts share rows.

  Args:
    tokenizer: makes the ids.
    tags: names of the tags; None for those of the training documents.
  """

  terms = {'tags': 1.0}
  evaluators = ('loss', 'outside.token_accuracy')
  derived = ('tags',)

  def __init__(self, tokenizer: contracts.Tokenizer, tags: tuple[str, ...] | None = None):
    del tokenizer  # ids come encoded
    self.tags, self.predictor = tags, self

  @staticmethod
  def encode(record: Record, tokenizer: contracts.Tokenizer) -> Encoded:
    """[CLS], then the characters of each word and [SEP]; where each word begins; the tags."""
    words = [np.append(tokenizer.encode(word), tokenizer.sep_id) for word in record['words']]
    lengths = np.array([len(ids) for ids in words], np.int64)
    encoded = {
      'tokens': np.concatenate([[tokenizer.cls_id], *words]).astype(np.int32),
      'firsts': 1 + np.cumsum(lengths) - lengths,
    }
    return encoded | ({'tags': list(record['tags'])} if 'tags' in record else {})

  @classmethod
  def derive(cls, options: Mapping[str, Any], documents: Sequence[Documents]) -> dict[str, Any]:
    if options.get('tags'):
      return {}
    found = {tag for split in documents for tags in split.values('tags') for tag in tags}
    return {'tags': tuple(sorted(found))}

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    tags = list(options.get('tags') or ('x', 'y'))
    return [{'words': ['word'] * len(tags), 'tags': tags}] * 4

  def rows(self, documents: Documents, seq_len: int) -> '_Rows':
    tags = documents.values('tags')
    unknown = {tag for each in tags for tag in each}.difference(self.tags)
    if unknown:
      raise ValueError(f'tags {sorted(unknown)} are none of objective.tags={self.tags}.')
    numbers = [[self.tags.index(tag) for tag in each] for each in tags]
    return _Rows(documents, seq_len, numbers)

  def layout(self, documents: Documents, seq_len: int) -> '_Rows':
    return _Rows(documents, seq_len, None)

  def heads(self, model: Any) -> dict[str, Any]:
    return {'tags': heads.ClassifierHead(model.options, len(self.tags), dropout=0.0)}

  def loss(self, net: Net, hidden_BTD: Any, batch: Batch) -> Metrics:
    logits_BTC, weight_BT = net.heads['tags'](hidden_BTD), batch['tag_weight']
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTC, batch['tag'])
    return {'tags': (jnp.sum(loss_BT * weight_BT), jnp.sum(weight_BT))}

  def predict(self, net: Net, hidden_BTD: Any, batch: Batch) -> dict[str, jax.Array]:
    del batch
    return {'probabilities': jax.nn.softmax(net.heads['tags'](hidden_BTD))}

  def answers(
    self, row: Mapping[str, np.ndarray], rows: '_Rows', index: int
  ) -> Iterator[dict[str, Any]]:
    best_T = np.argmax(row['probabilities'], -1)
    for _, indices in rows.words(index):
      yield {'tags': [self.tags[number] for number in best_T[indices]]}


class _Rows:
  """Several texts per row; only what is longer than a row loses its end.

  Args:
    documents: the texts.
    seq_len: T.
    numbers: of the tags of each text; None where they are asked for.
  """

  def __init__(self, documents: Documents, seq_len: int, numbers: Sequence[list[int]] | None):
    self.documents, self.seq_len, self.numbers = documents, seq_len, numbers
    lengths = documents.lengths('tokens')
    self.cut = int(np.sum(lengths > seq_len))
    self.plan = pack.best_fit(np.minimum(lengths, seq_len), seq_len)

  def __len__(self) -> int:
    return len(self.plan)

  def texts(self, index: int) -> list[int]:
    return [document for document, _, _ in self.plan[index]]

  def words(self, index: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each text of a row, and the indices in the row at which its words begin."""
    offset = 0
    for document, _, stop in self.plan[index]:
      firsts = self.documents.array('firsts', document)
      yield document, offset + firsts[firsts < stop]
      offset += stop

  def example(self, index: int, rng: np.random.Generator) -> Example:
    del rng
    pieces = [self.documents.array('tokens', *piece) for piece in self.plan[index]]
    row = pack.assemble(pieces, self.seq_len)
    row['tag'] = np.zeros(self.seq_len, np.int32)
    row['tag_weight'] = np.zeros(self.seq_len, np.float32)
    if self.numbers is not None:
      for document, indices in self.words(index):
        row['tag'][indices] = self.numbers[document][: len(indices)]
        row['tag_weight'][indices] = 1
    return row
