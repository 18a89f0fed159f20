"""The alert rules and the board: of metrics that there are, silent on quiet days, and each rule
there for a trouble of its own.
"""

import json
import math
import pathlib
import re

import numpy as np
import promql_parser as ast
import pytest
import yaml
from promql import Store, labels, series

from llm_jax.programs import summary
from llm_jax.serving import watch as watch_lib
from llm_jax.serving.served import Seen

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
RULES = {
  rule['alert']: rule
  for group in yaml.safe_load((LAUNCH / 'alerts.yml').read_text())['groups']
  for rule in group['rules']
}
BOARD = json.loads((LAUNCH / 'grafana.json').read_text())
OTHERS = {'up'}  # what Prometheus itself knows


# ---- names


class _Queue:
  waiting, limit, oldest, batches, items, most, rows, writing = 1, 4, 2.0, 3, 5, 32, 8, 2


class _Model:
  name, embeds, answers, fills, writer = 'm', _Queue, _Queue, _Queue, _Queue
  training = summary.Summary(10, {1: 0.5, 2: 1.0}, 0.1, 10, {'a': 1.0})
  seen = Seen(3, ('a',), training)


def exported():
  """The labels of each series that the service really exports, by its name."""
  watch, asked = watch_lib.Watch([_Model]), watch_lib.Asked('POST', '/classify')
  watch.read(_Model, asked, [[3, 4]])
  watch.wrote(_Model, asked, 1)
  watch.predicted(_Model, [{'label': 'a'}])
  watch.refused('full')
  watch.answered(asked, 200)
  found = {}
  for line in watch.text().decode().splitlines():
    if not line.startswith('#'):
      name, known = re.match(r'(\w+)(?:{(.*)})? ', line).groups()
      found.setdefault(name, set()).update(re.findall(r'(\w+)="', known or ''))
  return found


def selectors(node):
  """Every series that an expression names, with the labels that it asks of it."""
  found = []

  def look(one):
    selector = one.vector_selector if isinstance(one, ast.MatrixSelector) else one
    if isinstance(selector, ast.VectorSelector):
      found.append((selector.name, {m.name for m in selector.matchers.matchers}))
    for part in ('lhs', 'rhs', 'expr', 'param'):
      if getattr(one, part, None) is not None:
        look(getattr(one, part))
    for argument in getattr(one, 'args', ()):
      look(argument)

  look(node)
  return found


def grouped(node):
  """Every label by which an expression groups or matches."""
  return set(re.findall(r'\w+', ' '.join(re.findall(r'(?:by|on) ?\(([^)]*)\)', str(node)))))


def plain(text):
  """An expression of the board, with its variables filled in."""
  return text.replace('$__rate_interval', '5m').replace('$__range', '1h')


def panels():
  return [panel for panel in BOARD['panels'] if panel['type'] != 'row']


def targets():
  return [target['expr'] for panel in panels() for target in panel['targets']]


EXPRESSIONS = [rule['expr'] for rule in RULES.values()] + targets()


@pytest.mark.parametrize('text', EXPRESSIONS)
def test_every_metric_and_label_is_one_that_the_service_has(text):
  known, node = exported(), ast.parse(plain(text))
  for name, matched in selectors(node):
    assert name in known or name in OTHERS, name
    assert matched <= known.get(name, set()) | {'job', 'instance', 'pod'}, name
  of_these = set().union(*(known.get(name, set()) for name, _ in selectors(node)))
  assert grouped(node) <= of_these | {'instance', 'pod'}
  assert selectors(node)


def test_everything_that_the_service_has_is_on_the_board_and_in_the_documentation():
  base = lambda name: re.sub(r'_(bucket|count|sum)$', '', name)
  shown = {base(name) for text in targets() for name, _ in selectors(ast.parse(plain(text)))}
  names = {base(name) for name in exported() if not name.endswith('_created')}
  assert names <= shown, names - shown
  text = (LAUNCH.parent / 'configs' / 'README.md').read_text()
  documented = set(re.findall(r'`(llm_jax_\w+)', text))
  assert names == documented


def test_names_keep_to_the_conventions_of_prometheus():
  families = list(watch_lib.Watch([_Model])._registry.collect())
  assert len(families) > 20
  for family in families:
    assert family.name.startswith('llm_jax_') and family.documentation.endswith('.')
    assert not family.name.endswith(('_total', '_count', '_sum', '_bucket', '_ms', '_percent'))


# ---- the rules


