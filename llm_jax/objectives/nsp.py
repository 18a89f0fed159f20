"""Next sentence prediction: does the second text follow the first in its document?

Devlin et al. 2019, "BERT", section 3.1 and appendix A.2: half of the pairs are consecutive text
(label 0), in the other half the second text comes from another document (label 1).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.core.contracts import Batch, Documents, Pairs, Rows, Tokenizer
from llm_jax.data import pairs
from llm_jax.nn import heads


class Objective:
  """Next sentence prediction.

  Documents are cut in chunks of seq_len - 3 tokens, one a row, and each chunk in two at a random
  place: every token is in one row of an epoch, except the second half of the chunks that are given
  another one. A chunk of one token counts for nothing.

  Args:
    tokenizer: gives the special ids.
    short_seq_rate: how often a chunk is shortened to a random length (0.1 in BERT, so that short
      texts are seen too).
  """

  def __init__(self, tokenizer: Tokenizer, short_seq_rate: float = 0.0):
    if not 0 <= short_seq_rate <= 1:
      raise ValueError(
        f'objective.short_seq_rate={short_seq_rate} must be from 0 to 1; BERT has 0.1.'
      )
    self.tokenizer, self.short_seq_rate = tokenizer, short_seq_rate
    self.terms = {'nsp': 1.0}
    self.predictor = None

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """One chunk a row; ValueError where there are not two documents to draw from."""
    filled = int(np.count_nonzero(documents.lengths))
    if filled < 2:
      raise ValueError(
        f'objective nsp draws second texts from other documents, and this split has {filled} '
        'document(s) with '
        'text; use a corpus of several, a larger share of validation, a smaller unit of text, or '
        'objective sop.'
      )
    return _Rows(self, documents, seq_len)

  def transform(
    self, example: dict[str, np.ndarray], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Nothing to add: the label comes with the row."""
    if 'nsp_label' not in example:
      raise ValueError(
        "objective nsp labels only rows that it lays out itself; in a mix, set rows='nsp'."
      )
    return example

  def heads(self, model: Any) -> dict[str, Any]:
    """BERT's pooler, and two classes."""
    return {'pooler': heads.Pooler(model.options), 'nsp': heads.PairHead(model.options)}

  def places(self, batch: Batch) -> jax.Array:
    """The first of each row, [B, 1]."""
    return jnp.zeros((len(batch['nsp_label']), 1), jnp.int32)

  def loss(self, net: Any, hidden_B1D: jax.Array, batch: Batch) -> Pairs:
    """Cross-entropy in nats and accuracy."""
    logits_BC = net.heads['nsp'](net.heads['pooler'](hidden_B1D[:, 0]))
    logits_BC = logits_BC.astype(jnp.promote_types(logits_BC.dtype, jnp.float32))
    label_B, weight_B = batch['nsp_label'], batch['nsp_weight']
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, label_B)
    right_B = jnp.argmax(logits_BC, -1) == label_B
    weight = jnp.sum(weight_B)
    return {
      'nsp': (jnp.sum(nll_B * weight_B), weight),
      'nsp_accuracy': (jnp.sum(right_B * weight_B), weight),
    }

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """Nothing beyond the loss and the accuracy."""
    return {}

  def targets(self, batch: Batch) -> None:
    """None: no tokens are predicted."""
    return None


class _Rows:
  def __init__(self, objective: Objective, documents: Documents, seq_len: int):
    self.objective, self.seq_len = objective, seq_len
    self.chunks = pairs.Chunks(documents, seq_len - 3)

  def __len__(self) -> int:
    return len(self.chunks)

  def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tokenizer = self.objective.tokenizer
    first, second = pairs.split(self.chunks[index], self.objective.short_seq_rate, rng)
    paired, label = len(second) > 0, 0
    if paired and rng.random() < 0.5:
      # As long as the true one wherever the other chunk allows it, so that the length tells
      # nothing.
      label, other = 1, self.chunks[self.chunks.other(index, rng)]
      start = rng.integers(max(len(other) - len(second), 0) + 1)
      second = other[start : start + len(second)]
    example = pairs.row(
      first, second, self.seq_len, tokenizer.cls_id, tokenizer.sep_id, tokenizer.sep_id
    )
    return example | {'nsp_label': np.int32(label), 'nsp_weight': np.float32(paired)}
