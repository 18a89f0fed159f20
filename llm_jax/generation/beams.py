"""Beam search, one token of all running beams at a time.

It is that of `transformers` with early_stopping=False: scores are summed log-probabilities over
length ** length_penalty, and a prompt is done when no running beam, at its present length, would be
better than the worst of its finished ones.

W is the number of beams per prompt, C that of candidates for them, M the most new tokens; rows of
caches and logits are B W, the beams of one prompt next to each other; N of them are returned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.tree import PyTree
from llm_jax.generation import forward
from llm_jax.generation.rules import Rules
from llm_jax.parallel import sharding

LOWEST = -1e9  # a score below all others


class Beams(NamedTuple):
  """W beams of each prompt, best first: their new tokens, how many, and their scores."""

  tokens_BWM: jax.Array
  counts_BW: jax.Array
  scores_BW: jax.Array

  def pick(self, chosen_BC: jax.Array) -> 'Beams':
    """Those of the numbers `chosen_BC`, C of each prompt."""
    return Beams(*(_picked(x, chosen_BC) for x in self))


class Limits(NamedTuple):
  """The numbers of a search, which are the same for all prompts.

  Attributes:
    new_tokens: all beams end after this many.
    length_penalty: as in `sampling.Sampling`.
    eos_ids_E: tokens that end a beam; how many there are is compiled in.
  """

  new_tokens: jax.Array
  length_penalty: jax.Array
  eos_ids_E: jax.Array


class Search(NamedTuple):
  """A search after `made` tokens.

  Attributes:
    cache: of B W rows.
    lengths_R: tokens of each of these rows, but for the newest.
    history_RT: the tokens of each, prompt and newest included.
    rules: of each.
    running: beams that go on.
    finished: the best that have ended; scores are divided by their lengths, and `LOWEST` where
      there are fewer than W.
    open_B: whether a better one may still come.
    made: new tokens so far.
    limits: the numbers of the search.
  """

  cache: PyTree
  lengths_R: jax.Array
  history_RT: jax.Array
  rules: Rules
  running: Beams
  finished: Beams
  open_B: jax.Array
  made: jax.Array
  limits: Limits

  @property
  def newest_R(self) -> jax.Array:
    """The newest token of each running beam."""
    return self.running.tokens_BWM[:, :, self.made - 1].reshape(-1)


class Best(NamedTuple):
  """The best finished beams of each prompt, and whether a better one may still come."""

  tokens_BNM: jax.Array
  counts_BN: jax.Array
  open_B: jax.Array


class _Candidates(NamedTuple):
  """The best continuations of each prompt's beams, best first."""

  scores_BC: jax.Array
  beams_BC: jax.Array  # the number of the beam that each continues
  ids_BC: jax.Array  # by which token


def begin(
  cache: PyTree,
  lengths_B: jax.Array,
  history_BT: jax.Array,
  rules: Rules,
  limits: Limits,
  beams: int,
  room: int,
) -> Search:
  """The state before the first token.

  Args:
    cache: with the prompts in it, B rows.
    lengths_B: tokens of each prompt.
    history_BT: these tokens, T at least with what is to come.
    rules: of each prompt.
    limits: the numbers of the search.
    beams: W.
    room: M, at least `limits.new_tokens`.
  """
  B = len(lengths_B)
  cache, lengths_R, history_RT = jax.tree.map(
    lambda x: jnp.repeat(x, beams, axis=0), (cache, lengths_B, history_BT)
  )
  none = Beams(
    jnp.zeros((B, beams, room), jnp.int32),
    jnp.zeros((B, beams), jnp.int32),
    jnp.full((B, beams), LOWEST),
  )
  # Of beams that are alike only one counts.
  first = none._replace(scores_BW=none.scores_BW.at[:, 0].set(0.0))
  rules, open_B = rules.repeated(beams), jnp.ones(B, bool)
  return Search(cache, lengths_R, history_RT, rules, first, none, open_B, jnp.int32(0), limits)


