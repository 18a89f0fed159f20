"""Sentence order prediction: do two consecutive texts stand in their order, or swapped?

Lan et al. 2020, "ALBERT", section 3.1: half of the pairs are in order (label 0), half are swapped
(label 1).
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
  """Sentence order prediction.

  Documents are cut in chunks of seq_len - 3 tokens, one a row, and each chunk in two at a random
  place: every token is in one row of an epoch. A chunk of one token counts for nothing.

  Args:
    tokenizer: gives the special ids.
    short_seq_rate: how often a chunk is shortened to a random length (0.1 in ALBERT, so that short
      texts are seen too).
  """

  def __init__(self, tokenizer: Tokenizer, short_seq_rate: float = 0.0):
    if not 0 <= short_seq_rate <= 1:
      raise ValueError(
        f'objective.short_seq_rate={short_seq_rate} must be from 0 to 1; ALBERT has 0.1.'
      )
    self.tokenizer, self.short_seq_rate = tokenizer, short_seq_rate
    self.terms = {'sop': 1.0}
    self.predictor = None

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """One chunk a row."""
    return _Rows(self, documents, seq_len)

  def transform(
    self, example: dict[str, np.ndarray], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Nothing to add: the label comes with the row."""
    if 'sop_label' not in example:
      raise ValueError(
        "objective sop labels only rows that it lays out itself; in a mix, set rows='sop'."
      )
    return example

  def heads(self, model: Any) -> dict[str, Any]:
    """BERT's pooler, and two classes."""
    return {'pooler': heads.Pooler(model.options), 'sop': heads.PairHead(model.options)}

  def places(self, batch: Batch) -> jax.Array:
    """The first of each row, [B, 1]."""
    return jnp.zeros((len(batch['sop_label']), 1), jnp.int32)

  def loss(self, net: Any, hidden_B1D: jax.Array, batch: Batch) -> Pairs:
    """Cross-entropy in nats and accuracy."""
    logits_BC = net.heads['sop'](net.heads['pooler'](hidden_B1D[:, 0]))
    logits_BC = logits_BC.astype(jnp.promote_types(logits_BC.dtype, jnp.float32))
    label_B, weight_B = batch['sop_label'], batch['sop_weight']
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, label_B)
    right_B = jnp.argmax(logits_BC, -1) == label_B
    weight = jnp.sum(weight_B)
    return {
      'sop': (jnp.sum(nll_B * weight_B), weight),
      'sop_accuracy': (jnp.sum(right_B * weight_B), weight),
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
    paired = len(second) > 0
    swapped = paired and rng.random() < 0.5
    if swapped:
      first, second = second, first
    example = pairs.row(
      first, second, self.seq_len, tokenizer.cls_id, tokenizer.sep_id, tokenizer.sep_id
    )
    return example | {'sop_label': np.int32(swapped), 'sop_weight': np.float32(paired)}
