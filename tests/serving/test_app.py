"""The service over HTTP: it answers as `llm_jax.open` does, everybody who may ask."""

import base64
import concurrent.futures
import json
import random
import time

import httpx2
import jax
import jsonschema
import numpy as np
import openai
import pytest

import llm_jax
from llm_jax.generation.sampling import Sampling

pytestmark = pytest.mark.slow
TEXTS = ['good text', 'a', 'some bad text that is a little longer than the others', 'x' * 50]


@pytest.fixture
def client(serving):
  with serving.running(serving.make()) as address, open_client(serving, address) as found:
    yield found


def open_client(serving, address, key=None):
  headers = {'Authorization': f'Bearer {key or serving.KEY}'}
  return httpx2.Client(base_url=address, headers=headers, timeout=60)


@pytest.fixture(scope='module')
def alone(folders):
  """The same models, opened as the command line does."""
  return {name: llm_jax.open(folder) for name, folder in folders.items()}


def test_openais_client_works_unchanged(serving, alone):
  with serving.running(serving.make()) as address:
    api = openai.OpenAI(base_url=f'{address}/v1', api_key=serving.KEY, max_retries=0)
    assert [model.id for model in api.models.list()] == list(serving.models)
    assert api.models.retrieve('writer').id == 'writer'
    found = api.embeddings.create(model='reader', input=TEXTS)  # which asks for base64
    vectors = np.array([one.embedding for one in found.data], np.float32)
    np.testing.assert_allclose(vectors, alone['reader'].embed(TEXTS), atol=1e-6)
    assert found.usage.prompt_tokens == sum(map(len, TEXTS))
    whole = api.completions.create(model='writer', prompt='hello', max_tokens=9, temperature=0)
    (text,) = alone['writer'].complete(['hello'], max_new_tokens=9, temperature=0)
    assert whole.choices[0].text == text and whole.choices[0].finish_reason in ('length', 'stop')
    assert whole.usage.completion_tokens <= 9 and whole.usage.prompt_tokens > 5
    messages = [{'role': 'user', 'content': 'hello'}]
    given = dict(model='writer', messages=messages, max_tokens=12, seed=3, temperature=1.0)
    answer = api.chat.completions.create(**given).choices[0].message.content
    drawn = Sampling(max_new_tokens=12, seed=3, temperature=1.0)
    assert answer == alone['writer'].chat(messages, sampling=drawn)
    stream = api.chat.completions.create(
      **given, stream=True, stream_options={'include_usage': True}
    )
    parts = list(stream)
    assert ''.join(p.choices[0].delta.content or '' for p in parts if p.choices) == answer
    assert parts[-1].usage.completion_tokens <= 12 and parts[0].choices[0].delta.role == 'assistant'
    several = api.completions.create(model='writer', prompt=['a', 'b'], n=2, max_tokens=5, seed=1)
    texts = alone['writer'].complete(['a', 'b'], max_new_tokens=5, seed=1, num_return_sequences=2)
    assert [choice.text for choice in several.choices] == texts
    check_probabilities(api)
    check_forms(api)
    with pytest.raises(openai.NotFoundError, match='There is no model of this name'):
      api.embeddings.create(model='none', input='a')
    with pytest.raises(openai.BadRequestError, match='max_tokens=0 must be a whole number'):
      api.completions.create(model='writer', prompt='a', max_tokens=0)
    wrong = openai.OpenAI(base_url=f'{address}/v1', api_key='wrong-key', max_retries=0)
    with pytest.raises(openai.AuthenticationError):
      wrong.models.list()


