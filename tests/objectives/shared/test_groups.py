import numpy as np
import pytest
from absl import logging
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.documents import Memory
from llm_jax.data.pairs import Frame
from llm_jax.objectives.shared.groups import GroupRows, level

FRAME = Frame((1,), (2,), (1,), (2,), (2,))
RNG = np.random.default_rng(0)


class Rows(GroupRows):
  """Texts of given lengths, [[3, 2], [4]]; ids are 100 x the document + the number of the text."""

  def __init__(self, lengths, seq_len, **options):
    records = [{'tokens': np.arange(3)} for _ in lengths]
    documents = Memory(records, lambda record, _: record, None)
    counts = [len(each) for each in lengths]
    self.lengths = lengths
    super().__init__(
      documents, seq_len, FRAME, 'groups', counts, np.array(sum(lengths, []), np.int64), **options
    )

  def pieces(self, document):
    return [
      (np.full(n, 100 * (document + 1) + i), None) for i, n in enumerate(self.lengths[document])
    ]


def test_a_row_of_two_groups():
  rows = Rows([[3, 2], [1, 1, 1]], 24)
  assert len(rows) == 1 and rows.groups(0) in ([0, 1], [1, 0])
  row = rows.example(0, RNG)
  first = rows.groups(0)[0]
  assert rows.texts(0) == ([0, 0, 1, 1, 1] if first == 0 else [1, 1, 1, 0, 0])
  if first == 1:
    wanted, groups = [1, 200, 2, 1, 201, 2, 1, 202, 2], [[1, 1, 1, 2, 2, 0], [0, 1, 2, 0, 1, 0]]
  else:
    wanted, groups = [1, 100, 100, 100, 2, 1, 101, 101, 2], [[1, 1, 2, 2, 2, 0], [0, 1, 0, 1, 2, 0]]
  assert row['tokens'][:9].tolist() == wanted
  assert [row['group'].tolist(), row['member'].tolist()] == groups
  assert row['segments'].max() == 5 and row['positions'].max() == 4


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=12))
def test_every_group_stands_whole_in_one_row(lengths):
  rows = Rows(lengths, 32)
  seen = [group for index in range(len(rows)) for group in rows.groups(index)]
  assert sorted(seen) == list(range(len(lengths)))
  for index in range(len(rows)):
    row = rows.example(index, RNG)
    assert len(row['group']) == 8 and len(rows.texts(index)) <= 8
    for slot, document in enumerate(rows.texts(index)):
      inside = row['tokens'][row['segments'] == slot + 1]
      text = int(row['member'][slot])
      asked = lengths[document][text]
      assert set(inside[1:-1].tolist()) <= {100 * (document + 1) + text}
      whole = sum(n + 2 for n in lengths[document]) <= 32
      assert len(inside) - 2 == asked if whole else len(inside) - 2 <= asked
      # A text that loses tokens is as long as any other that does, and no shorter than the rest.
      if len(inside) - 2 < asked:
        own = (s for s, d in enumerate(rows.texts(index)) if d == document)
        others = [np.sum(row['segments'] == s + 1) for s in own]
        assert len(inside) == max(others)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(8, 60))
def test_level_is_the_highest_that_fits(sizes, room):
  found = level(sizes, room)
  cut = lambda most: sum(min(size, most) for size in sizes)
  assert cut(found) <= room and (found == max(sizes) or cut(found + 1) > room)


def test_what_is_lost_is_said(monkeypatch):
  lines = []
  say = lambda message, *values: lines.append(message % values)
  monkeypatch.setattr(logging, 'warning', say)
  monkeypatch.setattr(logging, 'info', say)
  Rows([[20, 0], [2, 2]], 16).log()
  assert lines[0] == 'groups: 1 of 4 texts are empty, the first in document 0.'
  assert lines[1].startswith('groups: 1 of 2 groups are longer than seq_len=16 allows')
  assert 'lose 8 tokens' in lines[1] and '2 groups of 4 texts in 2 rows of 16 tokens' in lines[2]


@pytest.mark.parametrize(
  ('lengths', 'message'),
  [
    ([[1], []], 'the group of document 1 has no text'),
    ([[1], [1] * 5], 'document 1 has more texts than the 4 that a row takes: 5 texts, seq_len=16'),
  ],
)
def test_groups_that_cannot_be(lengths, message):
  with pytest.raises(ValueError, match=message):
    Rows(lengths, 16)


def test_a_group_per_row():
  rows = Rows([[1, 1], [2], [3]], 32, alone=True)
  assert [rows.groups(index) for index in range(len(rows))] == [[0], [1], [2]]
