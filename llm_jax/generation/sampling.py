"""How the next token of each row is chosen from its logits.

Logits are processed as `transformers` does it, in its order: the rules of `generation.rules`,
temperature, top-k (arXiv:1805.04833), top-p (arXiv:1904.09751), min-p (arXiv:2407.01082). The
randomness of a token comes from the seed, the number of its row and its position there, so a row
gets what it would get alone.

A compiled program takes these numbers as arrays with one value per row (`Numbers`): rows of one
batch may differ, and another number compiles nothing. What no row asks for is not computed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.generation import rules as rules_lib
from llm_jax.generation.rules import NONE, Rules, if_any


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
    no_repeat_ngram_size: no n-gram of so many tokens comes twice in a row; 0 for no such rule.
    min_new_tokens: no row ends before it has this many.
    forced_bos, forced_eos: ids that the first new token is, and the last one of a row that reaches
      `max_new_tokens`; None for any, or what the model says (`inference.session`).
    beams: rows that are kept for each prompt; 1 for no beam search.
    length_penalty: exponent of the length that the score of a finished beam is divided by; above 0
      favours long texts.
    num_return_sequences: how many texts a prompt gets: the best beams, or as many draws.
    seed: of all that is drawn.
  """

  max_new_tokens: int = 128
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  no_repeat_ngram_size: int = 0
  min_new_tokens: int = 0
  forced_bos: int | None = None
  forced_eos: int | None = None
  beams: int = 1
  length_penalty: float = 1.0
  num_return_sequences: int = 1
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
      'no_repeat_ngram_size': (self.no_repeat_ngram_size >= 0, 'at least 1, or 0 for no such rule'),
      'min_new_tokens': (
        0 <= self.min_new_tokens <= self.max_new_tokens,
        f'at least 0 and at most max_new_tokens={self.max_new_tokens}',
      ),
      'forced_bos': (self.forced_bos is None or self.forced_bos >= 0, 'an id, at least 0'),
      'forced_eos': (self.forced_eos is None or self.forced_eos >= 0, 'an id, at least 0'),
      'num_return_sequences': (self.num_return_sequences >= 1, 'at least 1'),
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
    count = self.num_return_sequences
    if self.beams > 1 and count > self.beams:
      raise ValueError(
        f'num_return_sequences={count} is more than beams={self.beams}, of which the best are '
        'given.'
      )
    if self.beams == 1 and count > 1 and not self.temperature:
      raise ValueError(
        f'num_return_sequences={count} would be one text so many times where temperature=0 takes '
        'the most likely tokens; raise temperature, or set beams.'
      )


GREEDY = Sampling(temperature=0.0)


class Numbers(NamedTuple):
  """The numbers of `Sampling` as a compiled program takes them, [B] each.

  Attributes:
    temperature_B, top_k_B, min_p_B, seed_B: as in `Sampling`.
    tail_B: 1 - top_p, the probability that the least likely tokens may have together; 0 for none.
    row_B: the number of the row, from which its randomness comes.
    rules: what is done to its scores before.
  """

  temperature_B: jax.Array
  top_k_B: jax.Array
  tail_B: jax.Array
  min_p_B: jax.Array
  seed_B: jax.Array
  row_B: jax.Array
  rules: Rules


def numbers(
  samplings: Sequence[Sampling],
  rows: Sequence[int],
  begun: Sequence[int],
  eos_ids: Sequence[int] = (),
) -> Numbers:
  """The numbers of each row, as NumPy arrays.

  Args:
    samplings: how the tokens of each row are chosen.
    rows: the number of each row, for its randomness.
    begun: how many tokens it has before the first new one.
    eos_ids: tokens that end a row.
  """
  real = jax.dtypes.canonicalize_dtype(float)
  most = np.iinfo(np.int32).max  # more than any vocabulary has
  return Numbers(
    temperature_B=np.array([s.temperature for s in samplings], real),
    top_k_B=np.array([min(s.top_k, most) for s in samplings], np.int32),
    tail_B=np.array([1 - s.top_p for s in samplings], real),
    min_p_B=np.array([s.min_p for s in samplings], real),
    seed_B=np.array([s.seed for s in samplings], np.uint32),
    row_B=np.array(rows, np.int32),
    rules=_rules(samplings, begun, eos_ids),
  )


