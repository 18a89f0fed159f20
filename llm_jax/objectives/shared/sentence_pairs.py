"""What next sentence prediction and sentence order prediction share: documents cut in chunks, each
chunk in two texts, and two classes read from the first token, [CLS].
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Documents, Example, Metrics, Net, Rows, Tokenizer
from llm_jax.data import pairs, prompted
from llm_jax.data.segmenters import WORD_STARTS
from llm_jax.nn import heads


class SentencePairs(contracts.Objective):
  """Two classes of pairs of texts: label 0 is the pair as it stands in the document.

  Subclasses say their `name`, whose `paper` has a short_seq_rate of 0.1, and `change` half of the
  pairs.
  """

  name: str
  paper: str

  def __init__(self, tokenizer: Tokenizer, short_seq_rate: float = 0.0):
    if not 0 <= short_seq_rate <= 1:
      raise ValueError(
        f'objective.short_seq_rate={short_seq_rate} must be from 0 to 1; {self.paper} has 0.1.'
      )
    self.tokenizer, self.short_seq_rate = tokenizer, short_seq_rate

  def change(
    self,
    first: np.ndarray,
    second: np.ndarray,
    chunks: pairs.Chunks,
    index: int,
    rng: np.random.Generator,
  ) -> tuple[np.ndarray, np.ndarray]:
    """The pair of label 1 in place of the two texts of chunk `index`."""
    raise NotImplementedError

  def check(self, model: contracts.Model) -> None:
    """The model must see both sides: the first token is read."""
    if model.causal:
      raise ValueError(
        f'objective {self.name} reads the first token, which in a causal model has seen nothing; '
        'use it with an encoder.'
      )

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """One chunk per row."""
    return _Rows(self, documents, seq_len)

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """Nothing to add: the label comes with the row."""
    if f'{self.name}_label' not in example:
      raise ValueError(
        f'objective {self.name} labels only rows that it lays out itself; in a mix, set '
        f'rows={self.name!r}.'
      )
    return example

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """BERT's pooler, and two classes."""
    return {'pooler': heads.Pooler(model.options), self.name: heads.PairHead(model.options)}

  def positions(self, batch: Batch) -> jax.Array:
    """The first of each row, [B, 1]."""
    return jnp.zeros((len(batch[f'{self.name}_label']), 1), jnp.int32)

  def loss(self, net: Net, hidden_B1D: jax.Array, batch: Batch) -> Metrics:
    """Cross-entropy in nats and accuracy."""
    logits_BC = net.heads[self.name](net.heads['pooler'](hidden_B1D[:, 0]))
    logits_BC = logits_BC.astype(jnp.promote_types(logits_BC.dtype, jnp.float32))
    label_B, weight_B = batch[f'{self.name}_label'], batch[f'{self.name}_weight']
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, label_B)
    right_B = jnp.argmax(logits_BC, -1) == label_B
    weight = jnp.sum(weight_B)
    return {
      self.name: (jnp.sum(nll_B * weight_B), weight),
      f'{self.name}_accuracy': (jnp.sum(right_B * weight_B), weight),
    }


class _Rows:
  def __init__(self, objective: SentencePairs, documents: Documents, seq_len: int):
    self.objective, self.seq_len = objective, seq_len
    beside = WORD_STARTS if WORD_STARTS in documents.names else None  # as masked LM asks for
    tokenizer = objective.tokenizer
    begin, sep = (*prompted.prompt(tokenizer), tokenizer.cls_id), (tokenizer.sep_id,)
    self.frame = pairs.Frame(begin, sep, begin, sep, sep)
    none = (0,) * len(begin)
    self.no_word = pairs.Frame(none, (0,), none, (0,), (0,))
    self.chunks = pairs.Chunks(documents, seq_len - self.frame.double, beside)

  def __len__(self) -> int:
    return len(self.chunks)

  def example(self, index: int, rng: np.random.Generator) -> Example:
    objective = self.objective
    first, second = pairs.split(self.chunks[index], objective.short_seq_rate, rng)
    paired = len(second) > 0
    label = paired and rng.random() < 0.5
    if label:
      first, second = objective.change(first, second, self.chunks, index, rng)
    if self.chunks.beside is None:
      example = pairs.row(first, second, self.seq_len, self.frame)
    else:
      example = pairs.row(first[:, 0], second[:, 0], self.seq_len, self.frame)
      starts = pairs.row(first[:, 1], second[:, 1], self.seq_len, self.no_word)
      example[WORD_STARTS] = starts['tokens']
    example[f'{objective.name}_label'] = np.int32(label)
    example[f'{objective.name}_weight'] = np.float32(paired)
    return example
