"""Requests that wait: gathered, answered in their order, none for another's fault."""

import threading
import time

import pytest

from llm_jax.serving.batches import Batches, Full


@pytest.fixture
def gate():
  """What the calls of a model wait for, and the items of each."""
  opened, calls = threading.Event(), []

  def run(items):
    opened.wait(10)
    calls.append(list(items))
    if 'bad' in items:
      raise ValueError('it is bad')
    return [item.upper() for item in items]

  return opened, calls, run


def test_what_waits_is_answered_together_and_a_bad_one_takes_none_with_it(gate):
  opened, calls, run = gate
  batches = Batches(run, most=4, wait=0.05, waiting=8)
  first = batches.submit(['a'])
  while batches.waiting:
    time.sleep(0.001)
  time.sleep(0.1)  # its batch has left
  others = [batches.submit(items) for items in (['b', 'c'], ['bad'], ['d'], ['e'])]
  assert others[2].cancel()
  opened.set()
  assert first.result(10) == ['A'] and others[0].result(10) == ['B', 'C']
  assert others[3].result(10) == ['E']  # of the next batch
  with pytest.raises(ValueError, match='it is bad'):
    others[1].result(10)
  assert calls == [['a'], ['b', 'c', 'bad'], ['b', 'c'], ['bad'], ['e']]
  batches.close()
  with pytest.raises(Full):
    batches.submit(['late'])


def test_no_more_wait_than_may(gate):
  opened, _, run = gate
  batches = Batches(run, most=1, wait=0, waiting=2)
  taken = [batches.submit(['a'])]
  while batches.waiting:
    time.sleep(0.001)
  taken += [batches.submit([name]) for name in 'bc']
  with pytest.raises(Full):
    batches.submit(['d'])
  opened.set()
  assert [future.result(10) for future in taken] == [['A'], ['B'], ['C']]
  batches.close()
