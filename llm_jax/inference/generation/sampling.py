"""How the next token of each row is chosen from its logits.

Logits are processed as `transformers` does it, in its order: repetition penalty (arXiv:1909.05858,
section 4.1), temperature, top-k (arXiv:1805.04833), top-p (arXiv:1904.09751), min-p
(arXiv:2407.01082). The randomness of a token comes from the seed, the number of its row and its
position there, so a row gets what it would get alone.

A compiled program takes these numbers as arrays with one value per row (`Numbers`): rows of one
batch may differ, and another number compiles nothing. What no row asks for is not computed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen.

  Attributes:
    max_new_tokens: a row ends after this many, if it does not before.
    temperature: logits are divided by it; 0 takes the most likely token.
    top_k: only the `top_k` most likely tokens may be drawn; 0 for all.
    top_p: only the most likely tokens that together have a probability of `top_p`; 1 for all.
    min_p: only tokens that are at least `min_p` times as likely as the most likely one; 0 for all.
    repetition_penalty: positive logits of tokens that the row has, prompt included, are divided by
      it, negative ones multiplied.
    beams: rows that are kept for each prompt; 1 for no beam search.
    length_penalty: exponent of the length that the score of a finished beam is divided by; above 0
      favours long texts.
    seed: of all that is drawn.
  """

  max_new_tokens: int = 128
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  beams: int = 1
  length_penalty: float = 1.0
  seed: int = 0

  def __post_init__(self):
    allowed = {
      'max_new_tokens': (self.max_new_tokens >= 1, 'at least 1'),
      'temperature': (
        0 <= self.temperature < math.inf,
        'at least 0, which takes the most likely token',
      ),
      'top_k': (self.top_k >= 0, 'at least 1, or 0 for all tokens'),
      'top_p': (0 < self.top_p <= 1, 'above 0 and at most 1, which is all tokens'),
      'min_p': (0 <= self.min_p <= 1, 'at least 0, which is all tokens, and at most 1'),
      'repetition_penalty': (
        0 < self.repetition_penalty < math.inf,
        'above 0; 1 is no penalty',
      ),
      'beams': (self.beams >= 1, 'at least 1, which is no beam search'),
      'length_penalty': (math.isfinite(self.length_penalty), 'finite'),
      'seed': (0 <= self.seed < 2**32, 'at least 0 and below 2 ** 32'),
    }
    for name, (right, rule) in allowed.items():
      if not right:
        raise ValueError(f'{name}={getattr(self, name)} must be {rule}.')
    self._check_combination()

  def _check_combination(self) -> None:
    """Raises ValueError for numbers that change nothing beside the others."""
    if self.beams > 1 and self.temperature:
      raise ValueError(
        f'beams={self.beams} follows the most likely texts and draws nothing; set temperature=0 '
        f'(it is {self.temperature}), or beams=1.'
      )
    for name, neutral in (('top_k', 0), ('top_p', 1), ('min_p', 0)):
      value = getattr(self, name)
      if value != neutral and not self.temperature:
        raise ValueError(
          f'{name}={value} changes nothing where temperature=0 takes the most likely token; raise '
          f'temperature, or leave out {name}.'
        )
    if self.length_penalty != 1 and self.beams == 1:
      raise ValueError(
        f'length_penalty={self.length_penalty} is for beam search; set beams above 1, or leave it '
        'out.'
      )


GREEDY = Sampling(temperature=0.0)


class Numbers(NamedTuple):
  """The numbers of `Sampling` as a compiled program takes them, [B] each.

  Attributes:
    temperature_B, top_k_B, min_p_B, penalty_B, seed_B: as in `Sampling`.
    tail_B: 1 - top_p, the probability that the least likely tokens may have together; 0 for none.
    row_B: the number of the row, from which its randomness comes.
  """

  temperature_B: jax.Array
  top_k_B: jax.Array
  tail_B: jax.Array
  min_p_B: jax.Array
  penalty_B: jax.Array
  seed_B: jax.Array
  row_B: jax.Array


