"""Prometheus' expressions and alert rules over series that are in memory: the part of the language
that launch/ uses, read by promql-parser; anything else is an error.

Definitions are those of https://prometheus.io/docs/prometheus/latest/querying/ and, for the
extrapolation of `rate` and `increase`, those of promql/functions.go in Prometheus.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import promql_parser as ast

LOOKBACK = 300.0  # seconds after which the last sample of a series is stale
COMPARISONS = {
  '>': lambda a, b: a > b,
  '<': lambda a, b: a < b,
  '>=': lambda a, b: a >= b,
  '<=': lambda a, b: a <= b,
  '==': lambda a, b: a == b,
  '!=': lambda a, b: a != b,
}
ARITHMETIC = {
  '+': lambda a, b: a + b,
  '-': lambda a, b: a - b,
  '*': lambda a, b: a * b,
  '/': lambda a, b: a / b if b else (math.nan if not a or math.isnan(a) else math.inf * a),
}
AGGREGATES = {'sum': math.fsum, 'max': max, 'min': min, 'count': len}

Labels = frozenset  # of (name, value)
Vector = dict[Labels, float]


def labels(**values: str) -> Labels:
  return Labels(values.items())


class Series(NamedTuple):
  """The samples of a series; `grown` are its values as a counter that was never set back."""

  name: str
  labels: Labels
  times: np.ndarray
  values: np.ndarray
  grown: np.ndarray


def series(name: str, known: Labels, times: Sequence[float], values: Sequence[float]) -> Series:
  values = np.asarray(values, float)
  back = np.where(np.diff(values) < 0, values[:-1], 0)
  grown = values + np.concatenate([[0], np.cumsum(back)])
  return Series(name, known, np.asarray(times, float), values, grown)


class Store:
  """Series, and what expressions say of them."""

  def __init__(self, all_series: Iterable[Series]):
    self._series: dict[str, list[Series]] = {}
    for one in all_series:
      self._series.setdefault(one.name, []).append(one)
    self._parsed: dict[str, ast.Expr] = {}

  def value(self, text: str, time: float) -> Vector | float:
    """What an expression is at a time."""
    if text not in self._parsed:
      self._parsed[text] = ast.parse(text)
    return self._of(self._parsed[text], time)

  def firing(self, text: str, hold: float, times: Iterable[float]) -> dict[Labels, list[float]]:
    """The times at which an alert fires, by its labels.

    Args:
      text: of its expression.
      hold: seconds for which it must have been true at each time: its `for`.
      times: at which it is looked at.
    """
    since: dict[Labels, float] = {}
    found: dict[Labels, list[float]] = {}
    for time in times:
      true = self.value(text, time)
      since = {key: since.get(key, time) for key in true}
      for key, began in since.items():
        if time - began >= hold:
          found.setdefault(key, []).append(time)
    return found

  def _of(self, node: ast.Expr, time: float) -> Vector | float:
    match node:
      case ast.NumberLiteral():
        return node.val
      case ast.ParenExpr():
        return self._of(node.expr, time)
      case ast.VectorSelector():
        return self._now(node, time)
      case ast.AggregateExpr():
        return _aggregated(node, self._of(node.expr, time))
      case ast.Call():
        return self._called(node, time)
      case ast.BinaryExpr():
        return _combined(node, self._of(node.lhs, time), self._of(node.rhs, time))
    raise NotImplementedError(f'{type(node).__name__} in {node}')

  def _chosen(self, node: ast.VectorSelector) -> list[Series]:
    if node.offset is not None or node.at is not None or node.matchers.or_matchers:
      raise NotImplementedError(str(node))
    matchers = node.matchers.matchers
    return [
      one
      for one in self._series.get(node.name, ())
      if all(_fits(dict(one.labels).get(m.name, ''), m) for m in matchers)
    ]

  def _now(self, node: ast.VectorSelector, time: float) -> Vector:
    found = {}
    for one in self._chosen(node):
      last = np.searchsorted(one.times, time, side='right') - 1
      if last >= 0 and one.times[last] > time - LOOKBACK and not math.isnan(one.values[last]):
        found[one.labels] = float(one.values[last])
    return found

  def _called(self, node: ast.Call, time: float) -> Vector:
    name, args = node.func.name, node.args
    if name in ('rate', 'increase'):
      seconds = args[0].range.total_seconds()
      found = {}
      for one in self._chosen(args[0].vector_selector):
        grown = increase(one, time - seconds, time)
        if grown is not None:
          found[one.labels] = grown / seconds if name == 'rate' else grown
      return found
    if name == 'abs':
      return {key: abs(value) for key, value in self._of(args[0], time).items()}
    if name == 'absent':
      matchers = args[0].matchers.matchers
      equal = {m.name: m.value for m in matchers if m.op == ast.MatchOp.Equal}
      return {} if self._of(args[0], time) else {labels(**equal): 1.0}
    if name == 'histogram_quantile':
      return _quantiles(self._of(args[0], time), self._of(args[1], time))
    raise NotImplementedError(name)


def increase(one: Series, start: float, end: float) -> float | None:
  """By how much a counter grew in (start, end], as Prometheus extrapolates it; None of fewer than
  two samples.
  """
  first = np.searchsorted(one.times, start, side='right')
  last = np.searchsorted(one.times, end, side='right') - 1
  if last <= first:
    return None
  sampled = one.times[last] - one.times[first]
  grown = one.grown[last] - one.grown[first]
  between = sampled / (last - first)
  before, after = one.times[first] - start, end - one.times[last]
  if before >= 1.1 * between:
    before = between / 2
  if grown > 0 and one.values[first] >= 0:  # a counter does not come from below 0
    before = min(before, sampled * one.values[first] / grown)
  if after >= 1.1 * between:
    after = between / 2
  return float(grown * (sampled + before + after) / sampled)


def quantile(q: float, buckets: Sequence[tuple[float, float]]) -> float:
  """The quantile of a histogram: (upper bound, cumulative count) in order, the last bound inf."""
  if len(buckets) < 2 or not math.isinf(buckets[-1][0]) or not buckets[-1][1]:
    return math.nan
  rank = q * buckets[-1][1]
  index = next(i for i, (_, count) in enumerate(buckets) if count >= rank)
  if index == len(buckets) - 1:
    return buckets[-2][0]
  bound, count = buckets[index]
  low, below = buckets[index - 1] if index else (0.0, 0.0)
  if not index and bound <= 0:
    return bound
  return low + (bound - low) * (rank - below) / (count - below)


def _fits(value: str, matcher: ast.Matcher) -> bool:
  match matcher.op:
    case ast.MatchOp.Equal:
      return value == matcher.value
    case ast.MatchOp.NotEqual:
      return value != matcher.value
    case ast.MatchOp.Re:
      return re.fullmatch(matcher.value, value) is not None
  return re.fullmatch(matcher.value, value) is None


def _kept(key: Labels, names: Iterable[str], include: bool) -> Labels:
  return Labels(pair for pair in key if (pair[0] in names) == include)


def _aggregated(node: ast.AggregateExpr, vector: Vector) -> Vector:
  by = node.modifier
  names, include = (by.labels, by.type == ast.AggModifierType.By) if by else ((), True)
  groups: dict[Labels, list[float]] = {}
  for key, value in vector.items():
    groups.setdefault(_kept(key, names, include), []).append(value)
  return {key: float(AGGREGATES[str(node.op)](values)) for key, values in groups.items()}


def _quantiles(q: float, vector: Vector) -> Vector:
  groups: dict[Labels, list[tuple[float, float]]] = {}
  for key, count in vector.items():
    if (bound := dict(key).get('le')) is not None:
      groups.setdefault(_kept(key, ['le'], False), []).append((float(bound), count))
  return {key: quantile(q, sorted(buckets)) for key, buckets in groups.items()}


def _combined(node: ast.BinaryExpr, left, right) -> Vector | float:
  op, how = str(node.op), node.modifier
  if how is not None and how.return_bool:
    raise NotImplementedError(str(node))
  scalars = not isinstance(left, dict), not isinstance(right, dict)
  if all(scalars):
    return ARITHMETIC[op](left, right)
  if any(scalars):
    vector, given = (right, left) if scalars[0] else (left, right)
    both = lambda value: (given, value) if scalars[0] else (value, given)
    if op in COMPARISONS:
      return {key: v for key, v in vector.items() if COMPARISONS[op](*both(v))}
    return {key: ARITHMETIC[op](*both(v)) for key, v in vector.items()}
  names, include = (), False  # all labels must be the same
  if how is not None and how.matching is not None:
    names, include = how.matching.labels, how.matching.type == ast.LabelModifierType.Include
  part = lambda key: _kept(key, names, include)
  if op in ('and', 'unless'):
    there = set(map(part, right))
    return {key: v for key, v in left.items() if (part(key) in there) == (op == 'and')}
  if op == 'or':
    there = set(map(part, left))
    return left | {key: v for key, v in right.items() if part(key) not in there}
  return _matched(node, left, right, part)


def _matched(node: ast.BinaryExpr, left: Vector, right: Vector, part) -> Vector:
  """Vectors element by element; with group_left many on the left to one on the right."""
  op, how = str(node.op), node.modifier
  many = how is not None and how.card == ast.VectorMatchCardinality.ManyToOne
  if how is not None and how.card == ast.VectorMatchCardinality.OneToMany:
    raise NotImplementedError(str(node))
  others: dict[Labels, float] = {}
  for key, value in right.items():
    if part(key) in others:
      raise ValueError(f'{node}: several elements on the right have {sorted(part(key))}')
    others[part(key)] = value
  found: Vector = {}
  for key, value in left.items():
    if part(key) not in others:
      continue
    other, result = others[part(key)], key if many or op in COMPARISONS else part(key)
    if result in found:
      raise ValueError(f'{node}: several elements on the left have {sorted(result)}')
    if op not in COMPARISONS:
      found[result] = ARITHMETIC[op](value, other)
    elif COMPARISONS[op](value, other):
      found[result] = value
  return found
