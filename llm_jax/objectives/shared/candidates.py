"""Texts that several candidates belong to, and a score for each candidate: what `choice` and
`rerank` share.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Documents, Encoded, Example, Net, Record, Tokenizer
from llm_jax.data import pairs
from llm_jax.nn import heads
from llm_jax.objectives.shared.groups import GroupRows

PACKINGS = ('best_fit', 'none')


class Candidates(contracts.Objective, contracts.Predictor):
  """A score for each candidate of a text, read from the pair of both.

  Subclasses have a `name`, the name of the `head` that gives the scores, `numbers`, what a document
  wants of its candidates, and the loss.

  A batch has, beside tokens, `group` and `member` [B, G] int32 (`shared.groups`), `label` [B, G]
  float32 and `label_weight` [B, G] float32, 1 where a candidate's number is known.
  """

  name: str
  head: str

  def __init__(
    self, tokenizer: Tokenizer, dropout: float, pool: str, transform: str | None, packing: str
  ):
    transform = transform or ('pooler' if pool == 'cls' else 'none')
    for option, value, known in (
      ('pool', pool, heads.POOLS),
      ('transform', transform, (*heads.TRANSFORMS, 'none')),
      ('packing', packing, PACKINGS),
    ):
      if value not in known:
        raise ValueError(f'objective.{option}={value!r} must be one of {", ".join(known)}.')
    if not 0 <= dropout < 1:
      raise ValueError(f'objective.dropout={dropout} must be at least 0 and below 1.')
    self.dropout, self.pool, self.transform_name, self.packing = dropout, pool, transform, packing
    self.frame = pairs.frame(tokenizer, causal=pool == 'last')
    self.predictor = self

  def numbers(self, documents: Documents, index: int) -> Sequence[float] | None:
    """What a document wants of each of its candidates; None where it does not say.

    Raises:
      ValueError: what is wrong with it.
    """
    raise NotImplementedError

  def check(self, model: contracts.Model) -> None:
    """A causal model has no pool 'cls'."""
    if model.causal and self.pool == 'cls':
      raise ValueError(
        "objective.pool='cls' reads the first token, which in a causal model has seen nothing; use "
        "'last' or 'mean'."
      )

  def rows(self, documents: Documents, seq_len: int) -> 'CandidateRows':
    """The documents in as few rows as they need, all candidates of one in the same.

    Raises:
      ValueError: a document without candidates, with more than a row takes, or without numbers
        that fit.
    """
    numbers = []
    for index in range(len(documents)):
      try:
        numbers.append(self.numbers(documents, index))
      except ValueError as error:
        raise ValueError(f'{documents.where(index)}: {error}') from None
    rows = CandidateRows(self, documents, seq_len, numbers)
    rows.log()
    return rows

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """Nothing to add: the numbers come with the row."""
    if 'member' not in example:
      raise ValueError(
        f'objective {self.name} scores only candidates of rows that it lays out itself; in a mix, '
        f"set rows='{self.name}'."
      )
    return example

  def layout(self, documents: Documents, seq_len: int) -> 'CandidateRows':
    """The rows of documents to predict: no number is looked at, all weights are 0."""
    return CandidateRows(self, documents, seq_len, [None] * len(documents))

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """A linear layer with one output, and what stands before it."""
    found: dict[str, Any] = {}
    if self.transform_name != 'none':
      name, module = heads.TRANSFORMS[self.transform_name]
      found[name] = module(model.options)
    bias = self.pool != 'last'
    return found | {self.head: heads.ClassifierHead(model.options, 1, self.dropout, bias)}

  def no_gradient(self, path: str) -> str | None:
    """What adds the same to all candidates of a text changes no choice among them."""
    own = path == f'heads_{self.head}/dense/bias'
    return 'it adds the same to every score' if own else None

  def positions(self, batch: Batch) -> jax.Array | None:
    """What the pooling reads: one index per text, [B, G], or all."""
    return heads.pool_positions(batch, self.pool)

  def scores(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """[B, G], at least float32; anything finite where a row has no candidate g."""
    x_BGD = heads.pool(hidden_BPD, batch, self.pool)
    if self.transform_name != 'none':
      x_BGD = net.heads[heads.TRANSFORMS[self.transform_name][0]](x_BGD)
    score_BG = net.heads[self.head](x_BGD)[..., 0]
    return score_BG.astype(jnp.promote_types(score_BG.dtype, jnp.float32))

  def predict(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`scores` [B, G]."""
    return {'scores': self.scores(net, hidden_BPD, batch)}

  def describe(self, text: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The score of one candidate."""
    return {'score': float(text['scores'])}


class CandidateRows(GroupRows):
  """Rows of texts with their candidates.

  Args:
    objective: whose rows they are.
    documents: the texts and their candidates.
    seq_len: T.
    numbers: per document what `Candidates.numbers` gives.
  """

  def __init__(
    self,
    objective: Candidates,
    documents: Documents,
    seq_len: int,
    numbers: Sequence[Sequence[float] | None],
  ):
    self.objective, self.numbers = objective, numbers
    sizes = [documents.array('candidate_sizes', index) for index in range(len(documents))]
    counts = np.array([len(each) for each in sizes], np.int64)
    super().__init__(
      documents,
      seq_len,
      objective.frame,
      objective.name,
      counts,
      first=np.repeat(documents.lengths('tokens'), counts),
      second=np.concatenate([np.zeros(0, np.int64), *sizes]),
      alone=objective.packing == 'none',
    )

  def pieces(self, document: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids of the text, with those of each candidate."""
    take = self.documents.array
    text, ends = take('tokens', document), np.cumsum(take('candidate_sizes', document))[:-1]
    return [(text, ids) for ids in np.split(take('candidate_tokens', document), ends)]

  def example(self, index: int, rng: np.random.Generator) -> Example:
    """A row, with the numbers of its candidates."""
    row = super().example(index, rng)
    row['label'], row['label_weight'] = np.zeros((2, self.slots), np.float32)
    wanted = [self.numbers[document] for document in self.groups(index)]
    counts = self.counts[self.groups(index)]
    flat = itertools.chain.from_iterable(
      numbers or [None] * count for numbers, count in zip(wanted, counts, strict=True)
    )
    for slot, number in enumerate(flat):
      if number is not None:
        row['label'][slot], row['label_weight'][slot] = number, 1
    return row


def encode(record: Record, tokenizer: Tokenizer, field: str) -> Encoded:
  """As any objective's, with `candidate_tokens`, the ids of all candidates end to end, and
  `candidate_sizes`, how many each has.

  Args:
    record: lists its candidates in `field`.
    tokenizer: makes the ids.
    field: its name.

  Raises:
    ValueError: no list of texts.
  """
  encoded = contracts.Objective.encode(record, tokenizer)
  texts = record.get(field)
  if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
    raise ValueError(
      f'field {field!r} is {texts!r}; it must be a list of texts (config.data.fields=({field!r},) '
      'names further fields of a source).'
    )
  ids = [tokenizer.encode(text) for text in texts]
  encoded['candidate_tokens'] = np.concatenate(ids)
  encoded['candidate_sizes'] = np.array([len(each) for each in ids], np.int32)
  return encoded


def same_group(batch: Batch) -> jax.Array:
  """[B, G, G]: whether two candidates of a row are of one text."""
  group_BG = batch['group']
  return (group_BG[:, :, None] == group_BG[:, None]) & (group_BG > 0)[:, None]


def log_probabilities(score_BG: jax.Array, batch: Batch) -> jax.Array:
  """[B, G]: of each candidate among those of its text; anything finite where there is none."""
  among_BGG = jnp.where(same_group(batch), score_BG[:, None], -1e30)
  return score_BG - jax.nn.logsumexp(among_BGG, axis=-1)


def softmax(scores: Sequence[float]) -> list[float]:
  """Probabilities, on the host."""
  values = np.exp(np.asarray(scores, np.float64) - max(scores))
  return (values / values.sum()).tolist()
