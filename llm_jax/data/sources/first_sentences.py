"""Texts and summaries of them on every machine: docstrings of the Python standard library without
their first sentence, and this sentence.
"""

from typing import Any

from llm_jax.data.sources import summaries


class Source:
  """What follows the first sentence of a docstring as `text`, and the sentence as `target`, both of
  40 characters or more and cut at 400.
  """

  def __init__(self):
    self.pairs = summaries.Source()
    self.fingerprint = f'{self.pairs.fingerprint}-target'

  def __len__(self) -> int:
    return len(self.pairs)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self.pairs[index]
    return {'text': record['pair'], 'target': record['text']}
