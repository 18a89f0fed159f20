"""Bodies: whatever they hold, they are read or refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.serving import bodies, fields
from llm_jax.serving.fields import Refused

KNOWN = (bodies.EMBEDDINGS, bodies.COMPLETIONS, bodies.CHAT)
VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=8,
)


def names(known):
  return st.sampled_from([*known]) | st.text(max_size=8)


@given(
  st.sampled_from(KNOWN).flatmap(
    lambda known: st.tuples(st.just(known), st.dictionaries(names(known), VALUES, max_size=6))
  )
)
def test_any_body_is_read_or_refused(case):
  known, body = case
  try:
    found = fields.read(json.dumps(body).encode(), known)
  except Refused as refused:
    assert refused.status == 400 and len(str(refused)) < 600
  else:
    assert found.keys() == known.keys()


@given(st.binary(max_size=64))
def test_bytes_that_are_no_object_are_refused(body):
  with pytest.raises(Refused, match='must be'):
    fields.read(body if not body.startswith(b'{') else b'[' + body, bodies.EMBEDDINGS)


@pytest.mark.parametrize(
  ('body', 'words'),
  [
    ('{"input": 3}', 'input=3 must be a string, or a list of 1 to'),
    ('{}', 'field input is missing'),
    ('{"input": "a", "inputs": "b"}', 'inputs is no field here; there are model, input'),
    ('{"input": ["a", "\\ud800"]}', 'without halves of characters'),
    ('{"input": "a", "dimensions": true}', 'a whole number from 1'),
    ('[' * 100_000, 'must be JSON'),
  ],
)
def test_what_is_wrong_is_named(body, words):
  with pytest.raises(Refused, match=words):
    fields.read(body.encode(), bodies.EMBEDDINGS)


def test_no_stop_string_is_empty():
  with pytest.raises(Refused, match='none of them empty'):
    fields.read(b'{"prompt": "a", "stop": ["b", ""]}', bodies.COMPLETIONS)


def test_messages_may_come_in_parts():
  parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
  body = {'messages': [{'role': 'developer', 'content': 'x'}, {'role': 'user', 'content': parts}]}
  found = fields.read(json.dumps(body).encode(), bodies.CHAT)
  assert found['messages'] == [
    {'role': 'system', 'content': 'x'},
    {'role': 'user', 'content': 'ab'},
  ]
