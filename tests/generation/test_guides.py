"""Texts that are as they must be: every one that a guide lets through, and nothing else."""

import itertools
import json
import re

import numpy as np
import pytest

from llm_jax.data.tokenizers import byte
from llm_jax.generation.guides import Guides
from llm_jax.generation.sampling import among

TOKENIZER = byte.create(added=('<end>',))
SIZE = TOKENIZER.vocab_size + 11  # a table that was rounded up
GUIDES = Guides(TOKENIZER, SIZE, [TOKENIZER.eos_id, TOKENIZER.vocab_size - 1])


def allowed(guide):
  return [i for i in range(SIZE) if guide.allowed_W[i // 32] >> (i % 32) & 1]


def texts(kind, form, most=9):
  """All texts that a guide lets through, and whether each may end."""
  found = []

  def go(ids):
    guide = GUIDES(kind, form)
    for token in ids:
      guide.add(token)
    choices = allowed(guide)
    if TOKENIZER.eos_id in choices:
      found.append(TOKENIZER.decode(ids))
      assert TOKENIZER.vocab_size - 1 in choices  # any of the ids that end a text
    for token in choices if len(ids) < most else ():
      if token not in (TOKENIZER.eos_id, TOKENIZER.vocab_size - 1):
        go([*ids, token])

  go([])
  return sorted(found)


def test_a_regular_expression_and_a_grammar_by_enumeration():
  pattern = '(a|é)b{0,2}c?'
  short = (''.join(c) for n in range(5) for c in itertools.product('aébc', repeat=n))
  wanted = sorted(text for text in short if re.fullmatch(pattern, text))
  assert texts('regex', pattern) == wanted and len(wanted) == 12
  assert texts('lark', 'start: "x" | "(" start ")"', most=5) == ['((x))', '(x)', 'x']


def test_json_of_a_schema():
  schema = {
    'type': 'object',
    'properties': {'a': {'type': 'boolean'}, 'b': {'enum': [1, 'é']}},
    'required': ['a', 'b'],
    'additionalProperties': False,
  }
  found = [json.loads(text) for text in texts('json', schema, most=30)]
  assert len(found) == 4 and {(x['a'], x['b']) for x in found} == {
    (a, b) for a in (True, False) for b in (1, 'é')
  }


def test_it_is_over_where_nothing_may_follow_and_a_wrong_token_is_refused():
  guide = GUIDES('regex', 'ab?')
  guide.add(TOKENIZER.encode('a')[0])
  assert not guide.over
  guide.add(TOKENIZER.encode('b')[0])
  assert guide.over and allowed(guide) == [TOKENIZER.eos_id, TOKENIZER.vocab_size - 1]
  with pytest.raises(ValueError, match='cannot be guided'):
    GUIDES('regex', 'ab').add(TOKENIZER.encode('x')[0])


@pytest.mark.parametrize(
  ('kind', 'form', 'words'),
  [
    ('regex', 'a+(', 'this regex cannot guide a text: .*unclosed group'),
    ('lark', 'start: x', 'unknown name: "x"'),
    ('json', {'type': 'nothing'}, 'Invalid type: nothing'),
    ('json', {'anyOf': []}, 'Unsatisfiable'),
    ('json', {'$ref': '#/a'}, "Pointer '/a' does not exist"),
  ],
)
def test_forms_that_are_wrong(kind, form, words):
  with pytest.raises(ValueError, match=words):
    GUIDES(kind, form)


def test_logits_of_what_is_not_allowed_are_the_lowest():
  logits = np.arange(70, dtype=np.float32)[None].repeat(2, axis=0)
  bits = np.zeros((2, 3), np.uint32)
  bits[0, [0, 1, 2]] = 1 << 3, 1 << 31, 1 << 5
  bits[1] = 2**32 - 1
  found = np.asarray(among(logits, bits))
  assert np.flatnonzero(np.isfinite(found[0])).tolist() == [3, 63, 69]
  np.testing.assert_array_equal(found[1], logits[1])
