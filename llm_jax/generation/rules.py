"""What is done to the scores of the next token before one is chosen: tokens that the row has are
made worse, n-grams that it has are ruled out, its end is put off, its first or last token is given.

In meaning and order these are the logits processors of `transformers`: repetition penalty
(arXiv:1909.05858, section 4.1), no repeated n-grams (arXiv:1705.04304, section 2.5), least new
tokens, forced BOS, forced EOS. Beam search applies them to log-probabilities.

R counts rows; the beams of a prompt are rows of their own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ENDS = 8  # ids that may end a row, at most; a row that has fewer is filled up with NONE
NONE = -1


class Rules(NamedTuple):
  """The rules of each row; positions count from the beginning of the row.

  Attributes:
    penalty_R: of tokens that the row has; 1 for none.
    ngram_R: n-grams of so many tokens come once; 0: as often as they do.
    begun_R: the position of the first new token.
    least_R: before this position no row ends.
    last_R: the position of the last new token.
    first_id_R, last_id_R: the ids at `begun_R` and `last_R`; `NONE`: any.
    ends_RE: the ids that end a row.
  """

  penalty_R: jax.Array
  ngram_R: jax.Array
  begun_R: jax.Array
  least_R: jax.Array
  last_R: jax.Array
  first_id_R: jax.Array
  last_id_R: jax.Array
  ends_RE: jax.Array

  def asked(self, lengths_R: jax.Array) -> jax.Array:
    """Whether any row has a rule for the token at its position `lengths_R`, a scalar."""
    first, last = self._first(lengths_R), self._last(lengths_R)
    some = (self.penalty_R != 1) | (self.ngram_R > 0) | (lengths_R < self.least_R)
    return jnp.any(some | first | last)

  def applied(self, scores_RV: jax.Array, history_RT: jax.Array, lengths_R: jax.Array) -> jax.Array:
    """The scores by these rules; -inf for what may not come.

    Args:
      scores_RV: logits, or log-probabilities.
      history_RT: the tokens of each row, its prompt included; anything from `lengths_R` on.
      lengths_R: how many they are: the position of the token that is chosen.
    """
    scores_RV = if_any(
      self.penalty_R != 1, _penalized, scores_RV, history_RT, lengths_R, self.penalty_R
    )
    scores_RV = if_any(
      self.ngram_R > 0, _without_repeats, scores_RV, history_RT, lengths_R, self.ngram_R
    )
    scores_RV = if_any(
      lengths_R < self.least_R, _put_off, scores_RV, self.ends_RE, lengths_R < self.least_R
    )
    for here_R, ids_R in (
      (self._first(lengths_R), self.first_id_R),
      (self._last(lengths_R), self.last_id_R),
    ):
      scores_RV = if_any(here_R, _forced, scores_RV, here_R, ids_R)
    return scores_RV

  def repeated(self, times: int) -> 'Rules':
    """Each row's rules for so many rows in its place."""
    return Rules(*(jnp.repeat(x, times, axis=0) for x in self))

  def _first(self, lengths_R: jax.Array) -> jax.Array:
    return (self.first_id_R != NONE) & (lengths_R == self.begun_R)

  def _last(self, lengths_R: jax.Array) -> jax.Array:
    return (self.last_id_R != NONE) & (lengths_R == self.last_R)


def ends(eos_ids: Sequence[int]) -> np.ndarray:
  """The ids that end a row, [E] int32.

  Raises:
    ValueError: more than `ENDS`.
  """
  if len(eos_ids) > ENDS:
    raise ValueError(f'{len(eos_ids)} ids that end a text are more than {ENDS}.')
  return np.array([*eos_ids, *[NONE] * (ENDS - len(eos_ids))], np.int32)


def if_any(
  asked_R: jax.Array, function: Callable[..., jax.Array], x_RV: jax.Array, *args: jax.Array
) -> jax.Array:
  """`function(x_RV, *args)` where any row asks for it, else `x_RV`."""
  return jax.lax.cond(jnp.any(asked_R), function, lambda x_RV, *_: x_RV, x_RV, *args)


def _penalized(
  scores_RV: jax.Array, history_RT: jax.Array, lengths_R: jax.Array, penalty_R: jax.Array
) -> jax.Array:
  seen_RV = _marked(scores_RV, history_RT, _real(history_RT, lengths_R))
  penalty_R1 = penalty_R.astype(scores_RV.dtype)[:, None]
  worse_RV = jnp.where(scores_RV < 0, scores_RV * penalty_R1, scores_RV / penalty_R1)
  return jnp.where(seen_RV, worse_RV, scores_RV)


def _without_repeats(
  scores_RV: jax.Array, history_RT: jax.Array, lengths_R: jax.Array, ngram_R: jax.Array
) -> jax.Array:
  """-inf for each token that follows, in the row, on the n - 1 tokens that the row ends with."""
  positions_1T = jnp.arange(history_RT.shape[1])[None]

  def narrowed(back: jax.Array, follows_RT: jax.Array) -> jax.Array:
    """Of positions that follow on the last `back` - 1 tokens those that do on the last `back`."""
    newest_R1 = jnp.take_along_axis(history_RT, jnp.maximum(lengths_R - back, 0)[:, None], axis=1)
    same_RT = jnp.roll(history_RT, back, axis=1) == newest_R1
    same_RT &= positions_1T >= back
    return follows_RT & (same_RT | (back >= ngram_R[:, None]))

  follows_RT = _real(history_RT, lengths_R) & (ngram_R > 0)[:, None]
  follows_RT = jax.lax.fori_loop(1, jnp.max(ngram_R), narrowed, follows_RT)
  return jnp.where(_marked(scores_RV, history_RT, follows_RT), -jnp.inf, scores_RV)


def _put_off(scores_RV: jax.Array, ends_RE: jax.Array, early_R: jax.Array) -> jax.Array:
  marked_RE = (ends_RE != NONE) & early_R[:, None]
  return jnp.where(_marked(scores_RV, ends_RE, marked_RE), -jnp.inf, scores_RV)


def _forced(scores_RV: jax.Array, here_R: jax.Array, ids_R: jax.Array) -> jax.Array:
  """0 for the id that is given, which costs a beam nothing."""
  only_RV = jnp.where(jnp.arange(scores_RV.shape[1])[None] == ids_R[:, None], 0.0, -jnp.inf)
  return jnp.where(here_R[:, None], only_RV.astype(scores_RV.dtype), scores_RV)


def _real(history_RT: jax.Array, lengths_R: jax.Array) -> jax.Array:
  return jnp.arange(history_RT.shape[1])[None] < lengths_R[:, None]


def _marked(scores_RV: jax.Array, ids_RN: jax.Array, which_RN: jax.Array) -> jax.Array:
  """[R, V] bool: the ids of each row that are marked."""
  R, V = scores_RV.shape
  ids_RN = jnp.where(which_RN, ids_RN, V)  # out of range, and dropped
  return jnp.zeros((R, V), bool).at[jnp.arange(R)[:, None], ids_RN].set(True, mode='drop')
