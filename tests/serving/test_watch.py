"""What the service counts, beside what the model was trained on; and what it never says."""

import json
import logging
import threading

import jax
import jax.numpy as jnp
import pytest
from absl import logging as absl_logging
from prometheus_client import parser
from starlette.testclient import TestClient

from llm_jax.core import faults
from llm_jax.programs import summary
from llm_jax.serving import app as apps
from llm_jax.serving.watch import Watch


@pytest.fixture
def client(serving):
  """A client of a service whose numbers begin at 0."""
  headers = {'Authorization': f'Bearer {serving.KEY}'}
  app = apps.create(serving.make())
  yield TestClient(app, raise_server_exceptions=False, headers=headers)


def numbers(client):
  """A function from the name of a metric and labels to its value; 0 where there is none."""
  families = list(parser.text_string_to_metric_families(client.get('/metrics').text))
  samples = [sample for family in families for sample in family.samples]

  def value(name, **labels):
    fits = lambda sample: (
      sample.name == f'llm_jax_{name}' and labels.items() <= sample.labels.items()
    )
    return sum(sample.value for sample in samples if fits(sample))

  return value


def test_a_training_set_is_described_where_it_was_trained_on(serving):
  found = summary.read(serving.folders['reader'])
  texts = [f'{n} some {"good" if n % 2 else "bad"} text' for n in range(40)]
  held = 40 - found.documents
  assert 0 < held < 20 and found.sampled == found.documents and found.unknown_share == 0
  assert found.lengths[8] == 0 and found.lengths[32] == 1
  most = sum(len(text) <= 16 for text in texts)
  assert abs(found.lengths[16] * found.documents - most) <= held
  assert sum(found.classes.values()) == pytest.approx(1) and found.classes.keys() == {'0', '1'}
  assert json.loads((serving.folders['writer'] / 'data.json').read_text())['classes'] == {}


def test_inputs_stand_beside_those_of_the_training(client, serving):
  texts = ['12 some good text', '7 some bad text', 'x' * 40]
  assert client.post('/classify', json={'inputs': texts}).status_code == 200
  value, known = numbers(client), summary.read(serving.folders['reader'])
  assert value('input_tokens_count', model='reader') == 3
  assert value('input_tokens_sum', model='reader') == sum(map(len, texts))
  assert value('input_tokens_bucket', model='reader', le='16.0') == 1
  assert value('tokens_total', model='reader', kind='read') == sum(map(len, texts))
  assert value('unknown_tokens_total', model='reader') == 0
  assert value('predictions_total', model='reader') == 3
  assert value('training_examples', model='reader') == known.documents
  assert value('training_unknown_share', model='reader') == 0
  for name, share in known.classes.items():
    assert value('training_class_share', **{'class': name}) == share
  assert value('training_length_share', model='reader', le='16.0') == known.lengths[16]
  # A prompt is no whole conversation, but what an encoder-decoder reads is.
  assert not value('training_length_share', model='writer')
  assert value('training_length_share', model='answerer', le='65536.0') == 1


def test_batches_rows_tokens_and_time_are_counted_by_model(client, serving):
  before = numbers(client)
  body = dict(model='writer', prompt=['ab', 'cde'], max_tokens=3, min_tokens=3)
  assert client.post('/v1/completions', json=body).status_code == 200
  assert client.post('/v1/embeddings', json={'input': ['a', 'b']}).status_code == 200
  assert client.post('/classify', json={'inputs': ['a'], 'model': 'nobody'}).status_code == 404
  assert client.get('/nowhere/at/all').status_code == 404
  value = numbers(client)
  assert value('tokens_total', model='writer', kind='written') == 6
  assert value('input_tokens_count', model='writer') == 2
  assert value('request_seconds_count', route='/v1/completions', model='writer') == 1
  assert value('request_seconds_count', route='/classify', model='') == 1
  assert value('request_seconds_count', route='other', model='') == 1
  assert value('requests_total', route='/classify', status='404') == 1
  of = dict(model='reader', kind='embed')
  assert value('batch_items_total', **of) - before('batch_items_total', **of) == 2
  assert value('batches_total', **of) - before('batches_total', **of) == 1
  assert value('batch_limit_items', **of) == 4 * serving.LIMITS.batch
  assert value('rows', model='writer') == serving.LIMITS.rows
  assert value('waiting_limit', model='writer', kind='write') == serving.LIMITS.waiting
  assert value('waiting') == value('oldest_waiting_seconds') == 0
  assert value('ready') == 1


