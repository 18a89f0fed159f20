"""Sentence order prediction: do two consecutive texts stand in their order, or swapped?

Lan et al. 2020, "ALBERT", section 3.1: half of the pairs are in order (label 0), half are swapped
(label 1).
"""

import numpy as np

from llm_jax.data import pairs
from llm_jax.objectives.shared import sentence_pairs


class Objective(sentence_pairs.SentencePairs):
  """Sentence order prediction.

  Documents are cut in chunks of seq_len - 3 tokens, one per row, and each chunk in two at a random
  position: every token is in one row of an epoch. A chunk of one token counts for nothing.

  Args:
    tokenizer: gives the special ids.
    short_seq_rate: how often a chunk is shortened to a random length (0.1 in ALBERT, so that short
      texts are seen too).
  """

  name, paper = 'sop', 'ALBERT'
  terms = {'sop': 1.0}

  def change(
    self,
    first: np.ndarray,
    second: np.ndarray,
    chunks: pairs.Chunks,
    index: int,
    rng: np.random.Generator,
  ) -> tuple[np.ndarray, np.ndarray]:
    """The two texts swapped."""
    return second, first
