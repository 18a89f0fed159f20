"""/openapi.json: it says of every route what the tables that check the bodies say."""

import json
import types

import httpx2
import jsonschema
import openapi_spec_validator
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.serving import app as apps
from llm_jax.serving import fields, openapi
from llm_jax.serving.fields import Refused

ROUTES = apps.create(types.SimpleNamespace(watch=types.SimpleNamespace()))._app.routes
DOCUMENT = openapi.document(ROUTES, apps.FORMS, apps.OPEN)
# What JSON Schema cannot tell apart is not among them: halves of characters, which no UTF-8 holds,
# and NaN, which is no JSON and which Python reads.
ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(['role', 'content', 'text']), inner, max_size=3)
  ),
  max_leaves=6,
)
PATHS = st.sampled_from([*apps.FORMS])


def schema_of(path):
  return DOCUMENT['paths'][path]['post']['requestBody']['content']['application/json']['schema']


def valid(schema):
  """Values that a schema allows, of the words that ours use."""
  if 'anyOf' in schema:
    return st.one_of(*map(valid, schema['anyOf']))
  if 'oneOf' in schema:  # of objects that differ by a field
    outer = {key: value for key, value in schema.items() if key != 'oneOf'}
    needed = outer['required']
    forms = (form | {'required': needed + form.get('required', [])} for form in schema['oneOf'])
    return st.one_of(*(valid(outer | form) for form in forms))
  if 'const' in schema:
    return st.just(schema['const'])
  if 'enum' in schema:
    return st.sampled_from(schema['enum'])
  match schema.get('type'):
    case 'string':
      return st.text(min_size=schema.get('minLength', 0), max_size=8)
    case 'array':
      most = min(schema.get('maxItems', 4), 4)
      return st.lists(valid(schema['items']), min_size=schema.get('minItems', 0), max_size=most)
    case 'integer':
      whole = st.integers(schema['minimum'], schema['maximum'])
      return whole | whole.filter(lambda n: n < 2**53).map(float)
    case 'number':
      limits = schema['minimum'], schema['maximum']
      return st.floats(*limits) | st.integers(*map(round, limits)).filter(limits[0].__le__)
    case 'boolean':
      return st.booleans()
    case 'null':
      return st.none()
    case 'object':
      known = {name: valid(one) for name, one in schema.get('properties', {}).items()}
      needed = schema.get('required', ())
      optional = {name: one for name, one in known.items() if name not in needed}
      return st.fixed_dictionaries({name: known[name] for name in needed}, optional=optional)
  assert not schema, schema  # a word of JSON Schema that this function does not know
  return ANYTHING


VALID = {path: valid(schema_of(path)) for path in apps.FORMS}


def is_read(path, body):
  try:
    fields.read(json.dumps(body).encode(), apps.FORMS[path])
  except Refused:
    return False
  return True


def is_valid(schema, value):
  return jsonschema.Draft202012Validator(schema).is_valid(value)


def test_it_is_openapi():
  openapi_spec_validator.validate(json.loads(json.dumps(DOCUMENT)))


def test_all_routes_are_in_it_and_nothing_else():
  routes = {
    (route.path.replace(':path}', '}'), method.lower())
    for route in ROUTES
    for method in route.methods - {'HEAD'}
  }
  described = {(path, method) for path, item in DOCUMENT['paths'].items() for method in item}
  assert described == routes and len(routes) > 14
  for path, method in routes:
    operation = DOCUMENT['paths'][path][method]
    assert (operation.get('security') == []) == (path in apps.OPEN), path
    assert ('401' in operation['responses']) == (path not in apps.OPEN), path
    assert ('requestBody' in operation) == (path in apps.FORMS) == (method == 'post'), path


@given(PATHS.flatmap(lambda path: st.tuples(st.just(path), VALID[path])))
def test_a_valid_body_is_read(case):
  path, body = case
  assert is_valid(schema_of(path), body) and is_read(path, body)


@given(PATHS.flatmap(lambda path: st.tuples(st.just(path), VALID[path])), st.data())
def test_a_body_is_read_where_it_is_valid_and_nowhere_else(case, data):
  path, body = case
  name = data.draw(st.sampled_from([*apps.FORMS[path], 'none_such']))
  if data.draw(st.booleans()):
    body = body | {name: data.draw(ANYTHING)}
  else:
    body = {key: value for key, value in body.items() if key != name}
  assert is_valid(schema_of(path), body) == is_read(path, body)


@pytest.mark.parametrize(
  ('path', 'body'),
  [
    ('/v1/completions', {'prompt': 'a', 'temperature': 10**400}),
    ('/v1/completions', {'prompt': 'a', 'n': 1.5}),
    ('/v1/completions', {'prompt': ['a'] * 2049}),
    ('/v1/chat/completions', {'messages': [{'role': 'user', 'content': [{'type': 'text'}]}]}),
    ('/classify', {'inputs': [['a', 'b', 'c']]}),
    ('/fill', {'inputs': None}),
  ],
)
def test_bodies_that_neither_allows(path, body):
  assert not is_valid(schema_of(path), body) and not is_read(path, body)


@pytest.mark.slow
def test_answers_are_as_described(serving):
  asked = {
    '/v1/embeddings': dict(model='reader', input='a'),
    '/v1/completions': dict(model='writer', prompt='a', max_tokens=2),
    '/v1/chat/completions': dict(
      model='writer', messages=[dict(role='user', content='a')], max_tokens=2
    ),
    '/classify': dict(model='reader', inputs=['a']),
    '/tokenize': dict(input='a'),
    '/openapi.json': None,
    '/health': None,
    '/ready': None,
    '/v1/models': None,
  }
  headers = {'Authorization': f'Bearer {serving.KEY}'}
  with serving.running(serving.make()) as address:
    for path, body in asked.items():
      method = 'GET' if body is None else 'POST'
      said = httpx2.request(method, f'{address}{path}', json=body, headers=headers, timeout=60)
      described = DOCUMENT['paths'][path][method.lower()]['responses']['200']
      schema = described['content']['application/json']['schema']
      jsonschema.validate(said.json(), schema, jsonschema.Draft202012Validator)
      if path == '/openapi.json':
        assert said.json() == json.loads(json.dumps(DOCUMENT))
    refused = httpx2.get(f'{address}/v1/models').json()
    jsonschema.validate(refused, DOCUMENT['components']['schemas']['Error'])
    models = httpx2.get(f'{address}/v1/models', headers=headers).json()['data']
    routes = {model['id']: model['routes'] for model in models}
    assert routes['reader'] == ['/v1/embeddings', '/classify', '/tokenize']
    assert '/v1/chat/completions' in routes['writer']
    assert routes['answerer'] == ['/v1/completions', '/tokenize']
