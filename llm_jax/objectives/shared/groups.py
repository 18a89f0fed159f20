"""Rows of groups of texts that belong together: an anchor and what is like it, a question and its
candidates. A group stands in one row, each of its texts, or pairs of texts, in a segment of its
own; several groups share a row.
"""

from collections.abc import Sequence

import numpy as np
from absl import logging

from llm_jax.core.contracts import Documents, Example
from llm_jax.data import pairs
from llm_jax.data.pairs import Frame
from llm_jax.objectives.shared.text_rows import fit, plan, slots


class GroupRows:
  """A plan of which groups share a row. A group that is longer than a row loses tokens of its
  longest texts.

  A row has, beside what `data.pairs.packed` gives, `group` [G] int32, the number of the group that
  a text is of, from 1, and `member` [G] int32, its number in the group, from 0; both 0 where there
  is no text.

  Args:
    documents: a group each; `pieces` says which texts.
    seq_len: T.
    frame: the special tokens around texts.
    name: of the objective, for messages.
    counts: [documents], how many texts each group has.
    first: [texts], tokens of each text of all groups, one after the other.
    second: likewise of the second texts, where texts are pairs.
    alone: one group per row.

  Attributes:
    cut: how many groups are longer than a row.

  Raises:
    ValueError: a group has no text, or more than a row takes, naming the document.
  """

  def __init__(
    self,
    documents: Documents,
    seq_len: int,
    frame: Frame,
    name: str,
    counts: np.ndarray,
    first: np.ndarray,
    second: np.ndarray | None = None,
    alone: bool = False,
  ):
    self.documents, self.seq_len, self.frame, self.name = documents, seq_len, frame, name
    self.counts, self.slots = np.asarray(counts), max(2, slots(seq_len))
    special = frame.single if second is None else frame.double
    self._check(special)
    self.bounds = np.append(0, np.cumsum(self.counts))
    given = first if second is None else first + second
    sizes = np.maximum(given + special, 1)
    totals = self._sums(sizes)
    room = np.repeat(self._levels(sizes, totals), self.counts)
    self.first, self.second = fit(first, second, room, special)
    kept = self.first if second is None else self.first + self.second
    self.lost = given - kept
    self.empty = given == 0
    self.cut = int(np.count_nonzero(totals > seq_len))
    self.sizes = self._sums(np.maximum(kept + special, 1))
    most = 1 if alone else max(1, self.slots // int(np.max(self.counts, initial=1)))
    self.plan = plan(self.sizes, seq_len, most)

  def __len__(self) -> int:
    return len(self.plan)

  def pieces(self, document: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """The ids of each text of a group, whole; of a pair both."""
    raise NotImplementedError

  def groups(self, index: int) -> list[int]:
    """The documents of one row, in the order in which they stand in it."""
    return [document for document, _, _ in self.plan[index]]

  def texts(self, index: int) -> list[int]:
    """The documents of one row, each as often as it has texts."""
    groups = self.groups(index)
    return np.repeat(groups, self.counts[groups]).tolist() if groups else []

  def example(self, index: int, rng: np.random.Generator) -> Example:
    """A row."""
    del rng
    pieces, group, member = [], np.zeros(self.slots, np.int32), np.zeros(self.slots, np.int32)
    for number, document in enumerate(self.groups(index), 1):
      found, start = self._cut(document), len(pieces)
      pieces += found
      group[start : len(pieces)] = number
      member[start : len(pieces)] = np.arange(len(found))
    row = pairs.packed(pieces, self.seq_len, self.frame, self.slots)
    return row | {'group': group, 'member': member}

  def log(self) -> None:
    """Says how full the rows are, what is cut off, and of texts that are empty."""
    if not len(self.counts):
      return
    empty, texts = np.flatnonzero(self.empty), int(self.bounds[-1])
    if len(empty):
      logging.warning(
        '%s: %d of %d texts are empty, the first in %s.',
        self.name,
        len(empty),
        texts,
        self.documents.where(int(np.searchsorted(self.bounds, empty[0], side='right')) - 1),
      )
    if self.cut:
      logging.warning(
        '%s: %d of %d groups are longer than seq_len=%d allows; their longest texts lose %d '
        'tokens.',
        self.name,
        self.cut,
        len(self.counts),
        self.seq_len,
        self.lost.sum(),
      )
    logging.info(
      '%s: %d groups of %d texts in %d rows of %d tokens, %.1f%% of which are used. A step of '
      'batch_size rows learns from %.2f times as many groups.',
      self.name,
      len(self.counts),
      texts,
      len(self),
      self.seq_len,
      100 * self.sizes.sum() / (len(self) * self.seq_len),
      len(self.counts) / len(self),
    )

  def _cut(self, document: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
    found = []
    for text, (first, second) in enumerate(self.pieces(document), int(self.bounds[document])):
      first = first[: self.first[text]]
      found.append((first, None if second is None else second[: self.second[text]]))
    return found

  def _check(self, special: int) -> None:
    for wrong, problem in (
      (self.counts < 1, 'has no text'),
      (self.counts > self.slots, f'has more texts than the {self.slots} that a row takes'),
      (self.counts * (special + 1) > self.seq_len, 'has more texts than a row has room for'),
    ):
      if np.any(wrong):
        document = int(np.argmax(wrong))
        raise ValueError(
          f'{self.name}: the group of {self.documents.where(document)} {problem}: '
          f'{self.counts[document]} texts, seq_len={self.seq_len}. Use a longer seq_len, or give '
          'fewer texts.'
        )

  def _sums(self, values: np.ndarray) -> np.ndarray:
    """[documents]: the sum over the texts of each."""
    if not len(self.counts):
      return np.zeros(0, np.int64)
    return np.add.reduceat(values, self.bounds[:-1])

  def _levels(self, sizes: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """[documents]: the most tokens that a text of each may have, so that the group fits."""
    levels = np.full(len(self.counts), self.seq_len)
    for document in np.flatnonzero(totals > self.seq_len):
      start, stop = self.bounds[document : document + 2]
      levels[document] = level(sizes[start:stop].tolist(), self.seq_len)
    return levels


def level(sizes: Sequence[int], room: int) -> int:
  """The highest number to which all `sizes` can be cut so that they add up to at most `room`.

  Example:
    >>> level([2, 9, 7], room=12)
    5
  """
  left = room
  for number, size in enumerate(sorted(sizes)):
    share = left // (len(sizes) - number)
    if size > share:
      return share
    left -= size
  return max(sizes)