def advance(search: Search, logits_RV: jax.Array, best: int) -> tuple[Search, Best]:
  """One token more for each running beam, and the best N texts of each prompt so far, whole on each
  device.

  Args:
    search: with the newest token of each beam in its cache.
    logits_RV: after it.
    best: N, at most W.
  """
  limits, made = search.limits, search.made + 1
  found = _candidates(search, logits_RV)
  extended = Beams(
    _picked(search.running.tokens_BWM, found.beams_BC).at[:, :, search.made].set(found.ids_BC),
    jnp.full(found.ids_BC.shape, made),
    found.scores_BC,
  )
  ends_BC = jnp.isin(found.ids_BC, limits.eos_ids_E) | (made >= limits.new_tokens)
  length = made.astype(found.scores_BC.dtype) ** limits.length_penalty

  going_BC = found.scores_BC + LOWEST * ends_BC
  next_BW = jax.lax.top_k(going_BC, search.running.scores_BW.shape[1])[1]
  running = extended._replace(scores_BW=going_BC).pick(next_BW)
  finished = _finished(search, extended, ends_BC, length)
  worst_B = jnp.min(finished.scores_BW, axis=1)  # LOWEST, or less, where not all W have ended
  open_B = search.open_B & (running.scores_BW[:, 0] / length > worst_B)

  beams_BW, ids_BW = (_picked(x, next_BW) for x in (found.beams_BC, found.ids_BC))
  search = search._replace(
    cache=forward.laid_out(forward.reordered(search.cache, lambda x: _picked_rows(x, beams_BW))),
    history_RT=_history(search, beams_BW, ids_BW),
    running=running,
    finished=finished,
    open_B=open_B,
    made=made,
  )
  texts = Best(finished.tokens_BWM[:, :best], finished.counts_BW[:, :best], open_B)
  return search, Best(*(sharding.constrain(x, *[None] * x.ndim) for x in texts))


def _candidates(search: Search, logits_RV: jax.Array) -> _Candidates:
  """As many as leave W that go on, should all others end."""
  (B, W), V = search.running.scores_BW.shape, logits_RV.shape[1]
  scores_RV = jax.lax.cond(
    search.rules.asked(search.lengths_R),
    search.rules.applied,
    lambda scores_RV, *_: scores_RV,
    jax.nn.log_softmax(logits_RV),
    search.history_RT,
    search.lengths_R,
  )
  scores_BWV = scores_RV.reshape(B, W, V) + search.running.scores_BW[:, :, None]
  count = min(W * max(2, 1 + len(search.limits.eos_ids_E)), W * V)
  scores_BC, found_BC = jax.lax.top_k(scores_BWV.reshape(B, W * V), count)
  return _Candidates(scores_BC, found_BC // V, found_BC % V)


def _finished(search: Search, extended: Beams, ends_BC: jax.Array, length: jax.Array) -> Beams:
  """The best W of those that had finished and of the best W candidates that end now."""
  W, C = search.running.scores_BW.shape[1], ends_BC.shape[1]
  ended_BC = ends_BC & (jnp.arange(C) < W)[None] & search.open_B[:, None]
  scores_BC = extended.scores_BW / length + LOWEST * ~ended_BC
  both = jax.tree.map(
    lambda *x: jnp.concatenate(x, axis=1),
    search.finished,
    extended._replace(scores_BW=scores_BC),
  )
  return both.pick(jax.lax.top_k(both.scores_BW, W)[1])


def _history(search: Search, beams_BW: jax.Array, ids_BW: jax.Array) -> jax.Array:
  """The tokens of the next running beams."""
  history_RT = _picked_rows(search.history_RT, beams_BW)
  rows = jnp.arange(len(history_RT))
  return history_RT.at[rows, search.lengths_R].set(ids_BW.reshape(-1), mode='drop')


def _picked(x_BW: jax.Array, chosen_BC: jax.Array) -> jax.Array:
  """Of each prompt's W entries those with the numbers `chosen_BC`."""
  return jax.vmap(lambda x_W, chosen_C: x_W[chosen_C])(x_BW, chosen_BC)


def _picked_rows(x_R: jax.Array, beams_BW: jax.Array) -> jax.Array:
  """The same of what has B W rows."""
  return _picked(x_R.reshape(*beams_BW.shape, *x_R.shape[1:]), beams_BW).reshape(x_R.shape)
