"""Texts behind virtual tokens: ids above the vocabulary, whose vectors an adapter learns."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.core.contracts import Tokenizer


class Prompted:
  """A tokenizer whose texts stand behind virtual tokens; all else is as the tokenizer has it.

  Args:
    tokenizer: any tokenizer.
    first: the lowest of the virtual tokens, at least `tokenizer.vocab_size`: the rows of the
      model's table.
    count: how many there are.

  Attributes:
    prompt: their ids.
  """

  def __init__(self, tokenizer: Tokenizer, first: int, count: int):
    self._tokenizer, self.prompt = tokenizer, tuple(range(first, first + count))
    more = first + count - len(tokenizer.special)
    self.special = np.append(tokenizer.special, np.ones(more, bool))
    self.word_start = np.append(tokenizer.word_start, np.zeros(more, bool))
    self.token_bytes = np.append(tokenizer.token_bytes, np.zeros(more, np.int32))

  def __getattr__(self, name: str) -> Any:
    if name.startswith('_'):  # before there is a tokenizer to ask
      raise AttributeError(name)
    return getattr(self._tokenizer, name)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; special and virtual tokens are left out."""
    return self._tokenizer.decode([int(i) for i in ids if i < self.prompt[0]])


def prompt(tokenizer: Tokenizer) -> tuple[int, ...]:
  """The virtual tokens before each text; none where no adapter wants any."""
  return getattr(tokenizer, 'prompt', ())
