"""Conversations and instructions: a decoder learns what the assistant says, from all that was said
before; prompts and answers of any kind are conversations of one turn (Ouyang et al. 2022,
arXiv:2203.02155, section 3.5).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from llm_jax.core import contracts
from llm_jax.core.contracts import (
  Documents,
  Encoded,
  Example,
  Record,
  Rows,
  Tokenizer,
)
from llm_jax.data import chat_template, conversations, pack, prompted
from llm_jax.objectives.shared import next_tokens

LONG = ('error', 'cut', 'drop')
PACKINGS = ('best_fit', 'none')


class Objective(next_tokens.Objective):
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
    super().__init__('chat', label_smoothing, z_loss)
    self.tokenizer, self.packing, self.long = tokenizer, packing, long
    self.template = chat_template.of(chat_template.text(template), tokenizer)
    self.ends = (self.template.end,)

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
    tokens, learned = (
      [self.documents.array(name, n, 0, int(self.stops[n])) for n in self.texts(index)]
      for name in ('tokens', 'learned')
    )
    return next_tokens.example(tokens, learned, self.prompt_ids, self.seq_len)

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
