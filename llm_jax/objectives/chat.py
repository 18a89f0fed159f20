"""Conversations and instructions: a decoder learns what the assistant says, from all that was said
before; prompts and answers of any kind are conversations of one turn (Ouyang et al. 2022,
arXiv:2203.02155, section 3.5).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

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
  Rows,
  Tokenizer,
)
from llm_jax.data import chat_template, conversations, pack, prompted
from llm_jax.nn import vocabulary

LONG = ('error', 'cut', 'drop')
PACKINGS = ('best_fit', 'none')


class Objective(contracts.Objective):
  """Each token that the assistant says, with the one that ends its turn, is predicted from those
  before it; what others say is read and not learned.

  A record is a conversation in one of the forms of `data.conversations`. Conversations that share a
  row see nothing of each other.

  Args:
    tokenizer: makes the ids.
    template: how a conversation becomes text: 'plain', 'chatml', 'bare' (a question, its answer and
      nothing else), a file, or a Jinja template itself; None: that of the folder of `init_from`, or
      'plain'.
    packing: 'best_fit' puts several conversations in a row; 'none': one.
    long: what a conversation that is longer than a row is: an 'error', 'cut' after its last turn of
      the assistant that fits, or left out ('drop'); the latter two are counted in the log.
    label_smoothing, z_loss: as in `vocabulary.cross_entropy`.

  Raises:
    ValueError: an option that is not possible, a template that fails.
  """

  terms = {'chat': 1.0}
  text_fields = ('text', 'target')
  writes = True
  shows_learned = True

  def __init__(
    self,
    tokenizer: Tokenizer,
    template: str | None = None,
    packing: str = 'best_fit',
    long: str = 'error',
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
  ):
    for name, value, known in (('packing', packing, PACKINGS), ('long', long, LONG)):
      if value not in known:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(known)}.')
    vocabulary.check_loss(label_smoothing, z_loss)
    self.tokenizer, self.packing, self.long = tokenizer, packing, long
    self.template = chat_template.of(chat_template.text(template), tokenizer)
    self.ends = (self.template.end,)
    self.smoothed = dict(label_smoothing=label_smoothing, z_loss=z_loss)

  @classmethod
  def encoding(cls, options: Mapping[str, Any]) -> Callable[[Record, Tokenizer], Encoded]:
    """`encode` with the template."""
    return functools.partial(encode, template=chat_template.text(options.get('template')))

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Questions and answers."""
    del options
    return [{'text': 'some words', 'target': 'words'}] * 4

  @staticmethod
  def asked(record: Record) -> tuple[str, str]:
    """What the assistant says last, and what was said before it."""
    found = conversations.messages(record)
    before = conversations.prompt(found)
    return before[-1]['content'], found[len(before)]['content']

  def check(self, model: contracts.Model) -> None:
    """The model must be causal."""
    if not model.causal or model.reads_source():
      raise ValueError(
        'objective chat needs a decoder; an encoder-decoder learns pairs of texts by objective '
        'seq2seq.'
      )

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """Rows of whole conversations, or of those of their turns that fit.

    Raises:
      ValueError: one that is longer than a row, where that is an error, naming it.
    """
    return _Rows(self, documents, seq_len)

  def loss(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> Metrics:
    """Cross-entropy in nats and accuracy per token that is learned."""
    sums = vocabulary.cross_entropy(
      hidden_BTD, net.model.table(), batch['targets'], batch['weights'], **self.smoothed
    )
    return vocabulary.metrics('chat', sums, jnp.sum(batch['weights']))

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """Perplexity of a token."""
    return {'perplexity': float(np.exp(means['chat_nll']))}

  def targets(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The ids that a batch asks for and their weights, each [B, T]."""
    return batch['targets'], batch['weights']

  def flops(self, model: contracts.Model, batch: Batch) -> float:
    """Of the vocabulary, at all positions."""
    rows, length = batch['targets'].shape
    return 2.0 * rows * length * model.vocab_size * model.options.dim


def encode(record: Record, tokenizer: Tokenizer, template: str) -> Encoded:
  """`tokens` of a conversation, `learned`, 1 for those of the assistant, and `ends`: after how many
  tokens each of its turns is over.
  """
  found = conversations.messages(record)
  if not any(message['role'] == 'assistant' for message in found):
    raise ValueError('a conversation in which the assistant says nothing has nothing to learn.')
  encoded = chat_template.of(template, tokenizer).encode(found)
  return {'tokens': encoded.tokens_T, 'learned': encoded.learned_T, 'ends': encoded.ends_N}


class _Rows:
  def __init__(self, objective: Objective, documents: Documents, seq_len: int):
    self.documents, self.seq_len, self.cut = documents, seq_len, 0
    self.prompt_ids = np.array(prompted.prompt(objective.tokenizer), np.int32)
    self.whole = documents.lengths('tokens')
    # The last token of a conversation is a target alone.
    self.stops = self._stops(objective, seq_len + 1 - len(self.prompt_ids))
    self.kept = np.flatnonzero(self.stops)
    sizes = self.stops[self.kept] - 1 + len(self.prompt_ids)
    most = 1 if objective.packing == 'none' else None
    self.plan = pack.best_fit(sizes, seq_len, most=most)

  def __len__(self) -> int:
    return len(self.plan)

  def texts(self, index: int) -> list[int]:
    """The conversations of a row."""
    return [int(self.kept[number]) for number, _, _ in self.plan[index]]

  def prompt(self, text: int) -> list[int] | None:
    """What stands before the last turn of the assistant; None where that was cut off."""
    ends, learned = (self.documents.array(name, text) for name in ('ends', 'learned'))
    if self.stops[text] < ends[-1]:
      return None
    first = np.flatnonzero(np.diff(learned, prepend=0) == 1)[-1]
    tokens = self.documents.array('tokens', text, 0, int(first))
    return [*self.prompt_ids.tolist(), *tokens.tolist()]

  def example(self, index: int, rng: np.random.Generator) -> Example:
    numbers, before = self.texts(index), len(self.prompt_ids)
    parts = {
      name: [self.documents.array(name, n, 0, int(self.stops[n])) for n in numbers]
      for name in ('tokens', 'learned')
    }
    example = pack.assemble(
      [np.append(self.prompt_ids, ids[:-1]) for ids in parts['tokens']], self.seq_len
    )
    inside_T = (example['segments'] > 0) & (example['positions'] >= before)
    targets_T = np.zeros(self.seq_len, np.int32)
    weights_T = np.zeros(self.seq_len, np.float32)
    targets_T[inside_T] = np.concatenate([ids[1:] for ids in parts['tokens']])
    weights_T[inside_T] = np.concatenate([learned[1:] for learned in parts['learned']])
    return example | {'targets': targets_T, 'weights': weights_T}

  def _stops(self, objective: Objective, most: int) -> np.ndarray:
    """Of each conversation how many tokens are read, the last of them as a target; 0 for none."""
    stops, over = self.whole.copy(), np.flatnonzero(self.whole > most)
    if not len(over):
      return stops
    if objective.long == 'error':
      raise ValueError(
        f'{self.documents.where(int(over[0]))}: the conversation has {int(self.whole[over[0]])} '
        f'tokens, a row takes {most}; {len(over)} of {len(stops)} are too long. Raise '
        'config.seq_len, or set config.objective.long=cut or drop.'
      )
    stops[over] = 0
    if objective.long == 'cut':
      for number in over.tolist():
        ends = self.documents.array('ends', number)
        stops[number] = max([0, *ends[ends <= most].tolist()])
    self.cut = int(np.sum(stops[over] > 0))
    logging.warning(
      'chat: %d of %d conversations are longer than a row: %d lose their last turns, %d are left '
      'out.',
      len(over),
      len(stops),
      self.cut,
      len(over) - self.cut,
    )
    return stops
