import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import pack

LENGTHS = st.lists(st.integers(0, 40), max_size=30)
SHAPES = st.integers(0, 3).flatmap(
  lambda overhead: st.tuples(st.integers(overhead + 1, 24), st.just(overhead))
)


def _rows(plan):
  return [plan[i] for i in range(len(plan))]


def _plain_windows(lengths, capacity, overhead):
  """Token by token: a token joins the piece before it, or opens a piece, or opens a row."""
  rows, left, last = [], 0, None
  for document, length in enumerate(lengths):
    for token in range(length):
      if last == (document, token) and left >= 1:
        rows[-1][-1][2] += 1
        left -= 1
      else:
        if left <= overhead:
          rows.append([])
          left = capacity
        rows[-1].append([document, token, token + 1])
        left -= 1 + overhead
      last = (document, token + 1)
  return [[tuple(piece) for piece in row] for row in rows]


def _plain_best_fit_decreasing(costs, capacity):
  """Row count of the quadratic textbook algorithm."""
  left = []
  for cost in sorted(costs, reverse=True):
    fitting = [i for i, space in enumerate(left) if space >= cost]
    if fitting:
      left[min(fitting, key=lambda i: left[i])] -= cost
    else:
      left.append(capacity - cost)
  return len(left)


def _first_fit(costs, capacity):
  left = []
  for cost in costs:
    row = next((i for i, space in enumerate(left) if space >= cost), None)
    if row is None:
      left.append(capacity - cost)
    else:
      left[row] -= cost
  return len(left)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, shape=SHAPES, name=st.sampled_from(sorted(pack.PACKINGS)))
def test_every_token_is_in_exactly_one_row_and_no_row_overflows(lengths, shape, name):
  capacity, overhead = shape
  rows = _rows(pack.PACKINGS[name](np.asarray(lengths, np.int64), capacity, overhead))
  seen = [np.zeros(n, int) for n in lengths]
  for row in rows:
    assert row
    assert sum(stop - start + overhead for _, start, stop in row) <= capacity
    for document, start, stop in row:
      assert 0 <= start < stop <= lengths[document]
      seen[document][start:stop] += 1
  assert all((count == 1).all() for count in seen)
  if name == 'none':
    assert all(len(row) == 1 for row in rows)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, shape=SHAPES)
def test_windows_equal_a_plain_loop(lengths, shape):
  assert _rows(pack.windows(np.asarray(lengths, np.int64), *shape)) == _plain_windows(
    lengths, *shape
  )


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, shape=SHAPES)
def test_best_fit_opens_as_many_rows_as_the_textbook_and_cuts_only_long_documents(lengths, shape):
  capacity, overhead = shape
  room = capacity - overhead
  plan = pack.best_fit(np.asarray(lengths, np.int64), capacity, overhead)
  pieces = [min(room, n - start) for n in lengths for start in range(0, n, room)]
  assert len(plan) == _plain_best_fit_decreasing([p + overhead for p in pieces], capacity)
  for row in _rows(plan):
    for document, start, stop in row:
      assert (start, stop) == (0, lengths[document]) or lengths[document] > room


def test_best_fit_wastes_less_than_first_fit_and_one_per_row():
  lengths = np.random.default_rng(0).geometric(1 / 40, 3000).clip(max=128)
  best, first = len(pack.best_fit(lengths, 128)), _first_fit(lengths.tolist(), 128)
  assert best <= first < len(pack.one_per_row(lengths, 128)) == 3000
  assert lengths.sum() / (best * 128) > 0.99
  shuffled = len(pack.best_fit(lengths[::-1], 128))
  assert shuffled == best


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, most=st.integers(1, 5))
def test_best_fit_takes_no_more_pieces_than_it_may(lengths, most):
  lengths = np.asarray(lengths, np.int64)
  plan = pack.best_fit(lengths, 40, most=most)
  assert (
    sorted(plan.document) == np.flatnonzero(lengths).tolist()
    and (plan.stop == lengths[plan.document]).all()
  )
  assert all(len(row) <= most and sum(stop for _, _, stop in row) <= 40 for row in _rows(plan))
  if most == 1:
    assert len(plan) == np.count_nonzero(lengths)
  if np.diff(plan.offsets).max(initial=0) < most:  # nothing was in the way
    assert len(plan) == len(pack.best_fit(lengths, 40))


