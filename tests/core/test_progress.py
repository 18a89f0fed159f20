"""What is shown of long work, and that nothing is of short."""

import io
import sys

import pytest

from llm_jax.core import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  return now


def work(clock, seconds, **options):
  for _ in progress.shown(range(8), 'Counting', 8, 'items', **options):
    clock[0] += seconds


def test_lines_now_and_then_with_the_time_that_is_left(clock, monkeypatch, caplog):
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  caplog.set_level('INFO')
  work(clock, 6)
  lines = [record.getMessage() for record in caplog.records]
  assert lines == [f'Counting: {n} of 8 items, {6 * (8 - n)} s left.' for n in (2, 4, 6, 8)]


@pytest.mark.parametrize('seconds, options', [(1, {}), (60, {'primary': False})])
def test_nothing_of_short_work_nor_on_other_hosts(clock, monkeypatch, caplog, seconds, options):
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  caplog.set_level('INFO')
  work(clock, seconds, **options)
  assert not caplog.records and not sys.stderr.getvalue()


def test_a_bar_on_a_terminal(monkeypatch, caplog):
  monkeypatch.setattr(sys, 'stderr', Terminal())
  monkeypatch.setattr(progress, 'MOMENT', 0)
  caplog.set_level('INFO')
  assert list(progress.shown('abc', 'Counting', 3, 'items')) == ['a', 'b', 'c']
  assert 'Counting' in sys.stderr.getvalue() and not caplog.records