def _rules(samplings: Sequence[Sampling], begun: Sequence[int], eos_ids: Sequence[int]) -> Rules:
  def ids(name: str) -> np.ndarray:
    given = (getattr(sampling, name) for sampling in samplings)
    return np.array([NONE if one is None else one for one in given], np.int32)

  begun_R = np.array(begun, np.int32)
  return Rules(
    penalty_R=np.array(
      [s.repetition_penalty for s in samplings], jax.dtypes.canonicalize_dtype(float)
    ),
    ngram_R=np.array([s.no_repeat_ngram_size for s in samplings], np.int32),
    begun_R=begun_R,
    least_R=begun_R + np.array([s.min_new_tokens for s in samplings], np.int32),
    last_R=begun_R + np.array([s.max_new_tokens - 1 for s in samplings], np.int32),
    first_id_R=ids('forced_bos'),
    last_id_R=ids('forced_eos'),
    ends_RE=np.tile(rules_lib.ends(eos_ids), (len(samplings), 1)),
  )


def choose(
  logits_BV: jax.Array, history_BT: jax.Array, lengths_B: jax.Array, numbers: Numbers
) -> jax.Array:
  """The next token of each row, [B] int32.

  Args:
    logits_BV: at least float32.
    history_BT: the tokens of each row; anything from `lengths_B` on.
    lengths_B: how many: the position of the token that is chosen.
    numbers: of each row.
  """
  draws, asked = jnp.any(numbers.temperature_B > 0), numbers.rules.asked(lengths_B)
  removes = jnp.any((numbers.top_k_B > 0) | (numbers.tail_B > 0) | (numbers.min_p_B > 0))

  def greedy() -> jax.Array:
    return _most_likely(logits_BV)

  def greedy_by_rules() -> jax.Array:
    return _most_likely(numbers.rules.applied(logits_BV, history_BT, lengths_B))

  def drawn() -> jax.Array:
    processed_BV = jax.lax.cond(
      asked | removes,
      lambda: processed(logits_BV, history_BT, lengths_B, numbers),
      lambda: _tempered(logits_BV, numbers.temperature_B),
    )
    return _drawn(processed_BV, lengths_B, numbers)

  # The branches give ids: to return logits, each would have to copy them.
  branch = jnp.where(draws, 2, jnp.int32(asked))
  return jax.lax.switch(branch, (greedy, greedy_by_rules, drawn))


def words(vocab_size: int) -> int:
  """W: the words of 32 bits that have a bit for each token."""
  return -(-vocab_size // 32)


def among(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
  """Logits of the tokens that are allowed, -inf for the others.

  Args:
    logits_BV: of each row.
    allowed_BW: uint32; bit i of word w says it of token 32 w + i.
  """
  tokens_V = jnp.arange(logits_BV.shape[1], dtype=jnp.uint32)
  bits_BV = allowed_BW[:, tokens_V // 32] >> (tokens_V % 32) & 1
  return jnp.where(bits_BV == 1, logits_BV, -jnp.inf)


def processed(
  logits_BV: jax.Array, history_BT: jax.Array, lengths_B: jax.Array, numbers: Numbers
) -> jax.Array:
  """The logits as tokens are to be drawn from; -inf for those that may not be.

  Args:
    logits_BV: at least float32.
    history_BT, lengths_B: as for `choose`.
    numbers: which processors, and how strong; a temperature of 0 counts as 1.
  """
  temperature_B, top_k_B, tail_B, min_p_B, *_ = numbers
  logits_BV = numbers.rules.applied(logits_BV, history_BT, lengths_B)
  logits_BV = _tempered(logits_BV, temperature_B)
  logits_BV = if_any((top_k_B > 0) | (tail_B > 0), _sorted_out, logits_BV, top_k_B, tail_B)
  return if_any(min_p_B > 0, _min_p, logits_BV, min_p_B)


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


def _sorted_out(logits_BV: jax.Array, top_k_B: jax.Array, tail_B: jax.Array) -> jax.Array:
  """Top-k, then top-p of what is left."""
  V = logits_BV.shape[-1]
  sorted_BV = _ascending(logits_BV)
  first_B = jnp.where(top_k_B > 0, jnp.maximum(V - top_k_B, 0), 0)
  lowest_B1 = jnp.take_along_axis(sorted_BV, first_B[:, None], axis=1)
  logits_BV, sorted_BV = (
    jnp.where(x_BV < lowest_B1, -jnp.inf, x_BV) for x_BV in (logits_BV, sorted_BV)
  )
  return if_any(tail_B > 0, _top_p, logits_BV, sorted_BV, tail_B)


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
