"""The evaluator of expressions, against values computed by hand from Prometheus' definitions."""

import math

import numpy as np
import promql
import pytest
from promql import Store, labels, series


def store(*given, times=range(0, 301, 60)):
  return Store(series(name, labels(**known), times, values) for name, known, values in given)


COUNTER = ('requests_total', {'code': '200'}, [0, 60, 120, 180, 240, 300])
ERRORS = ('requests_total', {'code': '500'}, [0, 0, 6, 6, 12, 18])


def test_a_rate_is_of_a_second_and_an_increase_of_the_window():
  found = store(COUNTER)
  # samples at 60 ... 300 in (0, 300]: 240 in 240 s, and as fast in the 60 s before the first
  assert found.value('increase(requests_total[5m])', 300) == {labels(code='200'): 300}
  assert found.value('rate(requests_total[5m])', 300) == {labels(code='200'): 1}
  # half a window back and 30 s past the last sample: 180 ... 300, extrapolated by 30 s at each end
  assert found.value('increase(requests_total[3m])', 330) == {labels(code='200'): 180}
  assert found.value('rate(requests_total[1m])', 300) == {}  # of one sample there is none


def test_a_counter_that_begins_anew_has_not_shrunk():
  found = store(('c', {}, [100, 160, 10, 70, 130, 190]))
  # 60 + 10 + 60 + 60 + 60 from 100 on, in the 300 s from 0; a window that holds all samples
  assert found.value('increase(c[301s])', 300)[labels()] == pytest.approx(250 * 301 / 300)


def test_the_extrapolation_does_not_go_below_0():
  times = [50, 60, 70]
  found = Store([series('c', labels(), times, [1, 11, 21])])
  # before: 1/20 of the 20 s stand between 0 and the first value; after: 5 s, as far as half a step
  assert found.value('increase(c[100s])', 100)[labels()] == pytest.approx(20 * (20 + 1 + 5) / 20)


def test_a_quantile_is_interpolated_within_its_bucket():
  # Of 10 below 0.1, 30 below 0.5, 40 in all: rank 20 is half of the way from 0.1 to 0.5.
  buckets = [(0.1, 10), (0.5, 30), (1.0, 40), (math.inf, 40)]
  assert promql.quantile(0.5, buckets) == pytest.approx(0.3)
  assert promql.quantile(0.25, buckets) == pytest.approx(0.1)
  assert promql.quantile(0.125, buckets) == pytest.approx(0.05)  # the first one begins at 0
  assert promql.quantile(0.99, [(1, 1), (2, 2), (math.inf, 100)]) == 2  # beyond the last bound
  assert math.isnan(promql.quantile(0.5, [(1, 0), (math.inf, 0)]))
  rows = [('b', {'le': '0.1', 'r': 'x'}, [10] * 6), ('b', {'le': '0.5', 'r': 'x'}, [30] * 6)]
  found = store(*rows, ('b', {'le': '+Inf', 'r': 'x'}, [40] * 6))
  assert found.value('histogram_quantile(0.5, b)', 300) == {labels(r='x'): pytest.approx(0.3)}


def test_vectors_are_matched_by_their_labels():
  found = store(COUNTER, ERRORS, ('limit', {'zone': 'a'}, [4] * 6), ('one', {}, [1] * 6))
  both = {labels(code='200'): 300, labels(code='500'): 18}
  assert found.value('requests_total', 300) == both
  assert found.value('sum(requests_total)', 300) == {labels(): 318}
  assert found.value('sum without (code) (requests_total) / 2', 300) == {labels(): 159}
  assert found.value('requests_total{code=~"5.."} / on () one', 300) == {labels(): 18}
  assert found.value('requests_total / on () group_left () limit', 300) == {
    labels(code='200'): 75,
    labels(code='500'): 4.5,
  }
  assert found.value('requests_total > 20', 300) == {labels(code='200'): 300}
  assert found.value('requests_total and on (code) requests_total < 20', 300) == {
    labels(code='500'): 18
  }
  assert found.value('requests_total unless on (code) requests_total < 20', 300) == {
    labels(code='200'): 300
  }
  assert found.value('absent(nothing{a="b"}) or one', 300) == {labels(a='b'): 1, labels(): 1}
  assert found.value('absent(one)', 300) == {} == found.value('nothing', 300)
  with pytest.raises(ValueError, match='several elements'):
    found.value('one / on () requests_total', 300)
  with pytest.raises(NotImplementedError):
    found.value('requests_total offset 5m', 300)
  with pytest.raises(ValueError, match='.'):
    found.value('sum by (', 300)


def test_nothing_by_nothing_is_no_alarm():
  found = store(('a', {}, [0] * 6), ('b', {}, [0] * 6))
  assert math.isnan(found.value('a / b', 300)[labels()])
  assert found.value('a / b > 0.1', 300) == {} == found.value('a / b < 0.1', 300)


def test_what_was_not_seen_for_five_minutes_is_gone():
  found = store(COUNTER)
  assert found.value('requests_total', 599) and not found.value('requests_total', 600)


def test_an_alert_fires_once_it_was_true_for_its_time_without_a_gap():
  times = np.arange(0, 1200, 60)
  values = [0, 1, 1, 0, *[1] * 6, *[0] * 10]
  found = Store([series('x', labels(m='a'), times, values)])
  fired = found.firing('x > 0', 180, times)
  assert fired == {labels(m='a'): [420, 480, 540]}
