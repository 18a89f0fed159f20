"""Texts that are written side by side: a prompt joins the batch at a free row and leaves when it is
done, while the other rows go on (continuous batching, as Orca, Yu et al. 2022, OSDI).

All rows are of one compiled step, whether they are taken or not, so a text is the same alone and in
any company. Prompts are read by one compiled program for each of a few lengths.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging

from llm_jax.core.contracts import Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.generation.completion import Completion
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling
from llm_jax.serving.batches import Full

STOP, LENGTH, ERROR = 'stop', 'length', 'error'  # why a text is over

Tell = Callable[[str, str | None], None]


@dataclasses.dataclass
class Order:
  """A text that is to be written.

  Attributes:
    prompt: ids.
    sampling: how its tokens are chosen; no beam search.
    ends: ids that end it.
    stop: strings before which it ends.
    number: what is drawn depends on it, beside the seed.
    tell: called, in the writer's thread, with each piece of the text, and once, with the last one,
      with why it is over.
    cancelled: whether nobody wants it any more.
    tokens: how many are written.
  """

  prompt: Sequence[int]
  sampling: Sampling
  ends: Sequence[int]
  tell: Tell
  stop: Sequence[str] = ()
  number: int = 0
  cancelled: bool = False
  tokens: int = 0


class Writer:
  """Writes in a thread of its own.

  Args:
    generator: of the model.
    weights: as the generator makes them.
    tokenizer: spells the tokens.
    rows: texts that are written at once.
    slots: tokens of a prompt and of what is written, together; of an encoder-decoder each of both.
    waiting: how many orders may wait for a row.
  """

  def __init__(
    self,
    generator: Generator,
    weights: PyTree,
    tokenizer: Tokenizer,
    rows: int,
    slots: int,
    waiting: int,
  ):
    self._generator, self._weights, self._tokenizer = generator, weights, tokenizer
    self._slots = slots
    self._orders: list[Order | None] = [None] * rows
    self._texts: list[Completion | None] = [None] * rows
    self._queue: queue.Queue[Order | None] = queue.Queue(waiting)
    self._closed, self._over = threading.Event(), False
    self._state = self._empty()
    self._thread = threading.Thread(target=self._work, name='writing', daemon=True)

  def warm(self) -> None:
    """Compiles all that any order will need."""
    greedy = Sampling(max_new_tokens=1, temperature=0.0)
    for length in self._generator.prompt_lengths(self._slots):
      prompt = [0] * min(length, self._slots - (0 if self._generator.reads_source else 1))
      self._admit(0, Order(prompt, greedy, (), lambda *_: None))
    self._state, _ = self._generator.step(self._weights, self._state)
    self._state = self._empty()

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
    try:
      self._queue.put_nowait(order)
    except queue.Full:
      raise Full from None

  @property
  def waiting(self) -> int:
    """Orders that have no row yet."""
    return self._queue.qsize()

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
    return self._generator.empty(len(self._orders), self._slots, source)

  def _work(self) -> None:
    while True:
      for row, order in enumerate(self._orders):
        if order is not None and order.cancelled:
          self._orders[row] = None
      self._enter()
      if self.writing:
        self._guarded(self._step)
      elif self._over:
        return

  def _enter(self) -> None:
    """Gives a free row to the next order; waits for one where no row is taken.

    No more than one prompt is read between two steps: those who are being written to wait for it.
    """
    free = [row for row, order in enumerate(self._orders) if order is None]
    while free and not self._over:
      try:
        order = self._queue.get(block=not self.writing)
      except queue.Empty:
        return
      if order is None:
        self._over = True
      elif not order.cancelled:
        self._guarded(self._begin, free[0], order)
        return

  def _begin(self, row: int, order: Order) -> None:
    self._orders[row] = order
    begun = () if self._generator.reads_source else order.prompt
    self._texts[row] = Completion(self._tokenizer, begun, order.stop)
    self._said(row, int(self._admit(row, order)))

  def _admit(self, row: int, order: Order) -> jax.Array:
    given = order.prompt, order.sampling, order.number, order.ends
    self._state, first = self._generator.admit(self._weights, self._state, row, *given)
    return first

  def _step(self) -> None:
    self._state, ids = self._generator.step(self._weights, self._state)
    for row, token in enumerate(jax.device_get(ids)):
      if self._orders[row] is not None:
        self._said(row, int(token))

  def _said(self, row: int, token: int) -> None:
    """Passes on what a row's newest token adds to its text."""
    order, text = self._orders[row], self._texts[row]
    order.tokens += 1
    piece, reason = text.add(token), None
    if text.over or token in order.ends:
      reason = STOP
    elif order.tokens == order.sampling.max_new_tokens:
      reason = LENGTH
    if reason is not None:
      piece += text.finish()
      self._orders[row] = None
    if piece or reason:
      order.tell(piece, reason)

  def _guarded(self, do: Callable[..., None], *args: Any) -> None:
    """Where a step fails, all that it was for are told so, and the batch begins anew."""
    try:
      do(*args)
    except Exception:
      logging.exception('A step of writing failed; %d texts are lost.', self.writing)
      for row, order in enumerate(self._orders):
        self._orders[row] = None
        if order is not None:
          order.tell('', ERROR)
      self._state = self._empty()
