"""Generation: prompts in ids to new ids, one place of all rows at a time. Prefill and decode are
compiled once each.

Prompts are filled up on the right, and each row has its own length, so a row gets what it would get
alone. `Generator.tokens` gives the new tokens of a place as soon as they are there; the next place
is then on its way already.

Greedy and sampled rows need nothing of each other: the randomness of a token comes from the seed,
the number of its row and its place in it. Logits are processed as `transformers` does it, in its
order: repetition penalty (arXiv:1909.05858, section 4.1), temperature, top-k (arXiv:1805.04833),
top-p (arXiv:1904.09751), min-p (arXiv:2407.01082). Beam search is that of `transformers` with
early_stopping=False: scores are summed log-probabilities over length ** length_penalty, and a row
ends when no running beam, at its present length, would be better than the worst of its finished
ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import tree
from llm_jax.nn import layers
from llm_jax.parallel import hosts, sharding

SHORTEST = 16  # places that a row has at least
LOWEST = -1e9  # a score below all others


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen.

  Attributes:
    max_new_tokens: after so many a row ends, if it does not before.
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
    for name, right, allowed in (
      ('max_new_tokens', self.max_new_tokens >= 1, 'at least 1'),
      (
        'temperature',
        0 <= self.temperature < math.inf,
        'at least 0, which takes the most likely token',
      ),
      ('top_k', self.top_k >= 0, 'at least 1, or 0 for all tokens'),
      ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1, which is all tokens'),
      ('min_p', 0 <= self.min_p <= 1, 'at least 0, which is all tokens, and at most 1'),
      ('repetition_penalty', 0 < self.repetition_penalty < math.inf, 'above 0; 1 is no penalty'),
      ('beams', self.beams >= 1, 'at least 1, which is no beam search'),
      ('length_penalty', math.isfinite(self.length_penalty), 'finite'),
      ('seed', 0 <= self.seed < 2**32, 'at least 0 and below 2 ** 32'),
    ):
      if not right:
        raise ValueError(f'{name}={getattr(self, name)} must be {allowed}.')
    if self.beams > 1 and self.temperature:
      raise ValueError(
        f'beams={self.beams} follows the most likely texts and draws nothing; set temperature=0 '
        '(it is '
        f'{self.temperature}), or beams=1.'
      )
    idle = [
      name
      for name, neutral in (('top_k', 0), ('top_p', 1), ('min_p', 0))
      if getattr(self, name) != neutral
    ]
    if idle and not self.temperature:
      raise ValueError(
        f'{idle[0]}={getattr(self, idle[0])} changes nothing where temperature=0 takes the most '
        'likely token; '
        f'raise temperature, or leave out {idle[0]}.'
      )
    if self.length_penalty != 1 and self.beams == 1:
      raise ValueError(
        f'length_penalty={self.length_penalty} is for beam search; set beams above 1, or leave it '
        'out.'
      )


class Generator:
  """Makes rows of tokens longer, with a decoder (`llm_jax.models.decoder`).

  Args:
    model: the decoder.
    layout: the mesh that its parameters lie on; None for one device.
  """

  def __init__(self, model: Any, layout: sharding.Layout | None = None):
    self._model, self._layout = model.clone(remat='none'), layout
    self._flips = (
      layout.platform == 'cpu' and layout.mesh.size == 1
      if layout
      else jax.default_backend() == 'cpu'
    )
    self.weights = jax.jit(self._on_mesh(self._weights))
    static = ('slots', 'sampling', 'eos_ids', 'places')
    self.start = jax.jit(self._on_mesh(self._start), static_argnames=static)
    self.step = jax.jit(
      self._on_mesh(self._step), static_argnames=('sampling', 'eos_ids'), donate_argnames='state'
    )

  def tokens(
    self,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int] = (),
    rows: Sequence[int] | None = None,
  ) -> Iterator[np.ndarray]:
    """The new tokens, place by place, [rows] int32 each; those of beam search come when all are
    there.

    A row ends with one of `eos_ids`, which is its last token, and is -1 from then on; when all have
    ended so does the iterator. All processes that share the mesh must call this with the same
    prompts.

    Args:
      weights: what `weights(params)` made of the model's parameters; it may be used again.
      prompts: ids, at least one a row.
      sampling: how tokens are chosen.
      eos_ids: tokens that end a row.
      rows: the numbers of the rows, for their randomness; None for 0, 1, ...

    Raises:
      ValueError: no prompt, one without a token, one too long for the model with what is to come.
    """
    lengths = self._checked(prompts, sampling)
    count = _rounded_rows(
      len(prompts), 1 if self._layout is None else sharding.row_shards(self._layout.mesh)
    )
    tokens_BT = np.zeros((count, min(_rounded(max(lengths)), self._model.max_len)), np.int32)
    for row, prompt in enumerate(prompts):
      tokens_BT[row, : len(prompt)] = prompt
    numbers = range(len(prompts)) if rows is None else rows
    fill = count - len(prompts)
    batch = dict(
      tokens_BT=tokens_BT,
      lengths_B=np.array([*lengths, *[1] * fill], np.int32),
      rows_B=np.array([*numbers, *[0] * fill], np.int32),
      seed=np.array(sampling.seed, np.uint32),
      limit=np.array(sampling.max_new_tokens, np.int32),
    )
    run = self._searched if sampling.beams > 1 else self._drawn
    yield from run(
      weights,
      {name: self._put(x) for name, x in batch.items()},
      len(prompts),
      sampling,
      tuple(map(int, eos_ids)),
      _rounded(max(lengths) + sampling.max_new_tokens),
    )

  def _checked(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[int]:
    """The lengths of the prompts."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not min(lengths):
      raise ValueError(
        f'prompts of {lengths} tokens: there must be at least one prompt, and one token in each.'
      )
    longest, most = max(lengths) + sampling.max_new_tokens, self._model.max_len
    if longest > most:
      way_out = (
        f', or set max_new_tokens={most - max(lengths)} or less' if max(lengths) < most else ''
      )
      raise ValueError(
        f'a prompt of {max(lengths)} tokens and max_new_tokens={sampling.max_new_tokens} are '
        f'{longest} places, '
        f'and the model has max_len={most}; shorten the prompt{way_out}.'
      )
    return lengths

  def _drawn(self, weights, batch, rows, sampling, eos_ids, slots) -> Iterator[np.ndarray]:
    fixed = dict(sampling=dataclasses.replace(sampling, max_new_tokens=1, seed=0), eos_ids=())
    state, ids_B = self._together(self.start, weights, **batch, slots=slots, places=0, **fixed)
    ended = np.zeros(rows, bool)
    for place in range(sampling.max_new_tokens):
      ready_B = ids_B
      if place + 1 < sampling.max_new_tokens:
        step = self.step if place else functools.partial(self._together, self.step)
        state, ids_B = step(weights, state=state, **fixed)
      ids = np.where(ended, -1, np.asarray(ready_B)[:rows])
      yield ids
      ended |= np.isin(ids, eos_ids)
      if ended.all():
        return

  def _searched(self, weights, batch, rows, sampling, eos_ids, slots) -> Iterator[np.ndarray]:
    fixed = dict(sampling=dataclasses.replace(sampling, max_new_tokens=1, seed=0), eos_ids=eos_ids)
    state, best = self._together(
      self.start, weights, **batch, slots=slots, places=_rounded(sampling.max_new_tokens), **fixed
    )
    for place in range(1, sampling.max_new_tokens):
      step, open_B = (
        self.step if place > 1 else functools.partial(self._together, self.step),
        best.open_B,
      )
      state, best = step(weights, state=state, **fixed)
      if not np.any(np.asarray(open_B)[:rows]):
        break
    tokens_BM, counts_B = (np.asarray(x)[:rows] for x in (best.tokens_BM, best.counts_B))
    for place in range(counts_B.max()):
      yield np.where(place < counts_B, tokens_BM[:, place], -1)

  def _together(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls a jitted function; where several processes share the mesh, when all have compiled it
    (as `hosts.compiled`).
    """
    if hosts.several():
      function.lower(*args, **kwargs).compile()
      hosts.barrier()
    return function(*args, **kwargs)

  def _on_mesh(self, function: Callable) -> Callable:

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
      with sharding.use(self._layout):
        return function(*args, **kwargs)

    return wrapped

  def _put(self, x: np.ndarray) -> Any:
    if self._layout is None:
      return x
    rows = (
      sharding.batch_sharding(self._layout.mesh)
      if x.ndim
      else sharding.replicated(self._layout.mesh)
    )
    return jax.make_array_from_callback(x.shape, rows, lambda cut: x[cut])

  def _weights(self, params: Any) -> '_Weights':
    dtype = layers.DTYPES[self._model.dtype]
    cast = lambda path, x: (
      x.astype(dtype) if path.endswith('kernel') or path == 'embedder/token/embedding' else x
    )
    params = tree.map_with_path(cast, params)
    stack = layers.apart(params['stack'])
    rest = {name: part for name, part in params.items() if name not in ('stack', 'output')}
    output_VD = params['output']['kernel'].T if 'output' in params else None
    return _Weights(rest | {'stack': layers.flipped(stack) if self._flips else stack}, output_VD)

  def _start(
    self, weights, tokens_BT, lengths_B, rows_B, seed, limit, *, slots, sampling, eos_ids, places
  ):
    (B, T), V, W = tokens_BT.shape, self._model.vocab_size, sampling.beams
    cache = self._model.empty_cache(B, slots)
    cache = cache._replace(layers=layers.apart(cache.layers))
    real_BT = jnp.arange(T)[None] < lengths_B[:, None]
    hidden_BTD, cache = self._model.apply(
      {'params': weights.params}, tokens_BT, segments_BT=jnp.int32(real_BT), cache=cache
    )
    logits_BV = self._logits(
      weights, jnp.take_along_axis(hidden_BTD, lengths_B[:, None, None] - 1, axis=1)
    )
    seen_BV = None
    if sampling.repetition_penalty != 1:
      ids_BT = jnp.where(real_BT, tokens_BT, V)  # out of range, and dropped
      seen_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], ids_BT].set(True, mode='drop')
    if W == 1:
      keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)
      return _draw(_Drawn(cache, None, keys_B, seen_BV), logits_BV, sampling)
    cache, logits_BV, seen_BV = jax.tree.map(
      lambda x: jnp.repeat(x, W, axis=0), (cache, logits_BV, seen_BV)
    )
    return _search(_searching(cache, seen_BV, limit, W, places), logits_BV, sampling, eos_ids)

  def _step(self, weights, state, *, sampling, eos_ids):
    ids_B = (
      state.ids_B
      if sampling.beams == 1
      else state.running.tokens_BWM[:, :, state.made - 1].reshape(-1)
    )
    hidden_B1D, cache = self._model.apply(
      {'params': weights.params}, ids_B[:, None], cache=state.cache
    )
    state, logits_BV = state._replace(cache=cache), self._logits(weights, hidden_B1D)
    return (
      _draw(state, logits_BV, sampling)
      if sampling.beams == 1
      else _search(state, logits_BV, sampling, eos_ids)
    )

  def _logits(self, weights: Any, x_B1D: jax.Array) -> jax.Array:
    x_BD, table_VD = x_B1D[:, 0], weights.output_VD
    if table_VD is None:
      table_VD = weights.params['embedder']['token']['embedding']
    if self._flips:
      logits_BV = layers.matrix_first(x_BD, table_VD, self._model.options.wide)
    else:
      logits_BV = jnp.einsum(
        'BD,VD->BV', x_BD, table_VD, preferred_element_type=self._model.options.wide
      )
    return sharding.constrain(logits_BV, 'batch', None)


class _Weights(NamedTuple):
  """A model's parameters in the form in which they are run, in the compute type, and its own
  projection on the vocabulary.
  """

  params: Any
  output_VD: jax.Array | None


class _Drawn(NamedTuple):
  """Rows of which each goes its own way: their newest tokens, their keys, and which tokens they
  have (None: not asked for).
  """

  cache: Any
  ids_B: jax.Array | None
  keys_B: jax.Array
  seen_BV: jax.Array | None


def _draw(state: _Drawn, logits_BV: jax.Array, sampling: Sampling) -> tuple[_Drawn, jax.Array]:
  """The state with the next token of each row, and these tokens, whole on each device."""
  logits_BV = processed(logits_BV, state.seen_BV, sampling)
  if sampling.temperature:
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.cache.lengths_B)
    ids_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
  else:
    ids_B = jnp.argmax(logits_BV, axis=-1)
  ids_B = sharding.constrain(ids_B.astype(jnp.int32), 'batch')
  seen_BV = (
    None if state.seen_BV is None else state.seen_BV.at[jnp.arange(len(ids_B)), ids_B].set(True)
  )
  return state._replace(ids_B=ids_B, seen_BV=seen_BV), sharding.constrain(ids_B, None)


def processed(logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling) -> jax.Array:
  """The logits as tokens are to be drawn from; -inf for those that may not be.

  Args:
    logits_BV: at least float32.
    seen_BV: which tokens each row has already; only for the repetition penalty.
    sampling: which processors, and how strong.
  """
  if sampling.repetition_penalty != 1:
    logits_BV = _penalized(logits_BV, seen_BV, sampling.repetition_penalty)
  if sampling.temperature not in (0, 1):
    logits_BV /= sampling.temperature
  if 0 < sampling.top_k < logits_BV.shape[-1]:
    lowest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    logits_BV = _top_p(logits_BV, sampling.top_p)
  if sampling.min_p > 0:
    p_BV = jax.nn.softmax(logits_BV)
    logits_BV = jnp.where(
      p_BV < sampling.min_p * jnp.max(p_BV, axis=-1, keepdims=True), -jnp.inf, logits_BV
    )
  return logits_BV


def _penalized(scores_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
  return jnp.where(
    seen_BV, jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty), scores_BV
  )


def _top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
  """Without the least likely tokens, as many as have a probability of at most 1 - `top_p` together;
  one is left.
  """
  order_BV = jnp.argsort(logits_BV, axis=-1)
  sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
  out_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1) <= 1 - top_p
  out_BV = out_BV.at[:, -1].set(False)
  rank_BV = jnp.argsort(order_BV, axis=-1)
  return jnp.where(jnp.take_along_axis(out_BV, rank_BV, axis=-1), -jnp.inf, logits_BV)


class _Beams(NamedTuple):
  """W beams of each prompt, best first: their new tokens, how many, and their scores."""

  tokens_BWM: jax.Array
  counts_BW: jax.Array
  scores_BW: jax.Array

  def pick(self, chosen_BC: jax.Array) -> '_Beams':
    """Those of the numbers `chosen_BC`, C of each prompt."""
    return _Beams(*(_picked(x, chosen_BC) for x in self))


class _Search(NamedTuple):
  """Beam search after `made` tokens.

  Attributes:
    running: beams that go on; their cache has B W rows.
    finished: the best that have ended; scores are divided by their lengths, and `LOWEST` where
      there are fewer than W.
    open_B: whether a better one may still come.
    limit: tokens after which all beams end.
  """

  cache: Any
  seen_BWV: jax.Array | None
  running: _Beams
  finished: _Beams
  open_B: jax.Array
  made: jax.Array
  limit: jax.Array


class _Best(NamedTuple):
  """The best finished beam of each prompt, and whether a better one may still come."""

  tokens_BM: jax.Array
  counts_B: jax.Array
  open_B: jax.Array


def _searching(
  cache: Any, seen_BV: jax.Array | None, limit: jax.Array, beams: int, places: int
) -> _Search:
  """The state before the first token, from B W rows of which those of one prompt are alike."""
  B = len(cache.lengths_B) // beams
  none = _Beams(
    jnp.zeros((B, beams, places), jnp.int32),
    jnp.zeros((B, beams), jnp.int32),
    jnp.full((B, beams), LOWEST),
  )
  first = none._replace(
    scores_BW=none.scores_BW.at[:, 0].set(0.0)
  )  # of beams that are alike, one counts
  seen_BWV = None if seen_BV is None else seen_BV.reshape(B, beams, -1)
  return _Search(cache, seen_BWV, first, none, jnp.ones(B, bool), jnp.int32(0), limit)


def _search(
  state: _Search, logits_BV: jax.Array, sampling: Sampling, eos_ids: tuple[int, ...]
) -> tuple[_Search, _Best]:
  """One token more for each running beam; logits are of B W rows."""
  B, W = state.running.scores_BW.shape
  V = logits_BV.shape[-1]
  scores_BWV = jax.nn.log_softmax(logits_BV).reshape(B, W, V)
  if state.seen_BWV is not None:
    scores_BWV = _penalized(scores_BWV, state.seen_BWV, sampling.repetition_penalty)
  scores_BWV += state.running.scores_BW[:, :, None]
  # As many candidates as leave W that go on, should all others end.
  count = min(W * max(2, 1 + len(eos_ids)), W * V)
  scores_BC, found_BC = jax.lax.top_k(scores_BWV.reshape(B, W * V), count)
  beams_BC, ids_BC = found_BC // V, found_BC % V
  made = state.made + 1
  length = made.astype(scores_BC.dtype) ** sampling.length_penalty
  candidates = _Beams(
    _picked(state.running.tokens_BWM, beams_BC).at[:, :, state.made].set(ids_BC),
    jnp.full((B, count), made),
    scores_BC,
  )
  ends_BC = jnp.isin(ids_BC, jnp.asarray(eos_ids, jnp.int32)) | (made >= state.limit)

  going_BC = scores_BC + LOWEST * ends_BC
  next_BW = jax.lax.top_k(going_BC, W)[1]
  running = candidates._replace(scores_BW=going_BC).pick(next_BW)
  beams_BW, ids_BW = (_picked(x, next_BW) for x in (beams_BC, ids_BC))

  ended_BC = (
    scores_BC / length
    + LOWEST * ~(ends_BC & (jnp.arange(count) < W)[None])
    + LOWEST * ~state.open_B[:, None]
  )
  both = jax.tree.map(
    lambda *x: jnp.concatenate(x, axis=1), state.finished, candidates._replace(scores_BW=ended_BC)
  )
  finished = both.pick(jax.lax.top_k(both.scores_BW, W)[1])
  worst_B = jnp.min(finished.scores_BW, axis=1)  # LOWEST, or less, where not all W have ended
  open_B = state.open_B & (running.scores_BW[:, 0] / length > worst_B)

  cache = jax.tree.map(lambda x: _pick_rows(x, beams_BW), state.cache)
  seen_BWV = state.seen_BWV
  if seen_BWV is not None:
    seen_BWV = (
      _picked(seen_BWV, beams_BW).at[jnp.arange(B)[:, None], jnp.arange(W)[None], ids_BW].set(True)
    )
  best = _Best(
    *(
      sharding.constrain(x, *[None] * x.ndim)
      for x in (finished.tokens_BWM[:, 0], finished.counts_BW[:, 0], open_B)
    )
  )
  return _Search(cache, seen_BWV, running, finished, open_B, made, state.limit), best


def _picked(x_BW: jax.Array, chosen_BC: jax.Array) -> jax.Array:
  """Of each prompt's W entries those with the numbers `chosen_BC`."""
  return jax.vmap(lambda x_W, chosen_C: x_W[chosen_C])(x_BW, chosen_BC)


def _pick_rows(x: jax.Array, beams_BW: jax.Array) -> jax.Array:
  """The same of what has B W rows: lengths, or keys and values."""
  picked = _picked(x.reshape(*beams_BW.shape, *x.shape[1:]), beams_BW).reshape(x.shape)
  return sharding.constrain(picked, 'batch', *(('kv_heads', None, None) if x.ndim > 1 else ()))


def _rounded(length: int) -> int:
  """At least `length`, and at most an eighth more, or to the next multiple of `SHORTEST`: few
  lengths are compiled for.
  """
  step = max(SHORTEST, 1 << max((length - 1).bit_length() - 4, 0))
  return -(-length // step) * step


def _rounded_rows(rows: int, shards: int) -> int:
  """A power of two times `shards` that is at least `rows`."""
  return shards << (-(-rows // shards) - 1).bit_length()
