"""From encoded documents to batches: an endless, shuffled, weighted stream whose example i is a
pure function of (seed, i).

Nothing here has state but an index: hosts, threads and restarts change who computes an example and
when, never what it is.
"""

import collections
import concurrent.futures
import fractions
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from llm_jax.core.contracts import Documents, Example, Objective, Rows

# Uses of the seed; corpus i is shuffled by number `_SHUFFLE + i`.
_TRAIN, _VALIDATION, _CHOICE, _SHUFFLE = 1, 2, 3, 4
_AHEAD = 3  # batches that are made before they are asked for


def training_rows(
  splits: Sequence[Documents], objective: Objective, seq_len: int, batch_size: int
) -> list[Rows]:
  """The rows of each training corpus, as the objective lays them out.

  Args:
    splits: training documents of each corpus.
    objective: lays out rows.
    seq_len: tokens of a row.
    batch_size: rows of one optimizer step; the corpora together must have at least so many.

  Raises:
    ValueError: fewer rows than a batch in all corpora together, or none in one of them.
  """
  rows = [objective.rows(split, seq_len) for split in splits]
  _check_rows([len(r) for r in rows], batch_size, seq_len)
  return rows


def train_examples(
  rows: Sequence[Rows], weights: Sequence[float], objective: Objective, seed: int
) -> grain.MapDataset:
  """The endless training stream.

  The rows of each corpus are shuffled anew each epoch, and repeated; the corpora are interleaved so
  that the first n examples hold n * share of each, give or take fewer than there are corpora. What
  an objective draws (masking, say) depends on (seed, i), so that a row looks different each time it
  comes.

  Args:
    rows: of each corpus, as `training_rows` gives them.
    weights: share of examples of each corpus, in any unit.
    objective: transforms rows.
    seed: not negative.

  Returns:
    Dataset of length sys.maxsize; element i is a dict of arrays, a row of the batch.

  Raises:
    ValueError: weights that are not positive or not one per corpus, a negative seed.
  """
  shares = _shares(weights, len(rows))
  streams = []
  for corpus, laid_out in enumerate(rows):
    order = grain.MapDataset.range(len(laid_out))
    order = order.shuffle(seed=_derive(seed, _SHUFFLE + corpus)).repeat()
    streams.append(order.map(functools.partial(_tag, corpus)))
  chosen = grain.MapDataset.select_from_datasets(streams, _Interleaved(shares))
  make = functools.partial(_example, rows, objective)
  return chosen.random_map(make, seed=_derive(seed, _TRAIN))


def validation_rows(splits: Sequence[Documents], objective: Objective, seq_len: int) -> list[Rows]:
  """The rows of the validation documents of each corpus, which may be none but not everywhere;
  nothing where there are no corpora.

  Raises:
    ValueError: no rows at all.
  """
  rows = [objective.rows(split, seq_len) for split in splits]
  if rows and not sum(map(len, rows)):
    raise ValueError(
      f'the validation documents give no row of seq_len={seq_len}; hold out a larger share of the '
      'corpus.'
    )
  return rows


def validation_examples(
  rows: Sequence[Rows], objective: Objective, seed: int, limit: int = 0
) -> grain.MapDataset:
  """The validation set: finite, always in the same order and with the same random draws per row,
  whatever the limit.

  Args:
    rows: of each corpus.
    objective: transforms rows.
    seed: not negative.
    limit: at most so many rows, a fixed random choice; 0 takes all.

  Raises:
    ValueError: a negative limit or seed.
  """
  tags = []
  for corpus, laid_out in enumerate(rows):
    tags.append(grain.MapDataset.range(len(laid_out)).map(functools.partial(_tag, corpus)))
  make = functools.partial(_example, rows, objective)
  examples = grain.MapDataset.concatenate(tags).random_map(make, seed=_derive(seed, _VALIDATION))
  chosen = _chosen(sum(map(len, rows)), seed, limit)
  if chosen is None:
    return examples
  return grain.MapDataset.source(chosen.tolist()).map(examples.__getitem__)


def validation_indices(rows: Sequence[Rows], seed: int, limit: int = 0) -> list[tuple[int, int]]:
  """Which row of which corpus each of `validation_examples` is."""
  indices = [(corpus, row) for corpus, laid_out in enumerate(rows) for row in range(len(laid_out))]
  chosen = _chosen(len(indices), seed, limit)
  return indices if chosen is None else [indices[number] for number in chosen]


def numbered_rows(rows: Sequence[Rows], seed: int, limit: int = 0) -> list[tuple[Rows, int]]:
  """For each of `validation_examples` the rows of its corpus, and its number in them."""
  return [(rows[corpus], row) for corpus, row in validation_indices(rows, seed, limit)]


def batches(
  examples: grain.MapDataset,
  batch_size: int,
  start: int = 0,
  rows: Sequence[int] | None = None,
  put: Callable[[Example], Any] | None = None,
) -> Iterator[Any]:
  """This host's rows of each global batch, from example `start` on, forever; made ahead of need by
  a thread.

  Global batch s holds examples `start + s * batch_size` and following. Close the iterator
  (`.close()`) to stop the thread; an exception in a transform, or in `put`, is raised by the `next`
  that wants its batch.

  Args:
    examples: an endless stream.
    batch_size: rows of the global batch.
    start: examples consumed before, any number.
    rows: which rows of the global batch to make, in this order (`hosts.rows`); None for all.
    put: what the thread does with a batch last (`Inference.put`: it is on the devices before it is
      asked for); None for nothing.

  Yields:
    Arrays with a leading axis as long as `rows`, or what `put` made of them.

  Raises:
    ValueError: batch_size, rows or start is out of range.
  """
  rows = _checked_rows(batch_size, rows)
  if start < 0:
    raise ValueError(f'start={start} must be the number of examples consumed before, 0 or more.')
  load = _loader(examples, rows)
  make = load if put is None else lambda first: put(load(first))
  return _ahead(make, itertools.count(start, batch_size))


