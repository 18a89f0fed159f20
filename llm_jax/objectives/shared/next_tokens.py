"""What objectives have in common that predict tokens from those before them: the loss, what is
counted of it, and rows of which a part is learned.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Example, Metrics, Net
from llm_jax.data import pack
from llm_jax.nn import vocabulary


class Objective(contracts.Objective):
  """Learns `targets` where `weights` are not 0, one token ahead of `tokens`.

  Args:
    name: of the loss, which is its one term.
    label_smoothing, z_loss: as in `vocabulary.cross_entropy`.

  Raises:
    ValueError: a smoothing or a weight out of range.
  """

  def __init__(self, name: str, label_smoothing: float, z_loss: float):
    vocabulary.check_loss(label_smoothing, z_loss)
    self.name = name
    self.smoothed = dict(label_smoothing=label_smoothing, z_loss=z_loss)

  def loss(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> Metrics:
    """Cross-entropy in nats and accuracy per token that is learned."""
    model = net.model
    sums = vocabulary.cross_entropy(
      hidden_BTD,
      model.table(),
      batch['targets'],
      batch['weights'],
      model.table_bias(),
      **self.smoothed,
    )
    return vocabulary.metrics(self.name, sums, jnp.sum(batch['weights']))

  distils = True

  def answer(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> vocabulary.End:
    """What logits of the vocabulary are made of."""
    del batch
    return vocabulary.End(hidden_BTD, net.model.table(), net.model.table_bias())

  def distilled(
    self,
    net: Net,
    hidden_BTD: jax.Array,
    taught: vocabulary.End,
    batch: Batch,
    temperature: float,
  ) -> tuple[jax.Array, jax.Array]:
    """Over the tokens that are learned."""
    ours = self.answer(net, hidden_BTD, batch)
    apart_BT = vocabulary.soft_divergence(ours, taught, temperature)
    return jnp.sum(apart_BT * batch['weights']), jnp.sum(batch['weights'])

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """Perplexity of a token."""
    return {'perplexity': float(np.exp(means[f'{self.name}_nll']))}

  def targets(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The ids that a batch asks for and their weights, each [B, T]."""
    return batch['targets'], batch['weights']

  def flops(self, model: contracts.Model, batch: Batch) -> float:
    """Of the vocabulary, at all positions."""
    return flops(model, batch)


def flops(model: contracts.Model, batch: Batch) -> float:
  """FLOPs of the projection on the vocabulary at all positions of a batch."""
  rows, length = batch['targets'].shape
  return 2.0 * rows * length * model.vocab_size * model.options.dim


def example(
  documents: Sequence[np.ndarray], learned: Sequence[np.ndarray], before: np.ndarray, seq_len: int
) -> Example:
  """A row of documents, each with its own last token as a target alone.

  Args:
    documents: ids of each, two or more.
    learned: for each of its ids 1, or 0 where it is read and not learned.
    before: ids that stand before each and are not learned: virtual tokens.
    seq_len: tokens of the row.
  """
  row = pack.assemble([np.append(before, ids[:-1]) for ids in documents], seq_len)
  inside_T = (row['segments'] > 0) & (row['positions'] >= len(before))
  targets_T, weights_T = np.zeros(seq_len, np.int32), np.zeros(seq_len, np.float32)
  targets_T[inside_T] = np.concatenate([ids[1:] for ids in documents])
  weights_T[inside_T] = np.concatenate([part[1:] for part in learned])
  return row | {'targets': targets_T, 'weights': weights_T}
