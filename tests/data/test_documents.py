import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.data import cache, documents, encoding

RECORDS = [
  {'text': 'abc', 'label': ('x', 'y')},
  {'text': ''},
  {'text': 'de', 'pair': 'f', 'label': float('inf')},
]


class Listed(list):
  fingerprint = 'listed'


def test_in_memory_is_as_from_the_cache(small, tmp_path):
  tokenizer, encode = small.Tokenizer(), contracts.Objective.encode
  memory = documents.Memory(RECORDS, encode, tokenizer)
  cached, _ = cache.build(
    Listed(RECORDS), tokenizer, encoding.Encoder([encode]), str(tmp_path), 1
  ).split(0.0)
  assert len(memory) == len(cached) == 3 and memory.names == cached.names
  np.testing.assert_array_equal(memory.ids, cached.ids)
  assert memory.values('label') == cached.values('label') == [['x', 'y'], None, float('inf')]
  assert memory.values('other') is None is cached.values('other')
  for name in ('tokens', 'pair_tokens'):
    np.testing.assert_array_equal(memory.lengths(name), cached.lengths(name))
    for index in range(3):
      for part in ((), (1,), (1, 2), (0, 99), (2, None)):
        found, wanted = memory.array(name, index, *part), cached.array(name, index, *part)
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype == np.int32
  assert memory.array('tokens', 0, 1).tolist() == tokenizer.encode('bc').tolist()


def test_a_record_that_does_not_fit_is_named(small):
  with pytest.raises(ValueError, match='a record has no text, only txt') as caught:
    documents.Memory([{'text': 'a'}, {'txt': 'b'}], contracts.Objective.encode, small.Tokenizer())
  assert caught.value.__notes__ == ['while tokenizing document 1']
  memory = documents.Memory([{'text': 'a'}], contracts.Objective.encode, small.Tokenizer())
  for ask in (memory.lengths, lambda name: memory.array(name, 0)):
    with pytest.raises(ValueError, match="no array 'pair_tokens', only tokens; .*encode"):
      ask('pair_tokens')
  with pytest.raises(ValueError, match='ids 40 to 40 .* from 0 to 29'):
    encode = lambda record, tokenizer: {'tokens': np.array([40])}
    documents.Memory([{}], encode, small.Tokenizer(30))
