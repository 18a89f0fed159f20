"""Bodies of all kinds: an answer or an error that says what is wrong, never a defect, never a wait.

How many bodies each route gets: LLM_JAX_FUZZ, 40 by default.
"""

import json
import os

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_jax.serving import app as apps

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get('LLM_JAX_FUZZ', '40'))
STATUSES = {200, 400, 404, 413, 429}
words = st.text(max_size=12) | st.sampled_from(['[MASK]', 'a b c', '', '\x00', 'x' * 300, '\ud800'])
numbers = st.integers(-3, 5) | st.integers() | st.floats() | st.sampled_from([10**400, 1e308])
scalars = st.none() | st.booleans() | numbers | words
anything = st.recursive(
  scalars,
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
  max_leaves=8,
)
records = st.lists(
  words | st.lists(words, min_size=2, max_size=2) | st.fixed_dictionaries({'text': anything}),
  min_size=1,
  max_size=4,
)
messages = st.lists(
  st.fixed_dictionaries(
    {'role': st.sampled_from(['user', 'assistant', 'system', 'tool', '']), 'content': words}
  ),
  max_size=3,
)
forms = st.sampled_from(
  [
    {'type': 'text'},
    {'type': 'json_object'},
    {'type': 'json_schema', 'json_schema': {'schema': {'type': 'integer'}}},
    {'type': 'grammar', 'syntax': 'regex', 'definition': 'a|b+'},
    {'type': 'grammar', 'syntax': 'lark', 'definition': 'start: "a" start'},
  ]
)
GOOD = {  # what a field should be, mostly
  'input': words | st.lists(words, max_size=4),
  'prompt': words | st.lists(words, max_size=3),
  'inputs': records,
  'messages': messages,
  'max_tokens': st.integers(1, 9),
  'max_completion_tokens': st.integers(1, 9),
  'min_tokens': st.integers(0, 3),
  'n': st.integers(1, 3),
  'temperature': st.floats(0, 2),
  'top_p': st.floats(0, 1),
  'min_p': st.floats(0, 1),
  'top_k': st.integers(0, 9),
  'repetition_penalty': st.floats(0.5, 2),
  'seed': st.integers(0, 2**32 - 1),
  'stop': words | st.lists(words, max_size=3),
  'stream': st.booleans(),
  'stream_options': st.just({'include_usage': True}),
  'logprobs': st.booleans() | st.integers(0, 3),
  'top_logprobs': st.integers(0, 3),
  'response_format': forms,
  'dimensions': st.integers(1, 40),
  'encoding_format': st.sampled_from(['float', 'base64']),
  'top': st.integers(1, 9),
}
NEEDED = ('input', 'inputs', 'prompt', 'messages')


def bodies(route):
  """Bodies for a route: mostly right, a field wrong in some, or anything at all."""
  names = st.sampled_from(['reader', 'writer', 'answerer', 'filler']) | words
  known = {name: GOOD.get(name, words) for name in apps.FORMS[route] if name != 'model'}
  known |= {'max_tokens': GOOD['max_tokens']} if 'prompt' in known or 'messages' in known else {}
  needed = {name: known.pop(name) for name in NEEDED if name in known}
  right = st.fixed_dictionaries({'model': names} | needed, optional=known)
  wrong = st.tuples(right, st.sampled_from([*needed, *known]), anything)
  spoilt = wrong.map(lambda found: found[0] | {found[1]: found[2]})
  return right | spoilt | anything


def written(body):
  """As JSON, whatever Python's json can write."""
  return json.dumps(body).encode()


@pytest.mark.parametrize('route', apps.FORMS)
def test_any_body_gets_an_answer_or_an_error(serving, route):

  @settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
  @given(bodies(route).map(written) | st.binary(max_size=40))
  def ask(content):
    said = client.post(route, content=content)
    assert said.status_code in STATUSES, (said.status_code, said.text)
    if said.status_code != 200:
      error = said.json()['error']
      assert error['message'] and error['type']
    elif said.headers['content-type'].startswith('text/event-stream'):
      assert said.text.endswith('data: [DONE]\n\n') and '"server_error"' not in said.text
    else:
      json.loads(said.content, parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))

  headers = {'Authorization': f'Bearer {serving.KEY}'}
  with serving.running(serving.make()) as address:
    with httpx2.Client(base_url=address, headers=headers, timeout=30) as client:
      ask()
      assert client.get('/health').status_code == 200
