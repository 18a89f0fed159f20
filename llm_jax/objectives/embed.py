"""Texts as vectors: the hidden states of each text, pooled. Nothing is learned: this is what
`--mode=embed` asks of a model.

Reimers and Gurevych 2019, "Sentence-BERT", arXiv:1908.10084, section 3: the mean over the places of
a text, or its first place. Several texts share a row, each a segment of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.contracts import Batch, Documents, Pairs, Rows, Tokenizer
from llm_jax.data import pack
from llm_jax.nn import heads


class Objective:
  """Pooled hidden states of each text.

  Args:
    tokenizer: not used; every objective gets one.
    pool: 'mean' of all places of a text, its special tokens among them; 'cls', its first place;
      'last', its last.
    normalize: vectors have length 1, so that inner products are cosines.
  """

  terms: dict[str, float] = {}

  def __init__(self, tokenizer: Tokenizer, pool: str = 'mean', normalize: bool = True):
    del tokenizer
    if pool not in heads.POOLS:
      raise ValueError(f'pool={pool!r} must be one of {", ".join(heads.POOLS)}.')
    self.pool, self.normalize, self.predictor = pool, normalize, self

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """Always an error: there is nothing to learn."""
    raise ValueError(
      'objective embed has no loss and trains nothing; it is what --mode=embed uses. To train, '
      'choose another.'
    )

  transform = rows

  def lay_out(self, texts: Sequence[np.ndarray], seq_len: int, slots: int) -> dict[str, np.ndarray]:
    """The row that holds some texts (ids with their special tokens), at most `slots`."""
    return pack.assemble(list(texts), seq_len) | pack.text_places(
      [len(ids) for ids in texts], slots
    )

  def heads(self, model: Any) -> dict[str, Any]:
    """None; ValueError where the first place of a causal model, which has seen nothing, is asked
    for.
    """
    if model.causal and self.pool == 'cls':
      raise ValueError(
        "pool='cls' reads the first place, which in a causal model has seen nothing; use 'last' or "
        "'mean'."
      )
    return {}

  def places(self, batch: Batch) -> jax.Array | None:
    """What the pooling reads: a place a text, [B, G], or all."""
    return heads.pool_places(batch, self.pool)

  def loss(self, net: Any, hidden_BPD: jax.Array, batch: Batch) -> Pairs:
    """No terms."""
    return {}

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """Nothing."""
    return {}

  def targets(self, batch: Batch) -> None:
    """None: no tokens are predicted."""
    return None

  def predict(self, net: Any, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`vectors`, [B, G, D] at least float32: that of text g of a row, anything where the row has
    fewer.
    """
    del net
    x_BGD = heads.pool(hidden_BPD, batch, self.pool)
    x_BGD = x_BGD.astype(jnp.promote_types(x_BGD.dtype, jnp.float32))
    if self.normalize:
      x_BGD /= jnp.maximum(jnp.linalg.norm(x_BGD, axis=-1, keepdims=True), 1e-12)
    return {'vectors': x_BGD}
