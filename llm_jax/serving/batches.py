"""Requests that wait are answered together, by one call of the model for all that are there."""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Full(Exception):
  """So many requests wait already that no more are taken."""


class Waiting(queue.Queue):
  """A queue of things with `since`, when they came, and `wanted`, whether anybody waits for them;
  None in it is nothing that waits.
  """

  def offer(self, one: Any) -> None:
    """Takes something, if need be in the place of what nobody wants any more; raises Full."""
    with self.mutex:
      if len(self.queue) >= self.maxsize:
        wanted = [other for other in self.queue if other is None or other.wanted]
        self.queue.clear()
        self.queue.extend(wanted)
    try:
      self.put_nowait(one)
    except queue.Full:
      raise Full from None

  @property
  def oldest(self) -> float:
    """Seconds that the first has waited; 0 where none waits."""
    with self.mutex:
      first = self.queue[0] if self.queue else None
    return 0.0 if first is None else time.monotonic() - first.since


class _Request(NamedTuple):
  """What is asked at once, where the answers go, when it came, and what is called when its batch
  begins.
  """

  items: list[Any]
  future: concurrent.futures.Future
  since: float
  begun: Callable[[], None]

  @property
  def wanted(self) -> bool:
    """Whether somebody still waits for the answers."""
    return not self.future.cancelled()


class Batches:
  """Answers requests in a thread of its own.

  A request whose answer is no longer wanted is cancelled by its future, and costs nothing if its
  batch has not begun. Where the call for a batch fails, its requests are asked one by one, so that
  none fails for another.

  Args:
    run: items to as many answers, in their order. An answer must not depend on what stands beside
      its item.
    most: items after which a batch does not wait for more.
    wait: seconds that the first request of a batch waits for others.
    waiting: how many requests may wait.

  Attributes:
    most: as given.
    limit: how many requests may wait.
    batches, items: how many calls were made, and of how many items.
  """

  def __init__(
    self, run: Callable[[list[Any]], Sequence[Any]], most: int, wait: float, waiting: int
  ):
    self._run, self.most, self._wait, self.limit = run, most, wait, waiting
    self.batches = self.items = 0
    self._queue = Waiting(waiting)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._work, name='answering', daemon=True)
    self._thread.start()

  def submit(
    self, items: Sequence[Any], begun: Callable[[], None] = lambda: None
  ) -> concurrent.futures.Future:
    """A future of the answers to these items.

    Args:
      items: what is asked.
      begun: called, in another thread, when their batch begins.

    Raises:
      Full: too many requests wait, or none are taken any more.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()
    if self._closed.is_set():
      raise Full
    self._queue.offer(_Request(list(items), future, time.monotonic(), begun))
    return future

  @property
  def waiting(self) -> int:
    """Requests that no batch has yet."""
    return self._queue.qsize()

  @property
  def oldest(self) -> float:
    """Seconds that the first of them has waited."""
    return self._queue.oldest

  def close(self) -> None:
    """Answers what waits, and takes no more."""
    self._closed.set()
    self._queue.put(None)
    self._thread.join()

  def _work(self) -> None:
    while (first := self._queue.get()) is not None:
      batch, last = self._gathered(first)
      wanted = [one for one in batch if one.future.set_running_or_notify_cancel()]
      for one in wanted:
        one.begun()
      if wanted:
        self._answer(wanted)
      if last:
        return

  def _gathered(self, first: _Request) -> tuple[list[_Request], bool]:
    """The requests of a batch, and whether it is the last one."""
    batch, until = [first], time.monotonic() + self._wait
    while sum(len(one.items) for one in batch) < self.most:
      try:
        other = self._queue.get(timeout=max(until - time.monotonic(), 0))
      except queue.Empty:
        return batch, False
      if other is None:
        return batch, True
      batch.append(other)
    return batch, False

  def _answer(self, batch: list[_Request]) -> None:
    items = [item for one in batch for item in one.items]
    self.batches, self.items = self.batches + 1, self.items + len(items)
    try:
      found = list(self._run(items))
    except Exception as error:  # whatever it is, it is the answer
      if len(batch) == 1:
        batch[0].future.set_exception(error)
      else:
        for one in batch:
          self._answer([one])
      return
    for one in batch:
      one.future.set_result(found[: len(one.items)])
      found = found[len(one.items) :]