def check_probabilities(api):
  """Of each token, whole and streamed, in both forms that OpenAI has."""
  given = dict(model='writer', max_tokens=6, seed=2)
  talk = given | dict(messages=[{'role': 'user', 'content': 'hello'}], logprobs=True)
  said = api.chat.completions.create(**talk, top_logprobs=3)
  whole, count = said.choices[0], said.usage.completion_tokens
  parts = list(api.chat.completions.create(**talk, top_logprobs=3, stream=True))
  said = [p.choices[0].logprobs.content for p in parts if p.choices[0].logprobs]
  assert [one for content in said for one in content] == whole.logprobs.content
  assert len(whole.logprobs.content) == count - (whole.finish_reason == 'stop')
  for one in whole.logprobs.content:
    best = [other.logprob for other in one.top_logprobs]
    assert len(best) == 3 and sorted(best, reverse=True) == best and one.logprob <= best[0] <= 0
  texts = api.completions.create(**given, prompt='hello', logprobs=2).choices[0]
  likely = texts.logprobs
  assert likely.text_offset == [sum(map(len, likely.tokens[:i])) for i in range(len(likely.tokens))]
  assert len(likely.token_logprobs) == len(likely.top_logprobs) == len(likely.tokens) > 0
  assert all(0 < len(others) <= 2 for others in likely.top_logprobs)  # halves of signs look alike
  bare = api.completions.create(**given, prompt='hello', logprobs=0).choices[0].logprobs
  assert bare.token_logprobs == likely.token_logprobs and bare.top_logprobs[0] == {}
  assert api.completions.create(**given, prompt='hello').choices[0].logprobs is None
  with pytest.raises(openai.BadRequestError, match='top_logprobs needs logprobs=true'):
    api.chat.completions.create(**talk | dict(logprobs=False), top_logprobs=3)


def check_forms(api):
  """Texts that must be JSON of a schema, or what a grammar says."""
  given = dict(model='writer', messages=[{'role': 'user', 'content': 'hello'}], n=3)
  schema = {
    'type': 'object',
    'properties': {'kind': {'enum': ['a', 'bc']}, 'count': {'type': 'integer', 'maximum': 99}},
    'required': ['kind', 'count'],
    'additionalProperties': False,
  }
  form = {'type': 'json_schema', 'json_schema': {'name': 'it', 'schema': schema}}
  said = api.chat.completions.create(**given, response_format=form, max_tokens=50, seed=3)
  for choice in said.choices:
    assert jsonschema.validate(json.loads(choice.message.content), schema) is None
    assert choice.finish_reason == 'stop'
  form = {'type': 'grammar', 'syntax': 'regex', 'definition': '(yes|no){2}'}
  for choice in api.chat.completions.create(**given, response_format=form, seed=4).choices:
    assert choice.message.content in ('yesyes', 'yesno', 'noyes', 'nono')
  free = api.chat.completions.create(**given, response_format={'type': 'text'}, max_tokens=4)
  assert len(free.choices) == 3
  wrong = {'type': 'json_schema', 'json_schema': {'name': 'it', 'schema': {'type': 'nothing'}}}
  for form, words in ((wrong, 'Invalid type: nothing'), ({'type': 'xml'}, 'an object with type')):
    with pytest.raises(openai.BadRequestError, match=words):
      api.chat.completions.create(**given, response_format=form)


