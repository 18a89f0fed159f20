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

A prompt may be read piece by piece instead, between steps of the others:

    cache = generator.opened(slots=1024)
    cache, logits_1V = generator.read(weights, cache, prompt[:128], begun=0)
    cache, logits_1V = generator.read(weights, cache, prompt[128:], begun=128)
    state, first = generator.enter(state, 3, cache, logits_1V, prompt, sampling, number=0)
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.contracts import Adapter, Model
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.generation import beams as beam_search
from llm_jax.generation import forward
from llm_jax.generation import state as states
from llm_jax.generation.forward import Forward, Weights
from llm_jax.generation.sampling import GREEDY, Sampling, numbers
from llm_jax.generation.state import State
from llm_jax.nn.attention.cache import KeyValues
from llm_jax.parallel import hosts, sharding

SHORTEST = 16  # positions that a row has at least
PIECE = 128  # tokens of a prompt that are read at once, where it is read piece by piece


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

  Attributes:
    weights: makes the parameters' form that is run from the parameters.
    reads_pieces: whether prompts can be read piece by piece.
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
    self._opens, before = opens, 0 if adapter is None else adapter.positions
    self._longest = model.max_len - before
    self._forward = Forward(model, infos, layout, adapter)
    self.reads_pieces = self._forward.reads_pieces and not (opens or before)
    self._compiled: set[tuple[Any, ...]] = set()
    self.weights = self._jit(self._forward.weights)
    self._start = self._jit(self._prefilled, static_argnames='slots')
    self._blank = self._jit(self._blanks, static_argnames=('rows', 'slots', 'source', 'logits'))
    self._open = self._jit(self._opened, static_argnames='slots')
    self._piece = self._jit(self._read_piece)
    self._enter = self._jit(self._entered, donate_argnames='state')
    self._most_likely = self._jit(self._likely, static_argnames='most')
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
  def vocab_size(self) -> int:
    """V of the model."""
    return self._model.vocab_size

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

  def piece_lengths(self, slots: int) -> list[int]:
    """The lengths that pieces of prompts are filled up to: each is a program."""
    return sorted({self._piece_length(n) for n in range(1, min(PIECE, slots) + 1)})

  def forgets(self, slots: int) -> bool:
    """Whether rows of so many tokens keep only the last ones in a layer, as far as it sees."""
    cache = jax.eval_shape(lambda: self._forward.empty_cache(1, slots))
    is_kept = lambda part: isinstance(part, KeyValues)
    kept = [part for part in jax.tree.leaves(cache, is_leaf=is_kept) if is_kept(part)]
    return any(part.slots < slots for part in kept)

  def empty(self, rows: int, slots: int, source: int = 0, logits: bool = False) -> State:
    """A batch in which all rows are free; `step` gives free rows tokens that mean nothing.

    Args:
      rows: how many rows run at once.
      slots: the longest row, prompt and new tokens together; of an encoder-decoder without it.
      source: of an encoder-decoder the longest prompt.
      logits: whether those of the newest tokens are kept, for `likely`.

    Raises:
      ValueError: rows that are longer than the model takes.
    """
    if not 0 < slots <= self._longest:
      raise ValueError(
        f'slots={slots} must be at least 1, and at most max_len={self._longest} of the model.'
      )
    key = 'empty', rows, slots, source, logits
    shape = dict(rows=rows, slots=slots, source=source, logits=logits)
    return self._together(key, self._blank, **shape)

  def admit(
    self,
    weights: Weights,
    state: State,
    row: int,
    prompt: Sequence[int],
    sampling: Sampling,
    number: int = 0,
    eos_ids: Sequence[int] = (),
    allowed_W: np.ndarray | None = None,
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
      allowed_W: which tokens the first one may be, as for `step`; None for any.

    Returns:
      The state, and the row's first new token, int32 scalar.

    Raises:
      ValueError: a row that is not there, a prompt without a token, one that is longer with its new
        tokens than a row may be, beam search.
    """
    self._check_row(state, row, prompt, sampling)
    one = self._prompts([prompt], [sampling], [number], eos_ids)
    key = 'admit', *states.shape(state), one.tokens_BT.shape, allowed_W is None
    given = weights, one, self._put(np.int32(row)), self._allowed(allowed_W)
    return self._together(key, self._join, *given, state=state)

  def opened(self, slots: int) -> PyTree:
    """The cache of one row, for a prompt that is read piece by piece."""
    return self._together(('opened', slots), self._open, slots=slots)

  def read(
    self, weights: Weights, cache: PyTree, piece: Sequence[int], begun: int
  ) -> tuple[PyTree, jax.Array]:
    """Reads a piece of a prompt.

    Args:
      weights: as for `tokens`.
      cache: of `opened`, or as it was returned. It stays as it is, so that several prompts may go
        on from the same.
      piece: 1 to `PIECE` ids.
      begun: how many tokens of the prompt, or of another that began alike, are read from the cache
        before them.

    Returns:
      The cache with them in it, and the logits after the last of them, [1, V].
    """
    if not self.reads_pieces or not 0 < len(piece) <= PIECE:
      raise ValueError(f'a piece of {len(piece)} tokens must have 1 to {PIECE}.')
    length = self._piece_length(len(piece))
    tokens_1T = np.zeros((1, length), np.int32)
    tokens_1T[0, : len(piece)] = piece
    numbers = np.array([len(piece), begun], np.int32)
    given = self._put((tokens_1T, numbers))
    return self._together(('piece', length), self._piece, weights, cache, *given)

  def enter(
    self,
    state: State,
    row: int,
    cache: PyTree,
    logits_1V: jax.Array,
    prompt: Sequence[int],
    sampling: Sampling,
    number: int = 0,
    eos_ids: Sequence[int] = (),
    allowed_W: np.ndarray | None = None,
  ) -> tuple[State, jax.Array]:
    """As `admit`, of a prompt that is read: `cache` and `logits_1V` are those of its last piece."""
    self._check_row(state, row, prompt, sampling)
    history_1T = np.zeros((1, state.slots), np.int32)
    history_1T[0, : len(prompt)] = prompt
    chosen = numbers([sampling], [number], [len(prompt)], eos_ids)
    one = self._put(states.Prompts(history_1T, np.array([len(prompt)], np.int32), chosen))
    key = 'enter', *states.shape(state), len(eos_ids), allowed_W is None
    given = cache, logits_1V, one, self._put(np.int32(row)), self._allowed(allowed_W)
    return self._together(key, self._enter, *given, state=state)

  def _check_row(self, state: State, row: int, prompt: Sequence[int], sampling: Sampling) -> None:
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

  def step(
    self, weights: Weights, state: State, allowed_BW: np.ndarray | jax.Array | None = None
  ) -> tuple[State, jax.Array]:
    """Advances all rows by one token.

    Args:
      weights: as for `tokens`.
      state: of `empty`, or as it was returned.
      allowed_BW: uint32, which tokens each row may have next: bit i of word w says it of token
        32 w + i (`sampling.words`). None for any. `allowing` puts one that is used again and again
        where it is needed.

    Returns:
      The state, whose memory is used again, and the new tokens, [B] int32, whole on each device.
    """
    key = 'step', *states.shape(state), allowed_BW is None
    if not isinstance(allowed_BW, jax.Array):
      allowed_BW = self._put(allowed_BW)
    return self._together(key, self._next, weights, allowed_BW, state=state)

  def allowing(self, allowed_BW: np.ndarray) -> jax.Array:
    """What `step` takes, on the devices."""
    return jax.device_put(allowed_BW) if self._layout is None else self._put(allowed_BW)

  def likely(self, state: State, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities by the model's own logits, at temperature 1: those of the newest token of
    each row, [B]; and the ids and values of the `most` likeliest tokens there, [B, most] each.

    Args:
      state: of an `empty` that keeps logits.
      most: how many.
    """
    given = state.logits_BV, state.ids_B
    return self._together(
      ('likely', *states.shape(state), most), self._most_likely, *given, most=most
    )

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
  ) -> states.Prompts:
    """Prompts, filled up to a whole batch that the mesh divides, on it."""
    shards = 1 if self._layout is None else sharding.row_shards(self._layout.mesh)
    fill = _rounded_rows(len(prompts), shards) - len(prompts)
    lengths = [*map(len, prompts), *[1] * fill]
    tokens_BT = np.zeros((len(lengths), min(_rounded(max(lengths)), self._longest)), np.int32)
    for row, prompt in enumerate(prompts):
      tokens_BT[row, : len(prompt)] = prompt
    begun = [*map(self.begun, prompts), *[1] * fill]
    chosen = numbers([*samplings, *[GREEDY] * fill], [*rows, *[0] * fill], begun, eos_ids)
    return self._put(
      states.Prompts(tokens_BT, np.array(lengths, np.int32), chosen), by_row=shards > 1
    )

  def _row_tokens(
    self,
    weights: Weights,
    batch: states.Prompts,
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
    batch: states.Prompts,
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

  def _prefilled(self, weights, batch, *, slots) -> tuple[State, jax.Array]:
    """The state of these prompts alone, and the first new token of each row."""
    source = batch.tokens_BT.shape[1]
    cache, lengths_B, logits_BV, history_BT = self._read(weights, batch, slots, source)
    state = State(cache, lengths_B, lengths_B, history_BT, batch.numbers, slots, source)
    return states.chosen(state, logits_BV)

  def _advanced(self, weights, allowed_BW=None, *, state) -> tuple[State, jax.Array]:
    cache, logits_BV = self._read_newest(weights, state.ids_B, state.lengths_B, state.cache)
    state = state.replace(cache=cache, lengths_B=state.lengths_B + 1)
    return states.chosen(state, logits_BV, allowed_BW)

  def _joined(self, weights, one, row, allowed_1W, *, state) -> tuple[State, jax.Array]:
    """The state with one prompt in a row."""
    cache, lengths_B, logits_BV, history_BT = self._read(weights, one, state.slots, state.source)
    one = one.replace(tokens_BT=history_BT, lengths_B=lengths_B)
    # Behind it stand rows that fill it up to what the mesh divides.
    cache, logits_1V, one = jax.tree.map(lambda x: x[:1], (cache, logits_BV, one))
    return self._entered(cache, logits_1V, one, row, allowed_1W, state=state)

  def _entered(self, cache, logits_1V, one, row, allowed_1W, *, state) -> tuple[State, jax.Array]:
    """The state with one prompt that was read in a row."""
    new = State(
      cache=cache,
      ids_B=one.lengths_B,
      lengths_B=one.lengths_B,
      history_BT=one.tokens_BT,
      numbers=one.numbers,
      slots=state.slots,
      source=state.source,
      logits_BV=None if state.logits_BV is None else logits_1V,
    )
    new, ids_1 = states.chosen(new, logits_1V, allowed_1W)
    return states.with_row(state, new, row), ids_1[0]

  def _opened(self, *, slots) -> PyTree:
    return forward.laid_out(self._forward.empty_cache(1, slots))

  def _read_piece(self, weights, cache, tokens_1T, numbers) -> tuple[PyTree, jax.Array]:
    length, begun = numbers
    rows = states.document_rows(tokens_1T, length[None])
    rows['positions'] += begun
    cached_1T = jnp.full_like(tokens_1T, begun)
    hidden_1TD, cache = self._forward(weights, *rows.values(), cache, cached_BT=cached_1T)
    last_1D = jax.lax.dynamic_index_in_dim(hidden_1TD, length - 1, axis=1, keepdims=False)
    return forward.laid_out(cache), self._forward.logits(weights, last_1D)

  def _likely(self, logits_BV, ids_B, *, most) -> tuple[jax.Array, jax.Array, jax.Array]:
    log_BV = jax.nn.log_softmax(logits_BV)
    values_BM, ids_BM = jax.lax.top_k(log_BV, min(most, log_BV.shape[1]))
    own_B = jnp.take_along_axis(log_BV, ids_B[:, None], axis=1)[:, 0]
    return tuple(sharding.constrain(x, *[None] * x.ndim) for x in (own_B, ids_BM, values_BM))

  def _blanks(self, *, rows, slots, source, logits=False) -> State:
    dtype, V = self._model.options.accumulation_dtype, self._model.vocab_size
    return states.laid_out(
      State(
        cache=self._forward.empty_cache(rows, slots, source),
        ids_B=jnp.zeros(rows, jnp.int32),
        lengths_B=jnp.zeros(rows, jnp.int32),
        history_BT=jnp.zeros((rows, slots), jnp.int32),
        numbers=jax.tree.map(jnp.asarray, numbers([GREEDY] * rows, [0] * rows, [1] * rows)),
        slots=slots,
        source=source,
        logits_BV=jnp.zeros((rows, V), dtype) if logits else None,
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
    rows, B = states.document_rows(batch.tokens_BT, batch.lengths_B), len(batch.lengths_B)
    cache, beside = self._forward.empty_cache(B, slots, source), None
    open_BT = rows['segments'] if self._opens else None
    if self.reads_source:
      begin_BT = jnp.broadcast_to(jnp.array(self._begin, jnp.int32), (B, len(self._begin)))
      rows, beside = states.document_rows(begin_BT, jnp.full(B, len(self._begin))), rows
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

  def _piece_length(self, tokens: int) -> int:
    """A power of two: few lengths are compiled for."""
    return min(max(SHORTEST, 1 << (tokens - 1).bit_length()), PIECE, self._longest)

  def _allowed(self, allowed_W: np.ndarray | None) -> Any:
    return None if allowed_W is None else self._put(allowed_W[None])

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


def _rounded(length: int) -> int:
  """At least `length`, and at most an eighth more, or to the next multiple of `SHORTEST`: few
  lengths are compiled for.
  """
  step = max(SHORTEST, 1 << max((length - 1).bit_length() - 4, 0))
  return -(-length // step) * step


def _rounded_rows(rows: int, shards: int) -> int:
  """A power of two times `shards` that is at least `rows`."""
  return shards << (-(-rows // shards) - 1).bit_length()
