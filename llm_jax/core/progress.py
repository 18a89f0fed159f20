"""How far work of some time is: a bar on a terminal, elsewhere a line of the log now and then;
nothing where it is over in a moment.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm
from absl import logging

MOMENT, LOG_SECONDS = 2, 10
_Item = TypeVar('_Item')


class Progress:
  """How far one piece of work is; a context.

  Args:
    what: is done, for people: 'tokenizing'.
    total: how many units there are.
    unit: what is counted: 'documents'.
    shown: whether this process shows anything.
  """

  def __init__(self, what: str, total: int, unit: str, shown: bool = True):
    self._what, self._total, self._unit, self._shown = what, total, unit, shown
    self._done, self._began = 0, time.monotonic()
    self._logged = self._began
    hidden = not (shown and sys.stderr.isatty())
    self._bar = tqdm.tqdm(
      total=total, desc=what, unit=f' {unit}', delay=MOMENT, leave=False, disable=hidden
    )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.close()

  def advance(self, count: int = 1) -> None:
    """Counts what was done since the last call."""
    self._done += count
    self._bar.update(count)
    now = time.monotonic()
    if not self._shown or not self._bar.disable or now - self._logged < LOG_SECONDS:
      return
    self._logged = now
    left = (now - self._began) / self._done * (self._total - self._done)
    logging.info(
      '%s: %d of %d %s, %.0f s left.', self._what, self._done, self._total, self._unit, left
    )


def shown(
  items: Iterable[_Item], what: str, total: int, unit: str, primary: bool = True
) -> Iterator[_Item]:
  """The same items, with their progress; `primary`: whether this process shows it."""
  with Progress(what, total, unit, primary) as progress:
    for item in items:
      yield item
      progress.advance()
