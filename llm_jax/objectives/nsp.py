"""Next sentence prediction: does the second text follow the first in its document?

Devlin et al. 2019, "BERT", section 3.1 and appendix A.2: half of the pairs are consecutive text
(label 0), in the other half the second text comes from another document (label 1).
"""

import numpy as np

from llm_jax.core.contracts import Documents, Rows
from llm_jax.data import pairs
from llm_jax.objectives.shared import sentence_pairs


class Objective(sentence_pairs.SentencePairs):
  """Next sentence prediction.

  Documents are cut in chunks of seq_len - 3 tokens, one per row, and each chunk in two at a random
  position: every token is in one row of an epoch, except the second half of the chunks that are
  given another one. A chunk of one token counts for nothing.

  Args:
    tokenizer: gives the special ids.
    short_seq_rate: how often a chunk is shortened to a random length (0.1 in BERT, so that short
      texts are seen too).
  """

  name, paper = 'nsp', 'BERT'
  terms = {'nsp': 1.0}

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """One chunk per row; ValueError where there are not two documents to draw from."""
    filled = int(np.count_nonzero(documents.lengths('tokens')))
    if filled < 2:
      raise ValueError(
        f'objective nsp draws second texts from other documents, and this split has {filled} '
        'document(s) with text; use a corpus of several, a larger share of validation, a smaller '
        'unit of text, or objective sop.'
      )
    return super().rows(documents, seq_len)

  def change(
    self,
    first: np.ndarray,
    second: np.ndarray,
    chunks: pairs.Chunks,
    index: int,
    rng: np.random.Generator,
  ) -> tuple[np.ndarray, np.ndarray]:
    """The second text comes from another document.

    It is as long as the true one wherever the other chunk allows it, so that the length tells
    nothing.
    """
    other = chunks[chunks.other(index, rng)]
    start = rng.integers(max(len(other) - len(second), 0) + 1)
    return first, other[start : start + len(second)]