def test_many_at_once_get_what_each_gets_alone_and_nothing_is_compiled(serving, alone, client):
  draw = random.Random(0)
  asked = []
  for number in range(64):
    kind = ('embed', 'classify', 'complete', 'fill')[number % 4]
    text = ''.join(draw.choices('ab cd', k=draw.randrange(1, 40 if kind == 'complete' else 180)))
    asked.append((kind, text, draw.randrange(1, 20), draw.randrange(100)))

  def ask(case):
    kind, text, count, seed = case
    if kind == 'embed':
      return post(client, '/v1/embeddings', model='reader', input=text)['data'][0]['embedding']
    if kind == 'classify':
      return post(client, '/classify', model='reader', inputs=[text])['outputs'][0]
    if kind == 'fill':
      masked = f'{text[:90]}[MASK]'
      return post(client, '/fill', model='filler', inputs=[masked], top=3)['outputs'][0]
    given = dict(model='writer', prompt=text, max_tokens=count, seed=seed)
    return post(client, '/v1/completions', **given)['choices'][0]['text']

  def by_the_command_line(case):
    kind, text, count, seed = case
    if kind == 'embed':
      return alone['reader'].embed([text])[0].tolist()
    if kind == 'classify':
      return alone['reader'].predict([text])[0]['probabilities']
    if kind == 'fill':
      return alone['filler'].fill([f'{text[:90]}[MASK]'], 3)[0].text
    return alone['writer'].complete([text], max_new_tokens=count, seed=seed)[0]

  wanted, compiled = list(map(ask, asked)), []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
  try:
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
      found = list(pool.map(ask, asked))
  finally:
    jax.monitoring.clear_event_listeners()
  assert found == wanted  # to the bit
  assert not [name for name in compiled if 'backend_compile' in name]
  for case, one in zip(asked, found, strict=True):
    if case[0] in ('complete', 'fill'):
      assert (one if case[0] == 'complete' else one['text']) == by_the_command_line(case)
    else:  # whose batches have another shape
      numbers = one['probabilities'] if case[0] == 'classify' else one
      assert numbers == pytest.approx(by_the_command_line(case), abs=1e-6)


def test_an_encoder_decoder_answers(client, alone):
  texts = ['source 3', 'another one']
  given = dict(prompt=texts, max_tokens=20, temperature=0)
  said = post(client, '/v1/completions', model='answerer', **given)
  wanted = alone['answerer'].complete(texts, max_new_tokens=20, temperature=0)
  assert [choice['text'] for choice in said['choices']] == wanted
  none = client.post('/v1/embeddings', json=dict(model='answerer', input='a'))
  assert none.status_code == 400 and 'gives no vectors' in none.text


def post(client, route, **body):
  said = client.post(route, json=body)
  assert said.status_code == 200, said.text
  return said.json()


def test_every_route_asks_for_a_key(serving, client):
  routes = [(route.path, next(iter(route.methods - {'HEAD'}))) for route in routes_of(serving)]
  assert len(routes) > 12
  for path, method in routes:
    path = path.replace('{name:path}', 'reader')
    for headers in ({}, {'Authorization': 'Bearer nobody-knows'}, {'Authorization': serving.KEY}):
      bare = httpx2.request(method, f'{client.base_url}{path}', headers=headers, json={})
      assert bare.status_code == (200 if path in ('/', '/health', '/ready') else 401), path
  assert client.get('/nowhere').status_code == 404
  assert httpx2.get(f'{client.base_url}/nowhere').status_code == 401


def routes_of(serving):
  from llm_jax.serving import app

  return app.create(serving.make())._app.routes


@pytest.mark.parametrize(
  ('route', 'body', 'status', 'words'),
  [
    ('/v1/embeddings', b'{', 400, 'must be JSON'),
    ('/v1/embeddings', b'[]', 400, 'a JSON object'),
    ('/v1/embeddings', b'{"input": "a", "model": "reader", "dimensions": 900}', 400, 'have 64'),
    ('/v1/embeddings', b'"' + b'x' * 2**21, 413, 'more than 1048576 bytes'),
    ('/v1/completions', b'{"model": "reader", "prompt": "a"}', 400, 'is an encoder'),
    ('/v1/completions', b'{"model": "writer", "prompt": "a", "max_tokens": 999}', 400, 'max_len'),
    ('/v1/completions', b'{"model": "writer", "prompt": "%s"}' % (b'a' * 300), 400, 'shorten'),
    ('/v1/chat/completions', b'{"model": "writer", "messages": []}', 400, 'a list of messages'),
    (
      '/v1/chat/completions',
      b'{"model": "writer", "messages": [{"role": "assistant", "content": "a"}]}',
      400,
      'must begin with system or user',
    ),
    ('/tag', b'{"model": "reader", "inputs": ["a"]}', 400, 'ask /classify'),
    ('/classify', b'{"model": "reader", "inputs": [{"txt": "a"}]}', 400, 'text'),
    ('/fill', b'{"model": "reader", "inputs": ["a [MASK]"]}', 400, 'no masked-LM head'),
  ],
)
def test_what_cannot_be_answered_is_named(client, route, body, status, words):
  said = client.post(route, content=body)
  assert said.status_code == status and words in said.json()['error']['message']


