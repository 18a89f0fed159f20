"""Rows of whole texts, or pairs of texts: which share a row, and what is cut from those that are
longer than one.
"""

import dataclasses
from typing import Any

import numpy as np
from absl import logging

from llm_jax.core.contracts import Documents
from llm_jax.data import pack
from llm_jax.data.pairs import Frame

TOKENS_PER_TEXT = 4  # slots are enough for texts of so many on average, special ones included
MOST_TEXTS = 128  # of a row, so that what is kept per slot stays small beside that per token


class TextRows:
  """A plan of which documents share a row.

  Args:
    documents: the texts, the second of a pair as `pair_tokens`.
    seq_len: T.
    slots: G.
    frame: the special tokens around texts.
    name: of the objective, for messages.

  Attributes:
    first: [documents] int64, how many tokens of each text are kept.
    second: likewise of the second texts; None where there are none.
    sizes: [documents] int64, how many tokens each takes in a row, special ones included.
    lost: [documents] int64, how many tokens are cut off.
    cut: how many documents are longer than a row.
    plan: which documents share a row.
  """

  def __init__(
    self, documents: Documents, seq_len: int, slots: int, frame: Frame, name: str = 'classify'
  ):
    self.documents, self.seq_len, self.slots = documents, seq_len, slots
    self.frame, self.name = frame, name
    paired = 'pair_tokens' in documents.names
    first = documents.lengths('tokens')
    second = documents.lengths('pair_tokens') if paired else None
    special = frame.double if paired else frame.single
    self.first, self.second = fit(first, second, seq_len, special)
    self.given = first + second if paired else first
    kept = self.first + self.second if paired else self.first
    self.lost = self.given - kept
    self.cut = int(np.count_nonzero(self.lost))
    self.sizes = np.maximum(kept + special, 1)
    self.plan = plan(self.sizes, seq_len, slots)

  def __len__(self) -> int:
    return len(self.plan)

  def texts(self, index: int) -> list[int]:
    """The documents of one row, in the order in which they stand in it."""
    return [document for document, _, _ in self.plan[index]]

  def ids(self, text: int) -> tuple[np.ndarray, np.ndarray | None]:
    """What is kept of one text, and of the second of a pair or None."""
    first = self.documents.array('tokens', text, 0, int(self.first[text]))
    if self.second is None:
      return first, None
    return first, self.documents.array('pair_tokens', text, 0, int(self.second[text]))

  def log_cut(self) -> None:
    """Warns of what is cut off, and of texts that are empty."""
    empty = np.flatnonzero(self.given == 0)
    if len(empty):
      logging.warning(
        '%s: %d of %d documents are empty, the first: %s.',
        self.name,
        len(empty),
        len(self.sizes),
        self.documents.where(int(empty[0])),
      )
    if self.cut:
      logging.warning(
        '%s: %d of %d documents are longer than seq_len=%d allows and lose %d of %d tokens.',
        self.name,
        self.cut,
        len(self.sizes),
        self.seq_len,
        self.lost.sum(),
        self.given.sum(),
      )

  def log_packing(self) -> None:
    """Says how many texts a row holds, and how much of the rows is used."""
    texts, rows, length = len(self.sizes), len(self), self.seq_len
    if not texts:
      return
    used = 100 * self.sizes.sum() / length
    logging.info(
      '%s: %d texts in %d rows of %d tokens, %.1f%% of which are used (one text per row: '
      '%.1f%%). With %.2f texts per row, a step of batch_size rows learns from so many times more '
      'texts.',
      self.name,
      texts,
      rows,
      length,
      used / rows,
      used / texts,
      texts / rows,
    )
    full = np.diff(self.plan.offsets) == self.slots
    if self.slots > 1 and np.mean(full) > 0.5:
      logging.warning(
        '%s: a row of %d tokens takes at most %d texts, and most rows have so many; a '
        'shorter seq_len wastes less.',
        self.name,
        length,
        self.slots,
      )


def slots(seq_len: int) -> int:
  """G: the most texts of a row. Of seq_len alone, so that every corpus, host and split has arrays
  of the same shape.
  """
  return max(1, min(MOST_TEXTS, seq_len // TOKENS_PER_TEXT))


def fit(first: Any, second: Any, seq_len: Any, special: int) -> tuple[Any, Any]:
  """How many tokens of each text are kept so that a row holds them with its special tokens; the
  longer text loses first.

  Args:
    first: tokens of a text, or of each text of an array.
    second: likewise of the second text of a pair; None where there is none.
    seq_len: tokens of the row, or what each text of an array may take of one.
    special: how many special tokens stand around each text or pair.

  Returns:
    What is kept of `first`, and of `second` or None.
  """
  if np.min(seq_len, initial=special + 1) <= special:
    raise ValueError(f'seq_len={seq_len} must be more than the {special} special tokens of a row.')
  room = seq_len - special
  if second is None:
    return np.minimum(first, room), None
  half = room // 2 + room % 2 * (first > second)
  kept = np.minimum(first, np.maximum(room - second, half))
  return kept, np.minimum(second, room - kept)


def plan(sizes: np.ndarray, seq_len: int, slots: int) -> pack.Plan:
  """Which texts share a row. Texts of one length come in an order drawn once: neighbours of a
  sorted corpus are much alike.

  Args:
    sizes: [texts], tokens of each, special ones included, none above `seq_len`.
    seq_len: T.
    slots: G, the most texts of a row.
  """
  if slots == 1:
    return pack.one_per_row(sizes, seq_len)
  order = np.random.default_rng(0).permutation(len(sizes))
  plan = pack.best_fit(sizes[order], seq_len, most=slots)
  return dataclasses.replace(plan, document=order[plan.document])
