"""Bytes as ids: exact both ways, special ids, and where words begin."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.tokenizers import byte, sentencepiece


@given(st.text())
def test_any_text_comes_back(text):
  tokenizer = byte.create()
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and list(ids) == [b + 7 for b in text.encode()]
  assert tokenizer.decode(ids) == text
  assert tokenizer.token_bytes[ids].sum() == len(text.encode())
  assert not tokenizer.special[ids].any()


def test_tables_and_special_ids():
  tokenizer = byte.create()
  ids = [getattr(tokenizer, f'{name}_id') for name in byte.SPECIALS]
  assert ids == list(range(7)) and tokenizer.vocab_size == 263
  assert (
    list(np.flatnonzero(tokenizer.special)) == ids
    and list(np.flatnonzero(tokenizer.token_bytes == 0)) == ids
  )
  assert tokenizer.decode([2, *tokenizer.encode('a'), 3, 0]) == 'a'
  assert tokenizer.decode(tokenizer.encode('é')[:1]) == '\ufffd'
  starts = tokenizer.word_start[tokenizer.encode('ab c-d 好é')]
  assert list(starts) == [
    False,
    False,
    True,
    False,
    True,
    False,
    True,
    True,
    False,
    False,
    False,
    False,
  ]


def test_special_tokens_in_a_text():
  tokenizer = byte.create()
  assert list(tokenizer.encode('a[MASK][SEP]', special=True)) == [ord('a') + 7, 4, 3]
  assert not tokenizer.special[tokenizer.encode('a[MASK][SEP]')].any()


@given(st.text())
def test_places(text):
  tokenizer = byte.create()
  ids, spans = tokenizer.offsets(text)
  assert list(ids) == list(tokenizer.encode(text)) and spans.shape == (len(ids), 2)
  assert [text[begin:end] for begin, end in spans] == [c for c in text for _ in c.encode()]


def test_places_of_special_tokens():
  ids, spans = byte.create().offsets('é[MASK]a', special=True)
  assert list(ids[2:]) == [4, ord('a') + 7] and spans.tolist() == [[0, 1], [0, 1], [1, 7], [7, 8]]


def test_errors(tmp_path):
  tokenizer = byte.create()
  with pytest.raises(ValueError, match='surrogate pair at character 1'):
    tokenizer.encode('a\ud800')
  for ids in ([263], [-1]):
    with pytest.raises(ValueError, match='0 to 262'):
      tokenizer.decode(ids)
  tokenizer.save(str(tmp_path / 'new' / 'folder'))
  assert byte.load(str(tmp_path / 'new' / 'folder')).fingerprint == tokenizer.fingerprint
  with pytest.raises(ValueError, match="holds a tokenizer 'byte', not sentencepiece"):
    sentencepiece.load(str(tmp_path / 'new' / 'folder'))
  assert list(pickle.loads(pickle.dumps(tokenizer)).encode('a')) == [104]