def numbers(samplings: Sequence[Sampling], rows: Sequence[int]) -> Numbers:
  """The numbers of each row, as NumPy arrays.

  Args:
    samplings: how the tokens of each row are chosen.
    rows: the number of each row, for its randomness.
  """
  real = jax.dtypes.canonicalize_dtype(float)
  most = np.iinfo(np.int32).max  # more than any vocabulary has
  return Numbers(
    temperature_B=np.array([s.temperature for s in samplings], real),
    top_k_B=np.array([min(s.top_k, most) for s in samplings], np.int32),
    tail_B=np.array([1 - s.top_p for s in samplings], real),
    min_p_B=np.array([s.min_p for s in samplings], real),
    penalty_B=np.array([s.repetition_penalty for s in samplings], real),
    seed_B=np.array([s.seed for s in samplings], np.uint32),
    row_B=np.array(rows, np.int32),
  )


def choose(
  logits_BV: jax.Array, seen_BV: jax.Array, lengths_B: jax.Array, numbers: Numbers
) -> jax.Array:
  """The next token of each row, [B] int32.

  Args:
    logits_BV: at least float32.
    seen_BV: which tokens each row has already.
    lengths_B: how many: the position of the token that is chosen.
    numbers: of each row.
  """

  temperature_B, top_k_B, tail_B, min_p_B, penalty_B, *_ = numbers
  draws, penalizes = jnp.any(temperature_B > 0), jnp.any(penalty_B != 1)
  removes = jnp.any((top_k_B > 0) | (tail_B > 0) | (min_p_B > 0))

  def greedy() -> jax.Array:
    return _most_likely(logits_BV)

  def greedy_penalized() -> jax.Array:
    return _most_likely(penalized(logits_BV, seen_BV, penalty_B[:, None]))

  def drawn() -> jax.Array:
    processed_BV = jax.lax.cond(
      penalizes | removes,
      lambda: processed(logits_BV, seen_BV, numbers),
      lambda: _tempered(logits_BV, temperature_B),
    )
    return _drawn(processed_BV, lengths_B, numbers)

  # The branches give ids: to return logits, each would have to copy them.
  branch = jnp.where(draws, 2, jnp.int32(penalizes))
  return jax.lax.switch(branch, (greedy, greedy_penalized, drawn))


def processed(logits_BV: jax.Array, seen_BV: jax.Array, numbers: Numbers) -> jax.Array:
  """The logits as tokens are to be drawn from; -inf for those that may not be.

  Args:
    logits_BV: at least float32.
    seen_BV: which tokens each row has already; only for the repetition penalty.
    numbers: which processors, and how strong; a temperature of 0 counts as 1.
  """
  temperature_B, top_k_B, tail_B, min_p_B, penalty_B, *_ = numbers
  logits_BV = _if_any(penalty_B != 1, penalized, logits_BV, seen_BV, penalty_B[:, None])
  logits_BV = _tempered(logits_BV, temperature_B)
  logits_BV = _if_any((top_k_B > 0) | (tail_B > 0), _sorted_out, logits_BV, top_k_B, tail_B)
  return _if_any(min_p_B > 0, _min_p, logits_BV, min_p_B)


def _drawn(logits_BV: jax.Array, lengths_B: jax.Array, numbers: Numbers) -> jax.Array:
  """A token of each row with the probability that its logits say, by adding Gumbel noise to them
  as `jax.random.categorical` does; rows of temperature 0 get none.
  """
  keys_B = jax.vmap(_key)(numbers.seed_B, numbers.row_B, lengths_B)
  shape, dtype = logits_BV.shape[1:], logits_BV.dtype
  noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, shape, dtype))(keys_B)
  noise_BV = jnp.where(numbers.temperature_B[:, None] > 0, noise_BV, 0)
  return _most_likely(noise_BV + logits_BV)


