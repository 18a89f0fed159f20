"""What every request passes, before a model of made-up answers."""

import contextlib
import threading
import time
import types

import numpy as np
import pytest
from starlette.testclient import TestClient

from llm_jax.serving import app as apps
from llm_jax.serving.batches import Batches
from llm_jax.serving.keys import Keys
from llm_jax.serving.served import Seen
from llm_jax.serving.watch import Watch

KEY = {'Authorization': 'Bearer a-key-of-this-test'}


@pytest.fixture
def made(tmp_path):
  """A client; what the model waits for; and the service."""
  opened = threading.Event()
  opened.set()

  def run(records):
    opened.wait(10)
    if any(record.get('text') == 'trouble' for record in records):
      raise RuntimeError('a secret of the inside')
    return [
      {'label': float('nan') if record['text'] == 'nan' else record['text']} for record in records
    ]

  def checked(record):
    if 'text' not in record:
      raise ValueError('a record needs text')
    record['text'].strip()
    return {'tokens': np.zeros(2, np.int32)}

  session = types.SimpleNamespace(check_record=checked)
  answers = Batches(run, most=1, wait=0, waiting=1)
  nothing = dict.fromkeys(('embeds', 'fills', 'writer'))
  model = types.SimpleNamespace(
    name='made',
    task='classify',
    answers=answers,
    session=session,
    seen=Seen(),
    used=contextlib.nullcontext,
    **nothing,
  )
  (tmp_path / 'keys').write_text('a-key-of-this-test\nanother-key-here at_once=1')
  keys = Keys(tmp_path / 'keys')
  service = apps.Service({'made': model}, keys, Watch([model]), most_bytes=100, ready=True)
  client = TestClient(apps.create(service), raise_server_exceptions=False, headers=KEY)
  yield client, opened, service
  opened.set()
  answers.close()


def until(true):
  ends = time.monotonic() + 10
  while not true():
    assert time.monotonic() < ends
    time.sleep(0.001)


def test_a_full_queue_and_a_key_that_asks_too_much(made):
  client, opened, service = made
  opened.clear()
  ask = lambda headers=KEY: client.post('/classify', json={'inputs': ['a']}, headers=headers)
  found = []
  threads = [threading.Thread(target=lambda: found.append(ask())) for _ in range(2)]
  answers = service.models['made'].answers
  for number, thread in enumerate(threads):
    thread.start()
    until(lambda number=number: answers._queue.unfinished_tasks > number == answers.waiting)
  full = ask()
  assert full.status_code == 429 and full.headers['retry-after'] == '1'
  assert full.json()['error']['type'] == 'server_error'
  service.seconds = 0.05
  limited = {'Authorization': 'Bearer another-key-here'}
  key = service.keys.find('another-key-here')
  assert key.enter() is None
  assert ask(limited).status_code == 429
  key.leave(0)
  opened.set()
  for thread in threads:
    thread.join()
  assert [said.json()['outputs'] for said in found] == [[{'label': 'a'}]] * 2
  assert key._open == 0
  numbers = client.get('/metrics').text
  for reason in ('full', 'key_limit'):
    assert f'llm_jax_refused_total{{reason="{reason}"}} 1.0' in numbers


def test_what_goes_wrong_inside_stays_inside(made):
  client, _, _ = made
  said = client.post('/classify', json={'inputs': ['trouble']})
  assert said.status_code == 500 and 'secret' not in said.text
  assert said.json()['error']['type'] == 'server_error'
  assert client.post('/classify', json={'inputs': ['fine']}).status_code == 200
  assert 'status="500"} 1.0' in client.get('/metrics').text


@pytest.mark.parametrize(
  ('body', 'status', 'words'),
  [
    (b'{"inputs": ["%s"]}' % (b'a' * 100), 413, 'more than 100 bytes'),
    (b'{"inputs": [3]}', 400, 'texts, pairs of texts, or objects'),
    (b'{"inputs": ["a"], "model": "x"}', 404, 'there are made'),
    (b'{"inputs": [{"txt": "a"}]}', 400, 'text'),
    (b'{"inputs": [{"text": 3}]}', 400, 'inputs[0] has a field of a kind'),
  ],
)
def test_bodies_that_are_refused(made, body, status, words):
  said = made[0].post('/classify', content=body)
  assert said.status_code == status and words in said.json()['error']['message']
  assert made[0].get('/classify').status_code == 405
  assert made[0].post('/tag', json={'inputs': ['a']}).status_code == 400


def test_numbers_that_are_not_finite_are_a_fault_of_the_model(made):
  client, _, _ = made
  said = client.post('/classify', json={'inputs': ['nan']})
  assert said.status_code == 500 and 'not finite' in said.json()['error']['message']
  assert client.post('/classify', json={'inputs': ['fine']}).status_code == 200
