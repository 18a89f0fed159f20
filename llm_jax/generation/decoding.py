"""Generation: prompts in ids to new ids, one position of all rows at a time. Those of a decoder are
continued; of an encoder-decoder they are the sources, and what is generated stands alone.

Prompts are filled up on the right, and each row has its own length, so a row gets what it would get
alone, whichever rows run beside it. Prefill and step are compiled once for each shape: row counts,
prompt lengths and cache slots are rounded up so that there are few, and how tokens are chosen is no
part of a compiled program (`generation.sampling`).

Whole batches go through `Generator.tokens`, which gives the new tokens of a position as soon as
they are there; the next position is then on its way already. A batch that rows join and leave:

    state = generator.empty(rows=8, slots=1024)
    state, first = generator.admit(weights, state, 3, prompt, sampling, number=0)
    state, ids_B = generator.step(weights, state)  # ids_B[3] is the row's second token
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.contracts import Adapter, Model
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.generation import beams as beam_search
from llm_jax.generation import forward
from llm_jax.generation.forward import Forward, Weights
from llm_jax.generation.sampling import GREEDY, Numbers, Sampling, choose, numbers
from llm_jax.parallel import hosts, sharding

SHORTEST = 16  # positions that a row has at least


@flax.struct.dataclass
class State:
  """Rows that grow, each of which goes its own way.

  Attributes:
    cache: the model's, without the newest tokens.
    ids_B: the newest token of each row, int32.
    lengths_B: how many tokens of each row are in the cache, int32.
    history_BT: the tokens of each row, its prompt and the newest included.
    numbers: how the tokens of each row are chosen.
    slots: the longest row that the cache has room for.
    source: the longest source that it has room for.
  """

  cache: PyTree
  ids_B: jax.Array
  lengths_B: jax.Array
  history_BT: jax.Array
  numbers: Numbers
  slots: int = flax.struct.field(pytree_node=False)
  source: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class _Prompts:
  """What prefill reads: ids, filled up on the right, their lengths, and the numbers of each row."""

  tokens_BT: jax.Array
  lengths_B: jax.Array
  numbers: Numbers


class Generator:
  """Continues rows of tokens with a decoder, or writes rows for sources with an encoder-decoder.

  All processes that share the mesh must make the same calls.

  Args:
    model: the decoder (`core.contracts.Model`; see `forward.Forward` for its cache).
    infos: what each of its parameters is, by path.
    layout: the mesh that its parameters lie on; None for one device.
    adapter: what was trained beside it, if anything was.
    start: ids that each row of an encoder-decoder begins with.
    opens: whether all tokens of a decoder's prompt see all of it.
  """

  def __init__(
    self,
    model: Model,
    infos: Mapping[str, Info],
    layout: sharding.Layout | None = None,
    adapter: Adapter | None = None,
    start: Sequence[int] = (0,),
    opens: bool = False,
  ):
    self._model, self._layout, self._begin = model, layout, tuple(start)
    self._opens = opens
    self._longest = model.max_len - (0 if adapter is None else adapter.positions)
    self._forward = Forward(model, infos, layout, adapter)
    self._compiled: set[tuple[Any, ...]] = set()
    self.weights = self._jit(self._forward.weights)
    self._start = self._jit(self._prefilled, static_argnames='slots')
    self._blank = self._jit(self._blanks, static_argnames=('rows', 'slots', 'source'))
    self._join = self._jit(self._joined, donate_argnames='state')
    self._next = self._jit(self._advanced, donate_argnames='state')
    shape = 'slots', 'beams', 'room', 'best'
    self._search = self._jit(self._searched, static_argnames=shape)
    self._search_on = self._jit(self._searched_on, static_argnames='best', donate_argnames='search')

  def tokens(
    self,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    eos_ids: Sequence[int] = (),
    rows: Sequence[int] | None = None,
  ) -> Iterator[np.ndarray]:
    """The new tokens, position by position, [prompts] int32 each; those of beam search come when
    all are there, for each prompt `num_return_sequences` rows, the best first.

    A row ends with one of `eos_ids`, which is its last token, or after `max_new_tokens`, and is -1
    from then on; when all have ended so does the iterator.

    Args:
      weights: what `weights(params)` made of the model's parameters; it may be used again.
      prompts: ids, at least one per row.
      sampling: how tokens are chosen, for all rows or for each; beam search takes one for all.
        Without it a prompt gets one row, whatever `num_return_sequences` says.
      eos_ids: tokens that end a row.
      rows: the numbers of the rows, for their randomness; None for 0, 1, ...

    Raises:
      ValueError: no prompt, one without a token, one too long for the model with what is to come,
        another number of samplings than of prompts, beam search in some rows only.
    """
    if isinstance(sampling, Sampling):
      samplings = [sampling] * len(prompts)
    else:
      samplings = list(sampling)
    self.check(prompts, samplings)
    numbered = range(len(prompts)) if rows is None else rows
    batch = self._prompts(prompts, samplings, numbered, eos_ids)
    pairs = zip(prompts, samplings, strict=True)
    slots = _rounded(max(self.begun(prompt) + s.max_new_tokens for prompt, s in pairs))
    if samplings[0].beams > 1:
      yield from self._search_tokens(weights, batch, len(prompts), samplings[0], eos_ids, slots)
    else:
      yield from self._row_tokens(weights, batch, samplings, eos_ids, slots)

  @property
  def reads_source(self) -> bool:
    """Whether prompts are sources, and not continued."""
    return self._forward.reads_source

  def room(self, prompt: Sequence[int]) -> int:
    """How many new tokens the model can give a prompt at most."""
    return self._longest - self.begun(prompt)

  def prompt_lengths(self, most: int) -> list[int]:
    """The lengths that prompts of at most so many tokens are filled up to: each is a program."""
    every = range(1, min(most, self._longest) + 1)
    return sorted({min(_rounded(length), self._longest) for length in every})

  def empty(self, rows: int, slots: int, source: int = 0) -> State:
    """A batch in which all rows are free; `step` gives free rows tokens that mean nothing.

    Args:
      rows: how many rows run at once.
      slots: the longest row, prompt and new tokens together; of an encoder-decoder without it.
      source: of an encoder-decoder the longest prompt.

    Raises:
      ValueError: rows that are longer than the model takes.
    """
    if not 0 < slots <= self._longest:
      raise ValueError(
        f'slots={slots} must be at least 1, and at most max_len={self._longest} of the model.'
      )
    key = 'empty', rows, slots, source
    return self._together(key, self._blank, rows=rows, slots=slots, source=source)

  def admit(
    self,
    weights: Weights,
    state: State,
    row: int,
    prompt: Sequence[int],
    sampling: Sampling,
    number: int = 0,
    eos_ids: Sequence[int] = (),
  ) -> tuple[State, jax.Array]:
    """Puts a prompt into a row, whatever that held; the other rows stay as they are.

    The row may be advanced `sampling.max_new_tokens` - 1 times; who calls `step` counts that, and
    says when a row is free.

    Args:
      weights: as for `tokens`.
      state: of `empty`, or as it was returned; its memory is used again.
      row: which row.
      prompt: ids, at least one.
      sampling: how its tokens are chosen; no beam search.
      number: the number of the row for its randomness: equal numbers draw alike in any row.
      eos_ids: tokens that do not come before `sampling.min_new_tokens`.

    Returns:
      The state, and the row's first new token, int32 scalar.

    Raises:
      ValueError: a row that is not there, a prompt without a token, one that is longer with its new
        tokens than a row may be, beam search.
    """
    B = len(state.ids_B)
    if not 0 <= row < B:
      raise ValueError(f'row={row} must be one of the {B} rows of the batch, 0 to {B - 1}.')
    if sampling.beams > 1:
      raise ValueError(
        f'beams={sampling.beams}: beam search runs whole batches; use Generator.tokens, or beams=1.'
      )
    self.check([prompt], [sampling])
    if self.reads_source and len(prompt) > state.source:
      raise ValueError(
        f'a source of {len(prompt)} tokens is longer than the rows of this batch take, '
        f'source={state.source}.'
      )
    begun = self.begun(prompt)
    length = begun + sampling.max_new_tokens
    if length > state.slots:
      raise ValueError(
        f'a prompt of {begun} tokens and max_new_tokens={sampling.max_new_tokens} are '
        f'{length} positions, and the rows of this batch have slots={state.slots}; shorten the '
        'prompt, or set a lower max_new_tokens or more slots.'
      )
    one = self._prompts([prompt], [sampling], [number], eos_ids, shards=1)
    key = 'admit', B, state.slots, state.source, one.tokens_BT.shape
    return self._together(key, self._join, weights, one, self._put(np.int32(row)), state=state)

  def step(self, weights: Weights, state: State) -> tuple[State, jax.Array]:
    """Advances all rows by one token.

    Returns:
      The state, whose memory is used again, and the new tokens, [B] int32, whole on each device.
    """
    key = 'step', len(state.ids_B), state.slots, state.source
    return self._together(key, self._next, weights, state=state)

  def check(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> None:
    """Raises ValueError for prompts that cannot be continued so."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not min(lengths):
      raise ValueError(
        f'prompts of {lengths} tokens: there must be at least one prompt, and one token in each.'
      )
    if len(samplings) != len(prompts):
      raise ValueError(f'{len(samplings)} samplings for {len(prompts)} prompts: give one for each.')
    if max(s.beams for s in samplings) > 1 and len(set(samplings)) > 1:
      raise ValueError('beam search takes one sampling for all prompts; give them one by one.')
    most, V = self._longest, self._model.vocab_size
    for sampling in samplings:
      for name in ('forced_bos', 'forced_eos'):
        if (getattr(sampling, name) or 0) >= V:
          raise ValueError(
            f'{name}={getattr(sampling, name)} is no id of the vocabulary, 0 to {V - 1}.'
          )
    if self.reads_source and max(lengths) > most:
      raise ValueError(
        f'a source of {max(lengths)} tokens is longer than max_len={most} of the model; shorten it.'
      )
    for prompt, sampling in zip(prompts, samplings, strict=True):
      length = self.begun(prompt)
      longest = length + sampling.max_new_tokens
      if longest > most:
        way_out = f', or set max_new_tokens={most - length} or less' if length < most else ''
        raise ValueError(
          f'a prompt of {length} tokens and max_new_tokens={sampling.max_new_tokens} are '
          f'{longest} positions, and the model has max_len={most}; shorten the prompt{way_out}.'
        )

  def begun(self, prompt: Sequence[int]) -> int:
    """How many tokens a row has before its first new one."""
    return len(self._begin) if self.reads_source else len(prompt)

  def _prompts(
    self,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    rows: Sequence[int],
    eos_ids: Sequence[int],
    shards: int | None = None,
  ) -> _Prompts:
    """Prompts, filled up to a whole batch that `shards` divides, on the mesh."""
    if shards is None:
      shards = 1 if self._layout is None else sharding.row_shards(self._layout.mesh)
    fill = _rounded_rows(len(prompts), shards) - len(prompts)
    lengths = [*map(len, prompts), *[1] * fill]
    tokens_BT = np.zeros((len(lengths), min(_rounded(max(lengths)), self._longest)), np.int32)
    for row, prompt in enumerate(prompts):
      tokens_BT[row, : len(prompt)] = prompt
    begun = [*map(self.begun, prompts), *[1] * fill]
    chosen = numbers([*samplings, *[GREEDY] * fill], [*rows, *[0] * fill], begun, eos_ids)
    return self._put(_Prompts(tokens_BT, np.array(lengths, np.int32), chosen), by_row=shards > 1)

  def _row_tokens(
    self,
    weights: Weights,
    batch: _Prompts,
    samplings: Sequence[Sampling],
    eos_ids: Sequence[int],
    slots: int,
  ) -> Iterator[np.ndarray]:
    limits = np.array([sampling.max_new_tokens for sampling in samplings])
    key = 'start', batch.tokens_BT.shape, slots
    state, ids_B = self._together(key, self._start, weights, batch, slots=slots)
    ended = np.zeros(len(limits), bool)
    for made in range(1, limits.max() + 1):
      ready_B = ids_B
      if made < limits.max():
        state, ids_B = self.step(weights, state)
      ids = np.asarray(ready_B)[: len(limits)]
      yield np.where(ended, -1, ids)
      ended |= np.isin(ids, eos_ids) | (made >= limits)
      if ended.all():
        return

  def _search_tokens(
    self,
    weights: Weights,
    batch: _Prompts,
    rows: int,
    sampling: Sampling,
    eos_ids: Sequence[int],
    slots: int,
  ) -> Iterator[np.ndarray]:
    limits = beam_search.Limits(
      new_tokens=np.int32(sampling.max_new_tokens),
      length_penalty=np.float32(sampling.length_penalty),
      eos_ids_E=np.array(eos_ids, np.int32),
    )
    count = dict(best=sampling.num_return_sequences)
    room = _rounded(sampling.max_new_tokens)
    shape = dict(slots=slots, beams=sampling.beams, room=room) | count
    key = 'search', batch.tokens_BT.shape, len(eos_ids), *shape.values()
    search, best = self._together(key, self._search, weights, batch, self._put(limits), **shape)
    for _ in range(1, sampling.max_new_tokens):
      open_B = best.open_B
      search, best = self._together((*key, 'on'), self._search_on, weights, search=search, **count)
      if not np.any(np.asarray(open_B)[:rows]):
        break
    tokens_BNM, counts_BN = (np.asarray(x)[:rows] for x in (best.tokens_BNM, best.counts_BN))
    for made in range(counts_BN.max()):
      yield np.where(made < counts_BN, tokens_BNM[:, :, made], -1).reshape(-1)

  # What is traced.

  def _prefilled(self, weights, batch, *, slots, source=None) -> tuple[State, jax.Array]:
    """The state of these prompts alone, and the first new token of each row."""
    source = batch.tokens_BT.shape[1] if source is None else source
    cache, lengths_B, logits_BV, history_BT = self._read(weights, batch, slots, source)
    state = State(cache, lengths_B, lengths_B, history_BT, batch.numbers, slots, source)
    return _chosen(state, logits_BV)

  def _advanced(self, weights, *, state) -> tuple[State, jax.Array]:
    cache, logits_BV = self._read_newest(weights, state.ids_B, state.lengths_B, state.cache)
    return _chosen(state.replace(cache=cache, lengths_B=state.lengths_B + 1), logits_BV)

  def _joined(self, weights, one, row, *, state) -> tuple[State, jax.Array]:
    """The state with one prompt in a row."""
    new, ids_1 = self._prefilled(weights, one, slots=state.slots, source=state.source)

    def put(rows: jax.Array, x: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(rows, x.astype(rows.dtype), row, axis=0)

    return _laid_out(jax.tree.map(put, state, new)), ids_1[0]

  def _blanks(self, *, rows, slots, source) -> State:
    return _laid_out(
      State(
        cache=self._forward.empty_cache(rows, slots, source),
        ids_B=jnp.zeros(rows, jnp.int32),
        lengths_B=jnp.zeros(rows, jnp.int32),
        history_BT=jnp.zeros((rows, slots), jnp.int32),
        numbers=jax.tree.map(jnp.asarray, numbers([GREEDY] * rows, [0] * rows, [1] * rows)),
        slots=slots,
        source=source,
      )
    )

  def _searched(self, weights, batch, limits, *, slots, beams, room, best):
    source, rules = batch.tokens_BT.shape[1], batch.numbers.rules
    cache, lengths_B, logits_BV, history_BT = self._read(weights, batch, slots, source)
    search = beam_search.begin(cache, lengths_B, history_BT, rules, limits, beams, room)
    return beam_search.advance(search, jnp.repeat(logits_BV, beams, axis=0), best)

  def _searched_on(self, weights, *, search, best):
    ids_R, lengths_R = search.newest_R, search.lengths_R
    cache, logits_RV = self._read_newest(weights, ids_R, lengths_R, search.cache)
    search = search._replace(cache=cache, lengths_R=lengths_R + 1)
    return beam_search.advance(search, logits_RV, best)

  def _read(self, weights, batch, slots, source) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """Prompts through the model: the cache, how many tokens each row has, the logits after the last
    of them, and these tokens, [B, slots].
    """
    rows, B = _rows(batch.tokens_BT, batch.lengths_B), len(batch.lengths_B)
    cache, beside = self._forward.empty_cache(B, slots, source), None
    open_BT = rows['segments'] if self._opens else None
    if self.reads_source:
      begin_BT = jnp.broadcast_to(jnp.array(self._begin, jnp.int32), (B, len(self._begin)))
      rows, beside = _rows(begin_BT, jnp.full(B, len(self._begin))), rows
    lengths_B = jnp.sum(rows['segments'] > 0, axis=1, dtype=jnp.int32)
    hidden_BTD, cache = self._forward(weights, *rows.values(), cache, beside, open_BT)
    last_BD = jnp.take_along_axis(hidden_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    tokens_BT = rows['tokens'][:, :slots].astype(jnp.int32)  # what is cut off only fills rows up
    history_BT = jnp.zeros((B, slots), jnp.int32).at[:, : tokens_BT.shape[1]].set(tokens_BT)
    return cache, lengths_B, self._forward.logits(weights, last_BD), history_BT

  def _read_newest(self, weights, ids_B, lengths_B, cache) -> tuple[Any, jax.Array]:
    """One token of each row through the model: the cache with it, and the logits after it."""
    tokens_B1, positions_B1 = ids_B[:, None], lengths_B[:, None]
    hidden_B1D, cache = self._forward(
      weights, tokens_B1, jnp.ones_like(tokens_B1), positions_B1, cache
    )
    return cache, self._forward.logits(weights, hidden_B1D[:, 0])

  # How it is called.

  def _jit(self, function: Callable, **options: Any) -> Callable:

    @functools.wraps(function)
    def on_mesh(*args, **kwargs):
      with sharding.use(self._layout):
        return function(*args, **kwargs)

    return jax.jit(on_mesh, **options)

  def _together(self, key: tuple[Any, ...], function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls a jitted function; where several processes share the mesh, the first time for a key
    when all have compiled it (as `hosts.compiled`).
    """
    if hosts.several() and key not in self._compiled:
      function.lower(*args, **kwargs).compile()
      hosts.barrier()
      self._compiled.add(key)
    return function(*args, **kwargs)

  def _put(self, arrays: PyTree, by_row: bool = False) -> Any:
    """NumPy arrays on the mesh: their rows over the axes of the batch, or whole on each device."""
    if self._layout is None:
      return arrays
    mesh = self._layout.mesh
    where = sharding.batch_sharding(mesh) if by_row else sharding.replicated(mesh)
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(np.shape(x), where, np.asarray(x).__getitem__), arrays
    )


def _rows(tokens_BT: jax.Array, lengths_B: jax.Array) -> dict[str, jax.Array]:
  """Rows of one document each, filled up on the right."""
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  segments_BT = jnp.int32(positions_BT < lengths_B[:, None])
  return {'tokens': tokens_BT, 'segments': segments_BT, 'positions': positions_BT}


def _chosen(state: State, logits_BV: jax.Array) -> tuple[State, jax.Array]:
  """The state with the next token of each row, and these tokens, whole on each device."""
  ids_B = choose(logits_BV, state.history_BT, state.lengths_B, state.numbers)
  ids_B = sharding.constrain(ids_B, 'batch')
  rows = jnp.arange(len(ids_B))
  history_BT = state.history_BT.at[rows, state.lengths_B].set(ids_B, mode='drop')
  state = _laid_out(state.replace(ids_B=ids_B, history_BT=history_BT))
  return state, sharding.constrain(ids_B, None)


def _laid_out(state: State) -> State:
  """Always laid out alike, so that one compiled step takes any state."""
  rest = jax.tree.map(
    lambda x: sharding.constrain(x, 'batch', *[None] * (x.ndim - 1)), state.replace(cache=None)
  )
  return rest.replace(cache=forward.laid_out(state.cache))


def _rounded(length: int) -> int:
  """At least `length`, and at most an eighth more, or to the next multiple of `SHORTEST`: few
  lengths are compiled for.
  """
  step = max(SHORTEST, 1 << max((length - 1).bit_length() - 4, 0))
  return -(-length // step) * step


def _rounded_rows(rows: int, shards: int) -> int:
  """A power of two times `shards` that is at least `rows`."""
  return shards << (-(-rows // shards) - 1).bit_length()