SHARES, BOUNDS = {'0': 0.6, '1': 0.4}, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STEP, DAY = 30, 86400
QUIET = dict(
  up=1, ready=1, errors=0.002, late=0.002, refused=0.005, reads=0.05, writes=3.0, waiting=4.0,
  oldest=0.1, writing=3.0, compiled=0.0, failed=0.0, ones=0.4, length=60.0, unknown=0.001,
)  # fmt: skip
TROUBLES = {  # what changes; a rule fires then, and no other one
  'LlmJaxDown': dict(up=0),
  'LlmJaxNotReady': dict(ready=0),
  'LlmJaxErrors': dict(errors=0.08),
  'LlmJaxBroken': dict(late=0.2),
  'LlmJaxSlow': dict(reads=1.5),
  'LlmJaxSlowTexts': dict(writes=25.0),
  'LlmJaxQueueNearlyFull': dict(waiting=60.0),
  'LlmJaxRefuses': dict(refused=0.12),
  'LlmJaxNoFreeRow': dict(writing=100.0),
  'LlmJaxWaitsLong': dict(oldest=40.0),
  'LlmJaxCompiles': dict(compiled=0.2),
  'LlmJaxLoadFailed': dict(failed=0.02),
  'LlmJaxClassesDrift': dict(ones=0.8),
  'LlmJaxLengthsDrift': dict(length=200.0),
  'LlmJaxUnknownTokensDrift': dict(unknown=0.05),
}


def below(bounds, median):
  """The share of log-normal numbers that is below each bound, and 1 for the last one."""
  return [0.5 + 0.5 * math.erf(math.log(bound / median) / 0.5 / 2**0.5) for bound in bounds] + [1]


def world(hours, seed, trouble=None, begins=math.inf):
  """A store with the series of two instances over some hours.

  Traffic swings between a third and all of its height in a day, and everything is noisy.

  Args:
    hours: how long.
    seed: of the noise.
    trouble: what is not as in QUIET.
    begins: the second from which on.
  """
  rng = np.random.default_rng(seed)
  times = np.arange(0, hours * 3600, STEP)
  then = times >= begins
  level = lambda name: np.where(then, (trouble or {}).get(name, QUIET[name]), QUIET[name])
  up, found = level('up') > 0, []

  def add(name, values, **known):
    kept = up if name != 'up' else slice(None)
    found.append(series(name, labels(**known), times[kept], np.asarray(values)[kept]))

  def counts(per_step):
    return np.cumsum(rng.poisson(np.broadcast_to(per_step, times.shape)))

  def histogram(name, bounds, texts, median, **known):
    """Buckets of as many texts a step, whose median changes with the trouble."""
    quiet, other = below(bounds, QUIET[median]), below(bounds, level(median)[-1])
    total = np.zeros(times.shape)
    for i, bound in enumerate([*map(float, bounds), math.inf]):
      share = np.where(then, other[i] - (i and other[i - 1]), quiet[i] - (i and quiet[i - 1]))
      total = total + counts(np.maximum(texts * share, 0))
      le = '+Inf' if math.isinf(bound) else repr(bound)
      add(f'{name}_bucket', total, le=le, **known)
    add(f'{name}_count', total, **known)

  swing = 0.65 - 0.35 * np.cos(2 * np.pi * times / DAY)
  for instance in ('p1', 'p2'):
    at = dict(job='llm_jax', instance=instance)
    add('up', level('up'), **at)
    add('llm_jax_ready', level('ready'), **at)
    add('llm_jax_compiled_programs_total', counts(level('compiled')), **at)
    for reason, share in (('late', level('late')), ('failed', 0.0005), ('full', 0.005)):
      add('llm_jax_refused_total', counts(60 * swing * share), reason=reason, **at)
    add('llm_jax_requests_total', counts(6), route='/ready', status='503', **at)
    for model, route, median, texts in (
      ('reader', '/classify', 'reads', 60 * swing),
      ('writer', '/v1/completions', 'writes', 20 * swing),
    ):
      of = dict(model=model, **at)
      bad = {'500': level('errors'), '429': level('refused')}
      for status, share in ({'200': 1 - sum(bad.values())} | bad).items():
        add('llm_jax_requests_total', counts(texts * share), route=route, status=status, **at)
      histogram('llm_jax_request_seconds', watch_lib.SECONDS, texts, median, route=route, **of)
      histogram('llm_jax_input_tokens', BOUNDS, texts, 'length', **of)
      add('llm_jax_tokens_total', counts(texts * 70), kind='read', **of)
      add('llm_jax_unknown_tokens_total', counts(texts * 70 * level('unknown')), **of)
      add('llm_jax_training_unknown_share', np.full(times.shape, 0.001), **of)
      for result, rate in (('ok', 0.001), ('failed', level('failed'))):
        add('llm_jax_loads_total', counts(rate), result=result, **of)
      kind = 'answer' if model == 'reader' else 'write'
      add('llm_jax_waiting', rng.poisson(level('waiting') * swing), kind=kind, **of)
      add('llm_jax_waiting_limit', np.full(times.shape, 64), kind=kind, **of)
      slow = level('oldest') * rng.uniform(0.8, 1.2, times.shape)
      add('llm_jax_oldest_waiting_seconds', slow, kind=kind, **of)
    at_reader = dict(model='reader', **at)
    for name, share in SHARES.items():
      ones = level('ones') if name == '1' else 1 - level('ones')
      add('llm_jax_predictions_total', counts(60 * swing * ones), **{'class': name}, **at_reader)
      training = np.full(times.shape, share)
      add('llm_jax_training_class_share', training, **{'class': name}, **at_reader)
    for bound, share in zip(BOUNDS, below(BOUNDS, QUIET['length']), strict=False):
      training = np.full(times.shape, share)
      add('llm_jax_training_length_share', training, le=repr(float(bound)), **at_reader)
    of = dict(model='writer', **at)
    add('llm_jax_rows', np.full(times.shape, 8), **of)
    add('llm_jax_rows_writing', np.minimum(rng.poisson(level('writing')), 8), **of)
  return Store(found)