def test_limits_of_a_key_and_a_service_that_is_not_ready(serving):
  service = serving.make('a-limited-key per_minute=2')
  with serving.running(service) as address, open_client(serving, address, 'a-limited-key') as one:
    service.ready = False
    late = one.post('/tokenize', json={'input': 'ab'})
    assert late.status_code == 503 and late.headers['retry-after'] == '1'
    service.ready = True
    ids = serving.models['reader'].session.tokenizer.encode('ab').tolist()
    assert one.post('/tokenize', json={'input': 'ab'}).json()['tokens'] == [ids]
    refused = one.post('/tokenize', json={'input': 'ab'})
    assert refused.status_code == 429 and 50 <= int(refused.headers['retry-after']) <= 60
    assert httpx2.get(f'{address}/health').status_code == 200
  service = serving.make('a-limited-key tokens_per_minute=6')
  with serving.running(service) as address, open_client(serving, address, 'a-limited-key') as one:
    for status in (200, 200, 200, 429):  # of two tokens each
      assert one.post('/v1/embeddings', json={'input': 'ab'}).status_code == status


def test_a_client_that_leaves_frees_its_row(serving, client):
  writer = serving.models['writer'].writer
  body = dict(model='writer', prompt='a', max_tokens=90, stream=True)
  with client.stream('POST', '/v1/completions', json=body) as stream:
    next(stream.iter_lines())
  until = time.monotonic() + 10
  while writer.writing and time.monotonic() < until:
    time.sleep(0.01)
  assert writer.writing == writer.waiting == 0
  with pytest.raises(httpx2.ReadTimeout):
    client.post('/v1/completions', json=body | {'stream': False, 'n': 8}, timeout=0.05)
  while (writer.writing or writer.waiting) and time.monotonic() < until:
    time.sleep(0.01)
  assert writer.writing == writer.waiting == 0


def test_an_answer_that_takes_too_long(serving):
  with serving.running(serving.make(seconds=0.01)) as address:
    with open_client(serving, address) as one:
      said = one.post('/v1/completions', json=dict(model='writer', prompt='a', max_tokens=90, n=8))
      assert said.status_code == 504
      body = dict(model='writer', prompt='a', max_tokens=90, n=8, stream=True)
      assert 'took too long' in one.post('/v1/completions', json=body).text


def test_numbers_are_those_of_the_answers(serving, client):
  for _ in range(3):
    post(client, '/v1/embeddings', model='reader', input='ab')
  client.post('/v1/embeddings', content=b'{')
  client.get('/nowhere/at/all')
  text = client.get('/metrics').text
  assert 'llm_jax_requests_total{route="/v1/embeddings",status="200"} 3.0' in text
  assert 'llm_jax_requests_total{route="/v1/embeddings",status="400"} 1.0' in text
  assert 'llm_jax_requests_total{route="other",status="404"} 1.0' in text
  assert 'llm_jax_tokens_total{kind="read",model="reader"} 6.0' in text
  assert 'llm_jax_waiting{kind="write",model="writer"} 0.0' in text
  vector = post(client, '/v1/embeddings', model='reader', input='ab', encoding_format='base64')
  numbers = np.frombuffer(base64.b64decode(vector['data'][0]['embedding']), '<f4')
  assert numbers.shape == (64,) and np.linalg.norm(numbers) == pytest.approx(1, abs=1e-5)