def _tempered(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
  divisor_B = jnp.where(temperature_B > 0, temperature_B, 1)
  return logits_BV / divisor_B[:, None].astype(logits_BV.dtype)


def penalized(scores_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
  """Scores with those of seen tokens made worse; `penalty` broadcasts against them."""
  penalty = penalty.astype(scores_BV.dtype)
  worse_BV = jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
  return jnp.where(seen_BV, worse_BV, scores_BV)


def _sorted_out(logits_BV: jax.Array, top_k_B: jax.Array, tail_B: jax.Array) -> jax.Array:
  """Top-k, then top-p of what is left."""
  V = logits_BV.shape[-1]
  sorted_BV = _ascending(logits_BV)
  first_B = jnp.where(top_k_B > 0, jnp.maximum(V - top_k_B, 0), 0)
  lowest_B1 = jnp.take_along_axis(sorted_BV, first_B[:, None], axis=1)
  logits_BV, sorted_BV = (
    jnp.where(x_BV < lowest_B1, -jnp.inf, x_BV) for x_BV in (logits_BV, sorted_BV)
  )
  return _if_any(tail_B > 0, _top_p, logits_BV, sorted_BV, tail_B)


def _top_p(logits_BV: jax.Array, sorted_BV: jax.Array, tail_B: jax.Array) -> jax.Array:
  """Without the least likely tokens, as many as have a probability of at most `tail_B` together;
  one is left. Of tokens that are equally likely those of lower ids go first.
  """
  V = logits_BV.shape[-1]
  together_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1)
  asked_B1 = tail_B[:, None] > 0
  out_BV = (together_BV <= tail_B[:, None].astype(sorted_BV.dtype)) & asked_B1
  count_B1 = jnp.minimum(jnp.sum(out_BV, axis=-1, keepdims=True), V - 1)
  lowest_B1 = jnp.take_along_axis(sorted_BV, count_B1, axis=1)
  below_BV, equal_BV = logits_BV < lowest_B1, logits_BV == lowest_B1
  left_B1 = count_B1 - jnp.sum(below_BV, axis=-1, keepdims=True)
  first_BV = equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= left_B1)
  return jnp.where(below_BV | first_BV, -jnp.inf, logits_BV)


def _min_p(logits_BV: jax.Array, min_p_B: jax.Array) -> jax.Array:
  p_BV = jax.nn.softmax(logits_BV)
  least_B1 = min_p_B[:, None].astype(p_BV.dtype) * jnp.max(p_BV, axis=-1, keepdims=True)
  return jnp.where(p_BV < least_B1, -jnp.inf, logits_BV)


def _ascending(x_BV: jax.Array) -> jax.Array:
  """Each row sorted, by integers in the order of its numbers: on a CPU XLA takes five times as long
  to sort floats.
  """
  integers = jnp.int64 if x_BV.dtype == jnp.float64 else jnp.int32

  def ordered(bits: jax.Array) -> jax.Array:
    return jnp.where(bits < 0, bits ^ jnp.iinfo(integers).max, bits)  # its own inverse

  bits_BV = jax.lax.bitcast_convert_type(x_BV, integers)
  return jax.lax.bitcast_convert_type(ordered(jnp.sort(ordered(bits_BV), axis=-1)), x_BV.dtype)


def _if_any(
  asked_B: jax.Array, function: Callable[..., jax.Array], x_BV: jax.Array, *args: jax.Array
) -> jax.Array:
  """`function(x_BV, *args)` where any row asks for it, else `x_BV`."""
  return jax.lax.cond(jnp.any(asked_B), function, lambda x_BV, *_: x_BV, x_BV, *args)


def _most_likely(logits_BV: jax.Array) -> jax.Array:
  """The first of the highest logits of each row, in two reductions: XLA takes twice as long for
  argmax on a CPU.
  """
  V = logits_BV.shape[-1]
  ids_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
  highest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  return jnp.min(jnp.where(logits_BV == highest_B1, ids_BV, V - 1), axis=-1)


def _key(seed: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
