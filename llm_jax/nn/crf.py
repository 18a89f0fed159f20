"""A linear-chain conditional random field over the words of packed rows.

Lafferty, McCallum and Pereira 2001; Huang et al. 2015, arXiv:1508.01991, section 2.4. The score of
the tags y of a text is first[y_1] + sum_t next[y_t-1, y_t] + last[y_n] + sum_t logits[t, y_t]; its
probability is exp(score) over the sum of that of all sequences of tags.

A row has several texts, and positions without a word (special tokens, the rest of a word, padding).
`chain` says with `WORD`, `FIRST`, `GAP` and `LAST` how its positions hang together: a chain goes
from word to word, over the positions between them, and none goes from text to text.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import params as params_lib
from llm_jax.nn.options import DTYPES, Options

WORD, FIRST, GAP, LAST = 1, 2, 4, 8
"""Bits of `chain` at a position: it is a word's; the first of its text; words of the text that have
no position stand before it; no word of the text stands after it, with a position or without.
"""
FORBIDDEN = -1e9  # finite, so that no gradient is NaN; exp of it is 0


class Moves(NamedTuple):
  """Scores of moves from tag to tag, [from, to] where there are two.

  Attributes:
    first_C: of the tag that a text begins with.
    late_C: likewise where its first words have no position.
    next_CC: from a word to the next.
    gap_CC: likewise where words without a position stand between them.
    last_C: of the tag that a text ends with.
    cut_C: likewise where its last words have no position.
  """

  first_C: jax.Array
  late_C: jax.Array
  next_CC: jax.Array
  gap_CC: jax.Array
  last_C: jax.Array
  cut_C: jax.Array


class Transitions(nn.Module):
  """The learned scores of moves; they start at 0 and are not decayed.

  Attributes:
    options: shared options.
    tags: C.
  """

  options: Options
  tags: int

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """first_C, next_CC and last_C, at least float32."""
    return self._scores('first', 1), self._scores('next', 2), self._scores('last', 1)

  def _scores(self, name: str, axes: int) -> jax.Array:
    init = params_lib.boxed(jax.nn.initializers.zeros, (None,) * axes)
    param_dtype = DTYPES[self.options.param_dtype]
    scores = self.param(name, init, (self.tags,) * axes, param_dtype)
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def log_partition(logits_BTC: jax.Array, chain_BT: jax.Array, moves: Moves) -> jax.Array:
  """log of the summed exp(score) of all sequences of tags, [B], the sum over the texts of a row."""
  return _total(jax.nn.logsumexp, logits_BTC, chain_BT, moves)


def best_score(logits_BTC: jax.Array, chain_BT: jax.Array, moves: Moves) -> jax.Array:
  """The score of the best sequence of tags, [B], the sum over the texts of a row."""
  return _total(jnp.max, logits_BTC, chain_BT, moves)


def marginals(logits_BTC: jax.Array, chain_BT: jax.Array, moves: Moves) -> jax.Array:
  """The probability of each tag at each word, [B, T, C], 0 where there is none: the gradient of the
  log partition.
  """
  return jax.grad(lambda x: jnp.sum(log_partition(x, chain_BT, moves)))(logits_BTC)


def score(
  logits_BTC: jax.Array, tags_BT: jax.Array, chain_BT: jax.Array, moves: Moves
) -> jax.Array:
  """The score of given tags, [B], the sum over the texts of a row."""
  word_BT, first_BT, gap_BT, last_BT = _bits(chain_BT)
  index_T = jnp.arange(tags_BT.shape[1])
  newest_BT = jax.lax.cummax(jnp.where(word_BT, index_T, -1), axis=1)
  before_BT = jnp.pad(newest_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  at = lambda x_BT, index_BT: jnp.take_along_axis(x_BT, jnp.maximum(index_BT, 0), axis=1)
  emitted_BT = jnp.take_along_axis(logits_BTC, tags_BT[..., None], axis=2)[..., 0]
  from_BT = at(tags_BT, before_BT)
  begun_BT = jnp.where(gap_BT, moves.late_C[tags_BT], moves.first_C[tags_BT])
  moved_BT = jnp.where(gap_BT, moves.gap_CC[from_BT, tags_BT], moves.next_CC[from_BT, tags_BT])
  ended_BT = jnp.where(last_BT, moves.last_C[tags_BT], moves.cut_C[tags_BT])
  # A text is over where the next one begins, and at the end of the row.
  over_BT = jnp.where(first_BT & (before_BT >= 0), at(ended_BT, before_BT), 0)
  each_BT = emitted_BT + jnp.where(first_BT, begun_BT, moved_BT) + over_BT
  final_B = jnp.where(newest_BT[:, -1] >= 0, at(ended_BT, newest_BT[:, -1:])[:, 0], 0)
  return jnp.sum(jnp.where(word_BT, each_BT, 0), axis=1) + final_B


def viterbi(logits_BTC: jax.Array, chain_BT: jax.Array, moves: Moves) -> jax.Array:
  """The best tags of each text (Viterbi 1967), [B, T] int32; 0 where there is no word."""
  rows, _, tags = logits_BTC.shape
  stay_BC = jnp.broadcast_to(jnp.arange(tags), (rows, tags))

  def forward(carry, position):
    alpha_BC, final_BC = carry
    logits_BC, chain_B = position
    word_B, first_B, _, _ = (bit[:, None] for bit in _bits(chain_B))
    scores_BCC = alpha_BC[:, :, None] + _step(chain_B, moves)
    new_BC, new_final_BC = _entered(jnp.max, alpha_BC, logits_BC, chain_B, moves)
    back_BC = jnp.where(
      first_B, jnp.argmax(final_BC, axis=1)[:, None], jnp.argmax(scores_BCC, axis=1)
    )
    kept = jnp.where(word_B, new_BC, alpha_BC), jnp.where(word_B, new_final_BC, final_BC)
    return kept, jnp.where(word_B, back_BC, stay_BC)

  def backward(tag_B, back_BC):
    return jnp.take_along_axis(back_BC, tag_B[:, None], axis=1)[:, 0], tag_B

  empty_BC = jnp.zeros_like(logits_BTC[:, 0])
  carry = empty_BC, empty_BC
  (_, final_BC), back_TBC = jax.lax.scan(forward, carry, _by_position(logits_BTC, chain_BT))
  _, tags_TB = jax.lax.scan(backward, jnp.argmax(final_BC, axis=1), back_TBC, reverse=True)
  return jnp.where(_bits(chain_BT)[0], tags_TB.T, 0).astype(jnp.int32)


def _total(
  reduce: Callable[..., jax.Array], logits_BTC: jax.Array, chain_BT: jax.Array, moves: Moves
) -> jax.Array:
  """The forward algorithm with `reduce` for what sums up, or chooses among, sequences."""

  def forward(carry, position):
    alpha_BC, total_B, ended_B = carry
    logits_BC, chain_B = position
    word_B, first_B, _, _ = _bits(chain_B)
    new_BC, final_BC = _entered(reduce, alpha_BC, logits_BC, chain_B, moves)
    total_B = jnp.where(first_B, total_B + ended_B, total_B)
    ended_B = jnp.where(word_B, reduce(final_BC, axis=1), ended_B)
    return (jnp.where(word_B[:, None], new_BC, alpha_BC), total_B, ended_B), None

  empty_BC = jnp.zeros_like(logits_BTC[:, 0])
  # Each text starts anew from its own scores, so that what stands before it changes no bit of it.
  carry = empty_BC, empty_BC[:, 0], empty_BC[:, 0]
  (_, total_B, ended_B), _ = jax.lax.scan(forward, carry, _by_position(logits_BTC, chain_BT))
  return total_B + ended_B


def _entered(
  reduce: Callable[..., jax.Array],
  alpha_BC: jax.Array,
  logits_BC: jax.Array,
  chain_B: jax.Array,
  moves: Moves,
) -> tuple[jax.Array, jax.Array]:
  """alpha_BC at a word, and with the score of ending there."""
  _, first_B, gap_B, last_B = (bit[:, None] for bit in _bits(chain_B))
  moved_BC = reduce(alpha_BC[:, :, None] + _step(chain_B, moves), axis=1)
  begun_BC = jnp.where(gap_B, moves.late_C[None], moves.first_C[None])
  new_BC = logits_BC + jnp.where(first_B, begun_BC, moved_BC)
  return new_BC, new_BC + jnp.where(last_B, moves.last_C[None], moves.cut_C[None])


def _step(chain_B: jax.Array, moves: Moves) -> jax.Array:
  """[B, C, C], the scores of moves to a word from the one before."""
  gap_B = _bits(chain_B)[2]
  return jnp.where(gap_B[:, None, None], moves.gap_CC[None], moves.next_CC[None])


def _bits(chain: jax.Array) -> tuple[jax.Array, ...]:
  """Whether each of `WORD`, `FIRST`, `GAP`, `LAST` is set."""
  return tuple(chain & bit > 0 for bit in (WORD, FIRST, GAP, LAST))


def _by_position(logits_BTC: jax.Array, chain_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.swapaxes(logits_BTC, 0, 1), chain_BT.T
