"""Texts that are written side by side: a prompt joins the batch at a free row and leaves when it is
done, while the other rows go on (continuous batching, as Orca, Yu et al. 2022, OSDI).

All rows are of one compiled step, whether they are taken or not, so a text is the same alone and in
any company. Prompts are read in pieces between the steps of the others, by one compiled program for
each of a few lengths, so that a long one keeps nobody waiting; those that begin alike share what
was read. Where all of a prompt is seen at once (encoder-decoders, prefix LMs) it is read whole.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from llm_jax.core import faults
from llm_jax.core.contracts import Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.generation.completion import Completion
from llm_jax.generation.decoding import PIECE, Generator
from llm_jax.generation.guides import Guide
from llm_jax.generation.sampling import Sampling, words
from llm_jax.serving.batches import Full, Waiting
from llm_jax.serving.prefixes import Prefixes

STOP, LENGTH = 'stop', 'length'  # why a text is over
ERROR, UNGUIDED = 'error', 'unguided'  # why it has failed: here, and for its guide
LIKELY = 20  # tokens whose probabilities an order may ask for


class Likely(NamedTuple):
  """A token that was written.

  Attributes:
    token: its id.
    logprob: the logarithm of its probability.
    others: the likeliest ids there and their logarithms, the best first.
  """

  token: int
  logprob: float
  others: list[tuple[int, float]]


Tell = Callable[[str, str | None, Sequence[Likely]], None]


@dataclasses.dataclass(eq=False)
class Order:
  """A text that is to be written.

  Attributes:
    prompt: ids.
    sampling: how its tokens are chosen; no beam search.
    ends: ids that end it.
    stop: strings before which it ends.
    number: what is drawn depends on it, beside the seed.
    tell: called, in the writer's thread, with each piece of the text, why it is over where it is
      the last one, and the tokens since the piece before, if they are asked for.
    likely: how many of the likeliest tokens are said at each; None for no probabilities.
    guide: what the text may be; None for anything.
    cancelled: whether nobody wants it any more.
    tokens: how many are written.
    since: when it came.
    begun: when it began to be read; None before. Both by `time.monotonic`.
  """

  prompt: Sequence[int]
  sampling: Sampling
  ends: Sequence[int]
  tell: Tell
  stop: Sequence[str] = ()
  number: int = 0
  likely: int | None = None
  guide: Guide | None = None
  cancelled: bool = False
  tokens: int = 0
  since: float = dataclasses.field(default_factory=time.monotonic)
  begun: float | None = None

  @property
  def wanted(self) -> bool:
    """Whether somebody still waits for it."""
    return not self.cancelled


class Writer:
  """Writes in a thread of its own.

  Args:
    generator: of the model.
    weights: as the generator makes them.
    tokenizer: spells the tokens.
    rows: texts that are written at once.
    slots: tokens of a prompt and of what is written, together; of an encoder-decoder each of both.
    waiting: how many orders may wait for a row.
    prefixes: how many prompts are remembered, for others that begin alike.

  Attributes:
    reused: tokens of prompts that did not have to be read.
    rows: as given.
    limit: how many orders may wait.
  """

  def __init__(
    self,
    generator: Generator,
    weights: PyTree,
    tokenizer: Tokenizer,
    rows: int,
    slots: int,
    waiting: int,
    prefixes: int = 0,
  ):
    self._generator, self._weights, self._tokenizer = generator, weights, tokenizer
    self._slots, self.rows, self.limit = slots, rows, waiting
    self._orders: list[Order | None] = [None] * rows
    self._texts: list[_Text | None] = [None] * rows
    self._queue = Waiting(waiting)
    self._closed, self._over = threading.Event(), False
    self._prefixes, self.reused = Prefixes(prefixes, PIECE, generator.forgets(slots)), 0
    self._reading: _Reading | None = None
    self._any_W = np.full(words(generator.vocab_size), 2**32 - 1, np.uint32)
    self._any_BW = generator.allowing(np.tile(self._any_W, (rows, 1)))
    self._state = self._empty()
    self._thread = threading.Thread(target=self._work, name='writing', daemon=True)

  def warm(self) -> None:
    """Compiles all that any order will need."""
    generator, greedy = self._generator, Sampling(max_new_tokens=1, temperature=0.0)
    pieces = generator.reads_pieces
    given = generator.piece_lengths if pieces else generator.prompt_lengths
    for length in given(self._slots):
      prompt = [0] * min(length, self._slots - (0 if generator.reads_source else 1))
      reading = _Reading(
        Order(prompt, greedy, (), lambda *_: None), self._opened() if pieces else None
      )
      while not self._read(reading):
        pass
      self._entered(0, reading)
    self._advance()
    jax.device_get(self._generator.likely(self._state, LIKELY))
    self._state = self._empty()

  def differs(self) -> bool:
    """Whether a text has other probabilities beside others than alone; ask it before `start`."""
    few = Sampling(max_new_tokens=3, temperature=0.0)
    lengths = [max(1, min(length, self._slots - 3)) for length in (3, 9, 5)]
    orders = [Order([1] * length, few, (), lambda *_: None) for length in lengths]

    def logits(company: Sequence[Order]) -> np.ndarray:
      self._state = self._empty()
      for row, order in enumerate([*company, orders[0]]):
        reading = self._begun(order)
        while not self._read(reading):
          pass
        self._entered(row, reading)
      for _ in range(2):
        self._advance()
      return np.asarray(self._state.logits_BV)[len(company)]

    differs = not np.array_equal(logits(()), logits(orders[1 : self.rows]))
    self._state = self._empty()
    return differs

  def start(self) -> None:
    """Begins to write."""
    self._thread.start()

  def check(self, order: Order) -> None:
    """Raises ValueError for an order that no row can take."""
    if order.sampling.beams > 1:
      raise ValueError('beam search runs whole batches, and rows here come and go; leave it out.')
    self._generator.check([order.prompt], [order.sampling])
    begun = self._generator.begun(order.prompt)
    longest = max(begun + order.sampling.max_new_tokens, len(order.prompt))
    if longest > self._slots:
      raise ValueError(
        f'a prompt of {len(order.prompt)} tokens and {order.sampling.max_new_tokens} new ones need '
        f'{longest} positions, and a row here has {self._slots}; ask for less.'
      )

  def room(self, prompt: Sequence[int]) -> int:
    """How many tokens may be written behind a prompt."""
    return min(self._slots - self._generator.begun(prompt), self._generator.room(prompt))

  def submit(self, order: Order) -> None:
    """Takes an order.

    Raises:
      ValueError: no row can take it.
      Full: too many wait, or none are taken any more.
    """
    self.check(order)
    if self._closed.is_set():
      raise Full
    self._queue.offer(order)

  @property
  def waiting(self) -> int:
    """Orders that have no row yet."""
    return self._queue.qsize()

  @property
  def oldest(self) -> float:
    """Seconds that the first of them has waited."""
    return self._queue.oldest

  @property
  def writing(self) -> int:
    """Rows that are taken."""
    return sum(order is not None for order in self._orders)

  def close(self) -> None:
    """Writes what was ordered to its end, and takes no more."""
    self._closed.set()
    if self._thread.is_alive():
      self._queue.put(None)
      self._thread.join()

  def _empty(self):
    source = self._slots if self._generator.reads_source else 0
    return self._generator.empty(len(self._orders), self._slots, source, logits=True)

  def _opened(self) -> PyTree:
    return self._generator.opened(self._slots)

  def _work(self) -> None:
    while True:
      for row, order in enumerate(self._orders):
        if order is not None and order.cancelled:
          self._orders[row] = None
      self._enter()
      if self.writing:
        self._guarded(self._step)
      elif self._over and self._reading is None:
        return

  def _enter(self) -> None:
    """Reads on for the next order, which gets a free row when all of it is read; waits for one
    where nothing else is to be done.

    No more than one piece is read between two steps: those who are being written to wait for it.
    """
    if self._reading is not None and self._reading.order.cancelled:
      self._reading = None
    while self._reading is None and not self._over and None in self._orders:
      try:
        order = self._queue.get(block=not self.writing)
      except queue.Empty:
        return
      if order is None:
        self._over = True
      elif not order.cancelled:
        order.begun = time.monotonic()
        self._reading = self._begun(order)
    if self._reading is not None:
      self._guarded(self._read_on)

  def _begun(self, order: Order) -> '_Reading':
    """An order of which nothing is read but what another began with as well."""
    if not self._generator.reads_pieces:
      return _Reading(order, None)
    cache, length = self._prefixes.find(order.prompt)
    self.reused += length
    return _Reading(order, self._opened() if cache is None else cache, length)

  def _read_on(self) -> None:
    reading = self._reading
    if self._read(reading):
      self._begin(self._orders.index(None), reading)
      self._reading = None

  def _read(self, reading: '_Reading') -> bool:
    """Reads a piece of a prompt; returns whether it was the last one."""
    if reading.cache is None:
      return True  # it is read when it enters
    prompt, begun = reading.order.prompt, reading.length
    piece = prompt[begun : begun + PIECE]
    found = self._generator.read(self._weights, reading.cache, piece, begun)
    (reading.cache, reading.logits_1V), reading.length = found, begun + len(piece)
    whole = len(prompt) - len(prompt) % PIECE
    if reading.length == whole:
      self._prefixes.keep(prompt[:whole], reading.cache)
    return reading.length == len(prompt)

  def _begin(self, row: int, reading: '_Reading') -> None:
    order = reading.order
    self._orders[row] = order
    known = () if self._generator.reads_source else order.prompt
    self._texts[row] = _Text(Completion(self._tokenizer, known, order.stop))
    first = int(self._entered(row, reading))
    self._said(row, first, self._likely() if order.likely is not None else None)

  def _entered(self, row: int, reading: '_Reading') -> jax.Array:
    """Puts a prompt into a row; returns the first token of its text."""
    order, generator = reading.order, self._generator
    given = order.prompt, order.sampling, order.number, order.ends
    allowed_W = self._any_W if order.guide is None else order.guide.allowed_W
    if reading.cache is None:
      admitted = generator.admit(self._weights, self._state, row, *given, allowed_W)
    else:
      read = reading.cache, reading.logits_1V
      admitted = generator.enter(self._state, row, *read, *given, allowed_W)
    self._state, first = admitted
    return first

  def _step(self) -> None:
    ids = jax.device_get(self._advance())
    asked = any(order is not None and order.likely is not None for order in self._orders)
    likely = self._likely() if asked else None
    for row, token in enumerate(ids):
      if self._orders[row] is not None:
        self._said(row, int(token), likely)

  def _advance(self) -> jax.Array:
    """The next token of each row."""
    guides = [None if order is None else order.guide for order in self._orders]
    allowed_BW = self._any_BW
    if any(guide is not None for guide in guides):
      masks = [self._any_W if guide is None else guide.allowed_W for guide in guides]
      allowed_BW = np.stack(masks)
    self._state, ids = self._generator.step(self._weights, self._state, allowed_BW)
    return ids

  def _likely(self) -> tuple[np.ndarray, ...]:
    return jax.device_get(self._generator.likely(self._state, LIKELY))

  def _said(self, row: int, token: int, likely: tuple[np.ndarray, ...] | None) -> None:
    """Passes on what a row's newest token adds to its text."""
    order, text = self._orders[row], self._texts[row]
    order.tokens += 1
    piece, reason = text.completion.add(token), None
    if order.likely is not None and token not in order.ends:
      text.likely.append(_likely_of(token, order.likely, *(x[row] for x in likely)))
    if text.completion.over or token in order.ends:
      reason = STOP
    elif order.guide is not None:
      reason = _guided(order.guide, token)
    if reason is None and order.tokens == order.sampling.max_new_tokens:
      reason = LENGTH
    if reason is not None:
      piece += text.completion.finish()
      self._orders[row] = None
    if piece or reason:
      order.tell(piece, reason, text.likely)
      text.likely = []

  def _guarded(self, do: Callable[..., None], *args: Any) -> None:
    """Where a step fails, this is said to all that it was for, and the batch begins anew."""
    try:
      do(*args)
    except Exception as error:
      logging.error(
        'A step of writing failed; %d texts are lost. %s', self.writing, faults.described(error)
      )
      lost = [order for order in self._orders if order is not None]
      if self._reading is not None and self._reading.order not in lost:
        lost.append(self._reading.order)
      self._orders, self._reading = [None] * self.rows, None
      for order in lost:
        order.tell('', ERROR, ())
      self._state = self._empty()


@dataclasses.dataclass
class _Reading:
  """A prompt that is read, so much of it; without a cache where it is read at once."""

  order: Order
  cache: PyTree
  length: int = 0
  logits_1V: jax.Array | None = None


@dataclasses.dataclass
class _Text:
  """A text that grows, and those of its tokens that were not passed on."""

  completion: Completion
  likely: list[Likely] = dataclasses.field(default_factory=list)


def _guided(guide: Guide, token: int) -> str | None:
  """Why a text is over with this token, by its guide."""
  try:
    guide.add(token)
  except ValueError:
    return UNGUIDED
  return STOP if guide.over else None


def _likely_of(token: int, most: int, own, ids_M, values_M) -> Likely:
  others = zip(ids_M[:most].tolist(), values_M[:most].tolist(), strict=True)
  return Likely(token, float(own), list(others))
