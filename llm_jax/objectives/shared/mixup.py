"""Mixup of texts: each is also a part of another, and so is its label.

Guo et al. 2019, arXiv:1905.08941, section 3, "senMixup": of the vectors z of two texts before the
last layer f, with lambda from Beta(alpha, alpha),

    z = lambda z_i + (1 - lambda) z_j
    loss = lambda loss(f(z), y_i) + (1 - lambda) loss(f(z), y_j)

The last layer is linear, so that f(z) is the same mix of the logits, and logits are what is mixed
here: they are so few that the partner of a text may be any text of the global batch, however the
batch is cut. Who is whose partner, and how much each counts, is drawn with the rows.
"""

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.contracts import Batch, Example
from llm_jax.objectives.shared.label_losses import LabelLoss


def drawn(rng: np.random.Generator, slots: int, alpha: float) -> Example:
  """What a row says of the mixing of its texts: `mix_rank` [G] int32, by which all texts of a batch
  are put in an order, and `mix_share` [G] float32, lambda.
  """
  return {
    'mix_rank': rng.integers(np.iinfo(np.int32).max, size=slots, dtype=np.int32),
    'mix_share': rng.beta(alpha, alpha, slots).astype(np.float32),
  }


def partners(rank_N: jax.Array, real_N: jax.Array) -> jax.Array:
  """[N] int32: the index of each text's partner, the next in the order of the ranks; that of the
  last is the first. Anything where there is no text.

  Args:
    rank_N: an order of all texts of the batch.
    real_N: whether there is a text that counts.
  """
  order_N = jnp.lexsort((rank_N, ~real_N))
  count = jnp.maximum(jnp.sum(real_N), 1)
  following_N = order_N[(1 + jnp.arange(len(order_N))) % count]
  return jnp.zeros_like(order_N).at[order_N].set(following_N)


def loss(
  label_loss: LabelLoss, logits_BGC: jax.Array, batch: Batch, mixes: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The sum of the loss over all texts of a batch, each mixed with its partner, and the weight.

  Args:
    label_loss: of a text.
    logits_BGC: of the texts as they are.
    batch: `label`, `label_weight`, `mix_rank`, `mix_share`.
    mixes: whether texts are mixed; otherwise their losses are those of the texts alone.
  """
  flat = lambda x: jnp.reshape(x, (-1, *x.shape[2:]))
  logits_NC, label, weight_N = map(flat, (logits_BGC, batch['label'], batch['label_weight']))
  share_N = jnp.where(mixes, flat(batch['mix_share']), 1).astype(logits_NC.dtype)
  partner_N = partners(flat(batch['mix_rank']), weight_N > 0)
  mixed = lambda a, b, share: share * a + (1 - share) * b
  mixed_NC = mixed(logits_NC, logits_NC[partner_N], share_N[:, None])
  own, other = label_loss(mixed_NC, label), label_loss(mixed_NC, label[partner_N])
  loss_N, counts_N = (mixed(a, b, share_N) for a, b in zip(own, other, strict=True))
  return jnp.sum(loss_N * weight_N), jnp.sum(counts_N * weight_N)