def padded_batches(
  examples: Sequence[Example], batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[Example]:
  """This host's rows of each global batch of a finite set, once; rows of zeros fill up the last.

  Arguments, shapes and errors as for `batches`; every host yields the same number of batches.
  """
  rows = _checked_rows(batch_size, rows)
  total = len(examples)
  empty = {key: np.zeros_like(value) for key, value in examples[0].items()}

  def load(first: int) -> Example:
    indices = [first + row for row in rows]
    return _stack([examples[index] if index < total else empty for index in indices])

  return _ahead(load, range(0, total, batch_size))


class _Interleaved(grain.transforms.DatasetSelectionMap):
  """Example i -> (corpus, index in it), by whole-number shares and without rounding.

  `grain.MapDataset.mix` rounds weights to a hundredth of the smallest. Corpus 0 has ceil(n * share
  / total) of the first n examples; the others divide what it leaves in the same way.
  """

  def __init__(self, shares: Sequence[int]):
    self._shares = tuple(shares)

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    before, after = int(index), int(index) + 1  # how many examples there are so far
    total, corpus = sum(self._shares), 0
    while True:
      left = total - self._shares[corpus]
      rest_before = before * left // total  # of those, how many the corpora behind this one have
      rest_after = after * left // total
      if rest_after == rest_before:
        return corpus, before - rest_before
      before, after = rest_before, rest_after
      total, corpus = left, corpus + 1


def _shares(weights: Sequence[float], corpora: int) -> list[int]:
  """Whole numbers in the ratio of the weights as they are written in decimals."""
  if len(weights) != corpora or not corpora:
    raise ValueError(
      f'{len(weights)} weights {list(weights)} for {corpora} corpora; give one for each.'
    )
  if not all(0 < w < math.inf for w in weights):
    raise ValueError(
      f'weights={list(weights)} must be positive numbers; leave out a corpus that is not wanted.'
    )
  exact = [fractions.Fraction(repr(float(w))) for w in weights]
  scale = math.lcm(*(w.denominator for w in exact))
  return [int(w * scale) for w in exact]


def _check_rows(counts: Sequence[int], batch_size: int, seq_len: int) -> None:
  if min(counts) == 0 or sum(counts) < batch_size:
    raise ValueError(
      f'the training documents give {" + ".join(map(str, counts))} rows of seq_len={seq_len}; '
      f'every corpus needs one, and batch_size={batch_size} needs as many in all. Lower '
      'config.batch_size or config.seq_len, hold out less for validation, or add text.'
    )
  for corpus, count in enumerate(counts):
    logging.info(
      'Training corpus %d: %d rows of %d tokens, %.1f batches of %d per epoch.',
      corpus,
      count,
      seq_len,
      count / batch_size,
      batch_size,
    )


def _derive(seed: int, stream: int) -> int:
  """A 32-bit seed for one use of `seed`: neighbouring seeds, epochs (grain counts them up from it)
  and uses stay unrelated.
  """
  if seed < 0:
    raise ValueError(f'seed={seed} must not be negative.')
  return int(np.random.SeedSequence((stream, seed)).generate_state(1)[0])


def _chosen(total: int, seed: int, limit: int) -> np.ndarray | None:
  """The rows of the validation set that are used, sorted; None for all."""
  if limit < 0:
    raise ValueError(f'limit={limit} must be a number of validation rows, or 0 for all of them.')
  if not 0 < limit < total:
    return None
  rng = np.random.default_rng(_derive(seed, _CHOICE))
  return np.sort(rng.choice(total, limit, replace=False))


def _tag(corpus: int, row: int) -> tuple[int, int]:
  return corpus, row


def _example(
  rows: Sequence[Rows], objective: Objective, tag: tuple[int, int], rng: np.random.Generator
) -> Example:
  corpus, row = tag
  return objective.transform(rows[corpus].example(row, rng), rng)


def _checked_rows(batch_size: int, rows: Sequence[int] | None) -> list[int]:
  if batch_size <= 0:
    raise ValueError(f'batch_size={batch_size} must be at least 1.')
  rows = list(range(batch_size)) if rows is None else [int(row) for row in rows]
  if not rows or min(rows) < 0 or max(rows) >= batch_size:
    raise ValueError(f'rows={rows} must be some of the rows 0 to {batch_size - 1} of a batch.')
  return rows


def _loader(examples: grain.MapDataset, rows: Sequence[int]) -> Callable[[int], Example]:
  """A function from a batch's first example to the batch."""
  # All rows at once, which grain has no public function for: it keeps books on every single read,
  # and that takes as long as making a short row.
  return lambda first: _stack(examples._getitems([first + row for row in rows]))


def _stack(rows: Sequence[Example]) -> Example:
  keys = rows[0].keys()
  for row in rows:
    if row.keys() != keys:
      raise ValueError(
        f'rows of one batch hold different arrays, {sorted(keys)} and {sorted(row)}; an objective '
        'must give every row the same, with a weight of 0 where one does not count.'
      )
  return {key: np.stack([row[key] for row in rows]) for key in keys}


def _ahead(load: Callable[[int], Any], firsts: Iterable[int]) -> Iterator[Any]:
  """load(first) for each of `firsts`, in order, computed up to `_AHEAD` ahead of the reader.

  One thread is enough: more would wait for each other, as they share Python's lock.
  """
  pending: collections.deque[concurrent.futures.Future] = collections.deque()
  pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='batches')
  try:
    for first in firsts:
      pending.append(pool.submit(load, first))
      if len(pending) > _AHEAD:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