def test_text_bounds():
  bounds = pack.text_bounds([3, 2, 4], 5)
  assert bounds['text_firsts'].tolist() == [0, 3, 5, 0, 0]
  assert bounds['text_lasts'].tolist() == [2, 4, 8, 0, 0]
  assert {a.dtype for a in bounds.values()} == {np.dtype(np.int32)}
  with pytest.raises(ValueError):
    pack.text_bounds([3, 2, 4], 2)


def test_a_row_without_room_for_a_token_is_refused():
  for packing in pack.PACKINGS.values():
    with pytest.raises(ValueError, match='config.seq_len must be at least 3'):
      packing(np.asarray([5]), 2, 2)


def test_plan_rows_are_a_sequence():
  plan = pack.windows(np.asarray([3, 0, 4]), 5)
  assert _rows(plan) == [[(0, 0, 3), (2, 0, 2)], [(2, 2, 4)]] and plan[-1] == plan[1]
  with pytest.raises(IndexError):
    plan[2]
  assert (
    len(pack.windows(np.zeros(0, np.int64), 5)) == len(pack.best_fit(np.zeros(3, np.int64), 5)) == 0
  )


def test_assemble_numbers_segments_and_restarts_positions():
  row = pack.assemble([np.asarray([7, 8, 9]), np.asarray([5, 6])], 7)
  np.testing.assert_array_equal(row['tokens'], [7, 8, 9, 5, 6, 0, 0])
  np.testing.assert_array_equal(row['segments'], [1, 1, 1, 2, 2, 0, 0])
  np.testing.assert_array_equal(row['positions'], [0, 1, 2, 0, 1, 0, 0])
  assert {a.dtype for a in row.values()} == {np.dtype(np.int32)}
  with pytest.raises(ValueError, match='pieces of 5 tokens do not fit in a row of 4'):
    pack.assemble([np.zeros(3, int), np.zeros(2, int)], 4)


@pytest.mark.parametrize('name', sorted(pack.PACKINGS))
def test_many_documents_are_planned_fast(name):
  lengths = np.random.default_rng(1).geometric(1 / 300, 100_000)
  began = time.process_time()
  plan = pack.PACKINGS[name](lengths, 512, 2)
  assert time.process_time() - began < 5
  assert (plan.stop - plan.start).sum() == lengths.sum()


PAIRS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, most=st.one_of(st.none(), st.integers(1, 4)))
def test_pairs_fit_in_both_rows(pairs, most):
  first, second = np.array(pairs, np.int64).reshape(-1, 2).T
  plan = pack.best_fit_pairs(first, second, (20, 9), most)
  assert sorted(plan.document) == list(range(len(pairs)))
  assert (plan.stop == second[plan.document]).all() and not plan.start.any()
  for row in _rows(plan):
    chosen = [pair for pair, _, _ in row]
    assert sum(first[chosen]) <= 20 and sum(second[chosen]) <= 9
    assert 1 <= len(chosen) <= (most or len(pairs))


def test_pairs_waste_little():
  rng = np.random.default_rng(0)
  first = rng.geometric(1 / 40, 20_000).clip(max=256)
  second = np.maximum(1, (first * rng.uniform(0.3, 0.7, 20_000)).astype(int)).clip(max=128)
  began = time.process_time()
  plan = pack.best_fit_pairs(first, second, (256, 128))
  assert time.process_time() - began < 5
  assert first.sum() / (256 * len(plan)) > 0.9