def hold(rule):
  """Seconds for which a rule must be true before it fires."""
  return ast.parse_duration(rule['for']).total_seconds() if 'for' in rule else 0.0


def fired(store, first, last, every, names=tuple(RULES)):
  """The alerts that fire, and at which time for the first time."""
  times = np.arange(first, last, every)
  found = {}
  for name in names:
    if seen := store.firing(RULES[name]['expr'], hold(RULES[name]), times):
      found[name] = min(times[0] for times in seen.values())
  return found


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
def test_a_quiet_day_has_no_alarm(seed):
  assert fired(world(30, seed), 6 * 3600, 30 * 3600, 60) == {}


def test_every_rule_has_a_trouble_of_its_own():
  assert TROUBLES.keys() == RULES.keys()


HALF = 8 * 3600
AFTER = {'LlmJaxClassesDrift': 8, 'LlmJaxLengthsDrift': 8, 'LlmJaxUnknownTokensDrift': 8}


@pytest.mark.slow
@pytest.mark.parametrize('name', TROUBLES)
def test_a_trouble_is_said_by_its_rule_and_by_no_other(name):
  hours = AFTER.get(name, 1)
  store = world(8 + hours, 5, TROUBLES[name], HALF)
  found = fired(store, HALF - 1800, HALF + hours * 3600, 60)
  assert found.keys() == {name}
  assert found[name] > HALF  # and not before it began


@pytest.mark.parametrize('name', RULES)
def test_a_rule_says_what_it_is_about(name):
  rule = RULES[name]
  assert rule.keys() - {'for'} == {'alert', 'expr', 'labels', 'annotations'}
  assert rule['labels']['severity'] in ('page', 'ticket') and name.startswith('LlmJax')
  assert rule['annotations']['summary'].endswith('.')
  assert 0 <= hold(rule) <= 3600
  # A label that the text names is one that the alert has.
  store = Store([])
  for label in re.findall(r'\$labels\.(\w+)', rule['annotations']['summary']):
    assert label in ('instance', 'model', 'route', 'reason')
  assert isinstance(store.value(rule['expr'], 0), dict)


# ---- the board


def test_the_board_is_one_that_grafana_opens():
  assert BOARD['title'] and BOARD['schemaVersion'] >= 39 and BOARD['uid']
  ids = [panel['id'] for panel in BOARD['panels']]
  assert len(set(ids)) == len(ids)
  names = [variable['name'] for variable in BOARD['templating']['list']]
  assert names == ['datasource', 'model']
  for panel in BOARD['panels']:
    place = panel['gridPos']
    assert place['x'] + place['w'] <= 24
  for panel in panels():
    assert panel['title'] and panel['fieldConfig']['defaults']['unit']
    assert panel['datasource'] == {'type': 'prometheus', 'uid': '${datasource}'}
    for target in panel['targets']:
      used = set(re.findall(r'\$(\w+)', target['expr'])) - {'__rate_interval', '__range'}
      assert used <= set(names) and target['legendFormat']


def test_panels_do_not_lie_on_one_another():
  taken = set()
  for panel in BOARD['panels']:
    place = panel['gridPos']
    for x in range(place['x'], place['x'] + place['w']):
      for y in range(place['y'], place['y'] + place['h']):
        assert (x, y) not in taken
        taken.add((x, y))
