"""A vocabulary of the ids that a corpus needs: texts of it are answered as before, by a smaller
table.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax.compress import _shapes
from llm_jax.core import contracts
from llm_jax.core.contracts import Seen, Smaller
from llm_jax.core.params import Info


class Compression(contracts.Compression):
  """Rows of the token table that no training text reads are left out, with the tokens
  themselves; single characters and bytes stay, so that other texts are still spelled.

  Attributes:
    least: how often an id must stand in the texts to stay.
  """

  looks_at = (contracts.IDS,)

  def __init__(self, least: int = 1):
    if least < 1:
      raise ValueError(f'config.compress.least={least} must be at least 1.')
    self.least = least

  def check(self, infos: Mapping[str, Info], shapes: Mapping[str, Any]) -> None:
    """See the contract."""
    if not any('vocab' in info.names for info in infos.values()):
      raise ValueError('config.compress.name=vocabulary: the model has no table of a vocabulary.')

  def shrink(self, model: Smaller, seen: Seen) -> None:
    """See the contract."""
    tokenizer = model.tokenizer
    if not hasattr(tokenizer, 'pruned'):
      raise ValueError(
        f'config.compress.name=vocabulary: {type(tokenizer).__module__} has no tokens to leave out.'
      )
    used = np.flatnonzero(seen.counts >= self.least).tolist()
    model.tokenizer, kept = tokenizer.pruned(used)
    if len(kept) == tokenizer.vocab_size:
      raise ValueError(f'config.compress.name=vocabulary: the texts need all {len(kept):,} ids.')
    model.params = _shapes.ids_taken(model.params, model.infos, np.array(kept))
    model.options['vocab_size'] = len(kept)