def test_nothing_is_compiled_once_it_is_warm(client, serving):
  for path, body in (
    ('/classify', {'inputs': ['one', 'two']}),
    ('/v1/embeddings', {'input': 'some text'}),
    ('/v1/completions', {'model': 'writer', 'prompt': 'some', 'max_tokens': 2}),
  ):
    assert client.post(path, json=body).status_code == 200
  assert numbers(client)('compiled_programs_total') == 0


def test_what_is_compiled_is_counted_once_and_not_while_a_model_is_made_ready():
  Watch([])
  jax.monitoring.clear_event_listeners()  # as others may, who do not know of this one
  first, second = Watch([]), Watch([])
  count = lambda watch: float(
    watch.text().decode().split('compiled_programs_total ')[-1].split()[0]
  )
  number = jnp.ones(7)
  jax.jit(lambda x: x * 3.5)(number)
  assert count(first) == count(second) > 0
  before, third = count(first), Watch([])
  with third.warming():
    jax.jit(lambda x: x * 4.5)(number)
    other = threading.Thread(target=lambda: jax.jit(lambda x: x * 5.5)(number))
    other.start()
    other.join()
  assert count(third) == 1 == count(first) - before  # that of the other thread


def test_a_model_that_was_never_loaded_anew_has_a_0(client, serving):
  assert numbers(client)('loads_total') == 0
  watch = Watch(serving.models.values())
  watch.loaded('reader', True)
  watch.loaded('reader', False)
  text = watch.text().decode()
  assert 'llm_jax_loads_total{model="reader",result="failed"} 1.0' in text
  assert 'llm_jax_loads_total{model="writer",result="failed"} 0.0' in text


class _Kept(logging.Handler):
  """Everything that is logged, however unimportant."""

  def __init__(self):
    super().__init__(0)
    self.said = []

  def emit(self, record):
    self.said.append(record.getMessage() + str(record.exc_info and record.exc_info[1]))


@pytest.fixture
def logged():
  """All that is logged."""
  handler, loggers = _Kept(), [logging.getLogger(), absl_logging.get_absl_logger()]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.addHandler(handler)
    logger.setLevel(1)
  yield handler.said
  for logger, level in zip(loggers, levels, strict=True):
    logger.removeHandler(handler)
    logger.setLevel(level)


SECRET = 'zq9-unheard-of'


@pytest.mark.parametrize(
  ('path', 'body', 'status'),
  [
    ('/classify', {'inputs': [SECRET]}, 200),
    ('/classify', {'inputs': [SECRET * 50]}, 200),  # longer than a row
    ('/classify', {'inputs': [{'txt': SECRET}]}, 400),
    ('/classify', {'inputs': [SECRET], SECRET: 1}, 400),
    ('/classify', {'inputs': [SECRET], 'model': SECRET}, 404),
    ('/v1/embeddings', {'input': SECRET}, 200),
    ('/v1/completions', {'model': 'writer', 'prompt': SECRET, 'max_tokens': 4}, 200),
    ('/v1/completions', {'model': 'writer', 'prompt': SECRET, 'stop': 3}, 400),
    ('/v1/chat/completions', {'model': 'writer', 'messages': SECRET}, 400),
    ('/fill', {'inputs': [SECRET]}, 400),
    ('/tokenize', {'input': SECRET}, 200),
  ],
)
def test_no_text_of_a_request_is_logged(serving, logged, path, body, status):
  headers = {'Authorization': f'Bearer {serving.KEY}'}
  with serving.running(serving.make()) as address:
    from httpx2 import post

    assert post(f'{address}{path}', json=body, headers=headers).status_code == status
  mine = [said for said in logged if 'httpx' not in said]
  assert SECRET not in ' '.join(mine)


def test_a_defect_that_quotes_a_text_is_logged_without_it(serving, logged, monkeypatch):
  def fails(texts):
    raise RuntimeError(f'cannot read {texts}') from ValueError(SECRET)

  reader = serving.models['reader']
  monkeypatch.setattr(reader.answers, '_run', fails)
  headers = {'Authorization': f'Bearer {serving.KEY}'}
  with serving.running(serving.make()) as address:
    from httpx2 import post

    said = post(f'{address}/classify', json={'inputs': [SECRET]}, headers=headers)
  assert said.status_code == 500 and SECRET not in said.text
  text = ' '.join(logged)
  assert SECRET not in text and 'RuntimeError' in text and 'test_watch.py' in text
  assert 'ValueError' in text and 'Traceback' not in text


def test_what_the_machine_says_is_logged():
  error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: no memory')
  assert 'no memory' in faults.described(error)
  assert 'no memory' not in faults.described(RuntimeError('no memory'))
