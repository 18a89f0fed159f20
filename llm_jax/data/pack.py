"""Which pieces of which documents share a row: plans made from lengths alone, and the row that a
list of pieces makes.

A plan covers every token of every document exactly once. `best_fit` is best-fit decreasing
(Johnson, 1974) on documents cut to at most a row, as in Ding et al., 2024, "Fewer Truncations
Improve Language Modeling", https://arxiv.org/abs/2404.10830.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
  """Rows of pieces; row i holds the pieces `offsets[i]` to `offsets[i + 1]` of the flat arrays.

  Attributes:
    document: [pieces] int64, index of the document that each piece is cut from.
    start: [pieces] int64, first token of the piece within its document.
    stop: [pieces] int64, one past its last token.
    offsets: [rows + 1] int64.
  """

  document: np.ndarray
  start: np.ndarray
  stop: np.ndarray
  offsets: np.ndarray

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, index: int) -> list[tuple[int, int, int]]:
    """The pieces (document, start, stop) of one row, in the order in which they stand."""
    index = range(len(self))[index]
    pieces = slice(self.offsets[index], self.offsets[index + 1])
    columns = (self.document, self.start, self.stop)
    return list(zip(*(column[pieces].tolist() for column in columns), strict=True))


def windows(lengths: np.ndarray, capacity: int, overhead: int = 0) -> Plan:
  """Lays documents one after another and cuts wherever a row is full.

  A row whose rest cannot hold one token is closed.

  Args:
    lengths: [documents] integers, tokens of each document; empty documents yield no piece.
    capacity: tokens of a row.
    overhead: special tokens around every piece.

  Raises:
    ValueError: `overhead` leaves no room for a token.

  Example:
    >>> list(windows([5, 2], capacity=4))
    [[(0, 0, 4)], [(0, 4, 5), (1, 0, 2)]]
  """
  room = _room(capacity, overhead)
  lengths = np.asarray(lengths, dtype=np.int64)
  kept = np.flatnonzero(lengths)
  first = []  # tokens of each document's first piece
  opens = []  # whether that piece begins a row
  left = 0  # what is free in the row that is being filled
  for length in lengths[kept].tolist():
    opens.append(left <= overhead)
    if left <= overhead:
      left = capacity
    head = min(length, left - overhead)
    first.append(head)
    tail = length - head
    if tail:
      left = room - ((tail - 1) % room + 1)
    else:
      left -= head + overhead
  document, start, stop = _cut(lengths, kept, np.asarray(first, dtype=np.int64), room)
  begins = (start > 0) | np.asarray(opens, dtype=bool)[np.searchsorted(kept, document)]
  return Plan(document, start, stop, np.append(np.flatnonzero(begins), len(document)))


def best_fit(
  lengths: np.ndarray, capacity: int, overhead: int = 0, most: int | None = None
) -> Plan:
  """Cuts documents longer than a row into full rows, then puts each remaining piece, longest first,
  where least room is left.

  Documents that fit in a row are never cut. A row takes no more than `most` pieces, if that is
  given; the other arguments and errors are those of `windows`.

  Example:
    >>> list(best_fit([1, 3, 4, 2], capacity=4))
    [[(2, 0, 4)], [(0, 0, 1), (1, 0, 3)], [(3, 0, 2)]]
  """
  plan = one_per_row(lengths, capacity, overhead)
  sizes = plan.stop - plan.start
  full = sizes == _room(capacity, overhead)
  rest = np.flatnonzero(~full)
  row = np.empty(len(sizes), dtype=np.int64)
  row[full] = np.arange(full.sum())
  row[rest] = full.sum() + _best_fit_decreasing(sizes[rest] + overhead, capacity, most)
  order = np.argsort(row, kind='stable')
  offsets = np.append(0, np.cumsum(np.bincount(row)))
  return Plan(plan.document[order], plan.start[order], plan.stop[order], offsets)


def best_fit_pairs(
  first: np.ndarray, second: np.ndarray, capacities: tuple[int, int], most: int | None = None
) -> Plan:
  """Puts whole pairs of documents in pairs of rows, longest first, where least room is left: in the
  first of the rows, then in the second.

  Args:
    first: [pairs] integers, tokens of the first document of each, at most capacities[0].
    second: of the second, at most capacities[1].
    capacities: tokens of the first and of the second row.
    most: a row takes no more pairs than this, if it is given.

  Returns:
    A plan in which each piece is a pair, and `start` 0 and `stop` are those of its second document.

  Example:
    >>> list(best_fit_pairs([3, 2, 2], [1, 1, 4], (4, 4)))
    [[(2, 0, 4)], [(0, 0, 1)], [(1, 0, 1)]]
    >>> list(best_fit_pairs([3, 2, 1], [1, 4, 1], (4, 4)))
    [[(1, 0, 4)], [(0, 0, 1), (2, 0, 1)]]
  """
  costs = np.stack([np.asarray(first, np.int64), np.asarray(second, np.int64)], axis=1)
  shares = np.max(costs / np.maximum(capacities, 1), axis=1, initial=0)
  row = np.empty(len(costs), np.int64)
  spaces = _Spaces(capacities, most)
  for pair in np.argsort(-shares, kind='stable').tolist():
    row[pair] = spaces.place(*costs[pair].tolist())
  order = np.argsort(row, kind='stable')
  offsets = np.append(0, np.cumsum(np.bincount(row)))
  return Plan(order, np.zeros(len(order), np.int64), costs[order, 1], offsets)


class _Spaces:
  """Pairs of rows, by the space that is left in both."""

  def __init__(self, capacities: tuple[int, int], most: int | None):
    self._capacities, self._most = capacities, most
    self._waiting: dict[tuple[int, int], list[int]] = {}
    self._seconds = [0] * (capacities[0] + 1)  # by what is left in the first; bits: in the second
    self._firsts = 0  # its bits say which of these are not 0
    self._counts: list[int] = []

  def place(self, first: int, second: int) -> int:
    """The pair of rows that a pair of documents goes into."""
    found = self._tightest(first, second)
    if found is None:
      row, left = len(self._counts), self._capacities
      self._counts.append(0)
    else:
      left, row = found, self._waiting[found].pop()
      if not self._waiting[found]:
        self._mark(*found)
    self._counts[row] += 1
    if self._counts[row] != self._most:
      left = left[0] - first, left[1] - second
      rows = self._waiting.setdefault(left, [])
      if not rows:
        self._mark(*left)
      rows.append(row)
    return row

  def _tightest(self, first: int, second: int) -> tuple[int, int] | None:
    fitting = self._firsts >> first
    while fitting:
      lowest = fitting & -fitting
      a = first + lowest.bit_length() - 1
      if beside := self._seconds[a] >> second:
        return a, second + (beside & -beside).bit_length() - 1
      fitting ^= lowest
    return None

  def _mark(self, first: int, second: int) -> None:
    """Says that a list of rows is no longer empty, or that it is."""
    self._seconds[first] ^= 1 << second
    if self._seconds[first]:
      self._firsts |= 1 << first
    else:
      self._firsts &= ~(1 << first)


def one_per_row(lengths: np.ndarray, capacity: int, overhead: int = 0) -> Plan:
  """Gives each document rows of its own, as many as its length needs. Arguments and errors as for
  `windows`.
  """
  room = _room(capacity, overhead)
  lengths = np.asarray(lengths, dtype=np.int64)
  kept = np.flatnonzero(lengths)
  document, start, stop = _cut(lengths, kept, np.minimum(lengths[kept], room), room)
  return Plan(document, start, stop, np.arange(len(document) + 1))


PACKINGS = {'windows': windows, 'best_fit': best_fit, 'none': one_per_row}


def assemble(pieces: list[np.ndarray], seq_len: int) -> dict[str, np.ndarray]:
  """Concatenates pieces into one zero-padded row.

  Returns:
    `tokens`, `segments` (k + 1 on piece k) and `positions` (from 0 in each piece), each [seq_len]
    int32.

  Raises:
    ValueError: the pieces are longer than the row.

  Example:
    >>> row = assemble([np.array([7, 8, 9]), np.array([5])], seq_len=6)
    >>> row['tokens'].tolist(), row['segments'].tolist(), row['positions'].tolist()
    ([7, 8, 9, 5, 0, 0], [1, 1, 1, 2, 0, 0], [0, 1, 2, 0, 0, 0])
  """
  used = sum(map(len, pieces))
  if used > seq_len:
    raise ValueError(
      f'pieces of {used} tokens do not fit in a row of {seq_len}; plan them with a capacity of at '
      f'most {seq_len}.'
    )
  row = {key: np.zeros(seq_len, dtype=np.int32) for key in ('tokens', 'segments', 'positions')}
  start = 0
  for segment, piece in enumerate(pieces, 1):
    stop = start + len(piece)
    row['tokens'][start:stop] = piece
    row['segments'][start:stop] = segment
    row['positions'][start:stop] = np.arange(len(piece))
    start = stop
  return row


def text_bounds(lengths: Sequence[int], slots: int) -> dict[str, np.ndarray]:
  """Where the texts of a row, which stand one after another from index 0 on, begin and end.

  Args:
    lengths: tokens of each text, at most `slots` texts.
    slots: G.

  Returns:
    `text_firsts` and `text_lasts`, the first and last index of each text, each [G] int32; 0 where
    there is no text.
  """
  row = {key: np.zeros(slots, dtype=np.int32) for key in ('text_firsts', 'text_lasts')}
  ends = np.cumsum(lengths)
  row['text_firsts'][: len(ends)] = ends - lengths
  row['text_lasts'][: len(ends)] = ends - 1
  return row


def _room(capacity: int, overhead: int) -> int:
  if capacity <= overhead:
    raise ValueError(
      f'a row of {capacity} tokens has no room beside the {overhead} special ones of each piece; '
      f'config.seq_len must be at least {overhead + 1}.'
    )
  return capacity - overhead


def _cut(
  lengths: np.ndarray, kept: np.ndarray, first: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(document, start, stop) of all pieces of the documents `kept`: first the number of tokens that
  `first` says, then `room` at a time.
  """
  counts = 1 - (first - lengths[kept]) // room
  document = np.repeat(kept, counts)
  first = np.repeat(first, counts)
  number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
  start = np.where(number == 0, 0, first + (number - 1) * room)
  return document, start, np.minimum(first + number * room, lengths[document])


def _best_fit_decreasing(costs: np.ndarray, capacity: int, most: int | None) -> np.ndarray:
  """[pieces] row of each piece, by the space that is free in the rows so far."""
  rows = np.empty(len(costs), dtype=np.int64)
  pieces = [0] * len(costs)  # of each row
  waiting = [[] for _ in range(capacity + 1)]  # rows by the space that is left in them
  spaces = 0  # its bits say which of these lists hold any
  opened = 0
  order = np.argsort(-costs, kind='stable')
  for piece, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
    fitting = spaces >> cost
    if fitting:
      left = cost + (fitting & -fitting).bit_length() - 1  # the lowest bit: the tightest fit
      row = waiting[left].pop()
      if not waiting[left]:
        spaces ^= 1 << left
    else:
      row, left = opened, capacity
      opened += 1
    rows[piece] = row
    pieces[row] += 1
    if pieces[row] == most:
      continue
    left -= cost
    waiting[left].append(row)
    spaces |= 1 << left
  return rows
