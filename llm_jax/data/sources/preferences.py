"""Preferences on every machine: the first sentence of a docstring of the Python standard library is
a better answer to what follows it than that of another one.
"""

import random
from typing import Any

from llm_jax.data.sources import summaries


class Source:
  """What follows a first sentence as `prompt`, the sentence as `chosen`, another as `rejected`."""

  def __init__(self):
    self.pairs = summaries.Source()
    self.fingerprint = f'{self.pairs.fingerprint}-preferences'

  def __len__(self) -> int:
    return len(self.pairs)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record, draw = self.pairs[index], random.Random(index)
    other = draw.choice([i for i in draw.sample(range(len(self)), 2) if i != index])
    return {
      'prompt': record['pair'],
      'chosen': record['text'],
      'rejected': self.pairs[other]['text'],
    }
