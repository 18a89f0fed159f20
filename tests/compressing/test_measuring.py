"""Scores side by side: the paired bootstrap, the report, the tolerance."""

import numpy as np
import pytest

from llm_jax.compressing import measuring


def numbers(right, score='classify_accuracy', **more):
  batches = np.stack([right, np.full(len(right), 10.0)], -1)
  given = dict(values={}, memory=400, work={}) | more
  return measuring.Numbers(batches=batches, score=score, **given)


def test_the_interval_is_that_of_the_difference_on_the_same_batches():
  rng = np.random.default_rng(0)
  before = rng.integers(3, 10, 200).astype(float)
  same = numbers(before), numbers(before)
  assert measuring.loss_of_score(*same) == (0.0, 0.0, 0.0)
  # One right answer fewer in every second batch: the spread of the batches themselves cancels out.
  after = before - (np.arange(200) % 2)
  lost, low, high = measuring.loss_of_score(numbers(before), numbers(after))
  assert lost == pytest.approx(0.05)
  error = 0.05 / np.sqrt(200)  # of a mean of 0 and 0.1 with equal shares
  assert low == pytest.approx(0.05 - 1.96 * error, abs=0.001)
  assert high == pytest.approx(0.05 + 1.96 * error, abs=0.001)
  # Of a loss, more is worse.
  lost, *_ = measuring.loss_of_score(numbers(before, 'loss'), numbers(after, 'loss'))
  assert lost == pytest.approx(-0.05)


def test_the_report_says_what_became_worse_too(monkeypatch):
  clock, order = [0.0], []
  monkeypatch.setattr(measuring.time, 'perf_counter', lambda: clock[0])

  def work(name, seconds, units):
    def run():
      order.append(name)
      clock[0] += seconds * (1 + 9 * (len(order) == 5))  # once the machine does something else

    return {measuring.ROWS: measuring.Work(run, units)}

  right = np.full(4, 9.0)
  before = numbers(right, memory=400, work=work('before', 0.08, 8), values=dict(f1=0.0, x=1.0))
  after = numbers(right - 1, memory=100, work=work('after', 0.16, 8), values=dict(f1=0.5))
  said = measuring.report(before, after, (1000, 300))
  assert said['numbers']['rows per second'] == pytest.approx([100.0, 50.0])
  assert order == ['before', 'after'] * (1 + measuring.REPEATS)
  assert said['numbers']['bytes on disk'] == [1000, 300]
  text = measuring.table(said)
  assert said['numbers']['f1'] == [0.0, 0.5] and 'x' not in said['numbers']
  assert [line.split() for line in text.splitlines() if 'f1' in line] == [
    ['f1', '0.0000', '0.5000', '-']
  ]
  assert 'rows per second' in text and '0.500' in text and '0.300' in text
  assert 'lost: 0.1000, 95% within 0.1000 and 0.1000' in text
  measuring.within(said, None)
  measuring.within(said, 0.11)
  with pytest.raises(ValueError, match='worse by 0.1000.*tolerance=0.05; nothing is written'):
    measuring.within(said, 0.05)
  with pytest.raises(ValueError, match='needs a validation set'):
    measuring.check_tolerance(0.1, None)
  measuring.check_tolerance(None, None)


def test_the_score_is_the_accuracy_of_answers_or_else_the_loss():
  metrics = {'clm': (6.0, 3.0), 'clm_accuracy': (1.0, 3.0)}
  assert measuring._score(metrics, answers=False) == 'loss'
  assert measuring._score(metrics, answers=True) == 'clm_accuracy'
  assert measuring._pair(metrics, 'loss', {'clm': 0.5}) == (3.0, 3.0)
