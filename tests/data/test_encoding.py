import json
import pickle

import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.data import encoding
from llm_jax.objectives import classify, clm, mlm

TEXT = contracts.Objective.encode


def lengths(record, tokenizer):
  return {'tokens': tokenizer.encode(record['text']), 'size': len(record['text'])}


def reversed_ids(record, tokenizer):
  return {'tokens': tokenizer.encode(record['text'])[::-1]}


def giving(name, value):
  return lambda record, tokenizer: {name: value}


def test_the_default_gives_ids_and_the_label_as_it_is(small):
  tokenizer = small.Tokenizer()
  record = {'text': 'ab', 'pair': 'c', 'label': ['x'], 'other': 1}
  found = encoding.Encoder([TEXT])(record, tokenizer)
  assert found.keys() == {'tokens', 'pair_tokens', 'label'} and found['label'] == ['x']
  np.testing.assert_array_equal(found['tokens'], tokenizer.encode('ab'))
  np.testing.assert_array_equal(found['pair_tokens'], tokenizer.encode('c'))
  bare = encoding.Encoder([TEXT])({'text': 'a', 'pair': None, 'label': None}, tokenizer)
  assert bare.keys() == {'tokens'}


def test_several_act_as_one_and_must_agree(small):
  both = encoding.Encoder([TEXT, lengths, TEXT])
  assert len(both.functions) == 2
  found = pickle.loads(pickle.dumps(encoding.Encoder([TEXT])))({'text': 'ab'}, small.Tokenizer())
  assert both({'text': 'ab'}, small.Tokenizer()).keys() == {'tokens', 'size'} > found.keys()
  differing = encoding.Encoder([TEXT, reversed_ids])
  assert differing({'text': 'aa'}, small.Tokenizer()).keys() == {'tokens'}
  with pytest.raises(ValueError, match="two objectives encode a record to different 'tokens'"):
    differing({'text': 'ab'}, small.Tokenizer())
  with pytest.raises(ValueError, match="different 'size'"):
    encoding.Encoder([lengths, giving('size', np.ones(1, int))])({'text': 'a'}, small.Tokenizer())


def test_the_identity_is_the_source_code(monkeypatch):
  assert encoding.Encoder([mlm.Objective.encode, classify.Objective.encode]).identity == ('text',)
  both = encoding.Encoder([lengths, clm.Objective.encode]).identity
  assert both == encoding.Encoder([clm.Objective.encode, lengths]).identity and len(both) == 2
  before = encoding.identity(lengths)
  assert before.startswith(f'{__name__}.lengths ') and before != encoding.identity(reversed_ids)
  monkeypatch.setattr(encoding.inspect, 'getsource', lambda function: 'def lengths(): ...')
  after = encoding.identity(lengths)
  assert after.startswith(f'{__name__}.lengths ') and after != before


def test_what_has_no_source_code_is_refused():
  made = {}
  exec('def encode(record, tokenizer):\n  return {}', made)  # noqa: S102
  with pytest.raises(ValueError, match='source code of .*encode is not to be found'):
    encoding.identity(made['encode'])
  with pytest.raises(ValueError, match='must be a plain function: make it a static method'):
    encoding.identity(pickle.loads)


@pytest.mark.parametrize(
  'name, value, error, message',
  [
    ('tokens', [1, 2], TypeError, "'tokens' as list; ids must be an array"),
    ('answer_tokens', 'ab', TypeError, "'answer_tokens' as str"),
    ('span', np.ones(2), TypeError, r"'span' as an array \[2\] of float64"),
    ('span', np.ones((2, 1), int), TypeError, r"'span' as an array \[2, 1\] of int64"),
    ('a/b', 'x', ValueError, "gives 'a/b'; names must be letters"),
    (3, 'x', ValueError, 'gives 3; names must be letters'),
  ],
)
def test_what_the_contract_does_not_allow_is_refused(small, name, value, error, message):
  with pytest.raises(error, match=message):
    encoding.Encoder([giving(name, value)])({'text': ''}, small.Tokenizer())


def test_columns_are_ids_in_the_smallest_type_and_int32():
  encoded = [
    {'tokens': np.array([1, 255]), 'span': np.array([-1], np.int8), 'label': 'x'},
    {'tokens': np.array([], float)},
    {'tokens': np.array([7], np.uint64), 'span': np.array([2**31 - 1, 0])},
  ]
  arrays, values = encoding.columns(encoded, 256)
  assert [(a.tolist(), str(a.dtype), n.tolist()) for a, n in arrays.values()] == [
    ([1, 255, 7], 'uint8', [2, 0, 1]),
    ([-1, 2**31 - 1, 0], 'int32', [1, 0, 2]),
  ]
  assert values == {'label': ['x', None, None]}
  with pytest.raises(ValueError, match='ids 1 to 255 in documents 5 to 7; .* from 0 to 254'):
    encoding.columns(encoded, 255, first=5)
  with pytest.raises(ValueError, match="'span' holds 0 to 2147483648 in documents 0 to 0"):
    encoding.columns([{'span': np.array([0, 2**31])}], None)


def test_what_a_record_is_known_by():
  assert encoding.spelled({'text': 'é', 'label': 'x'}) == ['é'.encode(), b'']
  assert encoding.spelled({'text': 'a', 'pair': 'b', 'more': 1}) == [b'a', b'b']
  for record in ({'b': [1], 'a': 'é'}, {'text': ['a', 'b']}, {'text': 'a', 'pair': ['b']}):
    assert encoding.spelled(record) == [json.dumps(record, sort_keys=True).encode()]


def test_what_counts_as_tokens():
  assert encoding.counted(['tags', 'tokens', 'pair_tokens']) == ['pair_tokens', 'tokens']
  assert encoding.counted(['tags', 'turns']) == ['tags', 'turns']
