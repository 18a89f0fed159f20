"""Rows of one or two texts as BERT lays them out, and the chunks that pairs are cut from."""

import numpy as np
import pytest

from llm_jax.data import pairs

CLS, SEP = 2, 3
BERT = pairs.Frame((CLS,), (SEP,), (CLS,), (SEP,), (SEP,))
ROBERTA = pairs.Frame((CLS,), (SEP,), (CLS,), (SEP, SEP), (SEP,), second_type=0)
NOTHING = pairs.Frame((), (), (), (), (), filler=5)


def test_a_pair_has_the_layout_of_bert():
  """Devlin et al. 2019, figure 2: [CLS] my dog [SEP] he likes [SEP], token types 0 then 1."""
  row = pairs.row(np.array([11, 12]), np.array([21, 22]), 9, BERT)
  assert row['tokens'].tolist() == [CLS, 11, 12, SEP, 21, 22, SEP, 0, 0]
  assert row['token_types'].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]
  assert row['segments'].tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0]
  assert row['positions'].tolist()[:7] == [0, 1, 2, 3, 4, 5, 6]


def test_texts_and_pairs_share_a_row():
  texts = [(np.array([11]), None), (np.array([12]), np.array([21, 22]))]
  row = pairs.packed(texts, 10, BERT, slots=3)
  assert row['tokens'].tolist() == [CLS, 11, SEP, CLS, 12, SEP, 21, 22, SEP, 0]
  assert row['token_types'].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0]
  assert row['segments'].tolist() == [1, 1, 1, 2, 2, 2, 2, 2, 2, 0]
  assert row['positions'].tolist()[:9] == [0, 1, 2, 0, 1, 2, 3, 4, 5]
  assert row['text_firsts'].tolist()[:2] == [0, 3] and row['text_lasts'].tolist()[:2] == [2, 8]


def test_texts_that_are_longer_than_the_row_are_an_error():
  with pytest.raises(ValueError):
    pairs.row(np.array([11, 12]), np.array([21, 22]), 6, BERT)


def test_documents_are_cut_in_chunks_and_other_chunks_are_of_other_documents(small):
  documents = small.random_documents([5, 0, 2, 4])
  chunks = pairs.Chunks(documents, 2)
  assert [chunks.document(i) for i in range(len(chunks))] == [0, 0, 0, 2, 3, 3]
  assert [len(chunks[i]) for i in range(len(chunks))] == [2, 2, 1, 2, 2, 2]
  whole = np.concatenate([chunks[i] for i in range(3)])
  assert whole.tolist() == documents.array('tokens', 0).tolist()
  rng = np.random.default_rng(0)
  assert {chunks.other(1, rng) for _ in range(200)} == {3, 4, 5}
  assert {chunks.other(3, rng) for _ in range(200)} == {0, 1, 2, 4, 5}


def test_a_chunk_without_room_is_an_error(small):
  with pytest.raises(ValueError, match='use a longer seq_len'):
    pairs.Chunks(small.random_documents([5]), 0)


def test_a_chunk_is_cut_in_two_texts_anywhere():
  tokens, rng = np.arange(4), np.random.default_rng(0)
  cuts = [pairs.split(tokens, 0.0, rng) for _ in range(200)]
  assert {len(first) for first, _ in cuts} == {1, 2, 3}
  assert all(np.concatenate(cut).tolist() == [0, 1, 2, 3] for cut in cuts)
  short = [sum(map(len, pairs.split(tokens, 1.0, rng))) for _ in range(200)]
  assert set(short) == {2, 3, 4}
  assert [len(text) for text in pairs.split(tokens[:1], 1.0, rng)] == [1, 0]


def test_special_tokens_of_other_folders():
  texts = [(np.array([11]), np.array([21, 22])), (np.array([12]), None)]
  row = pairs.packed(texts, 12, ROBERTA, slots=2)
  assert row['tokens'].tolist() == [CLS, 11, SEP, SEP, 21, 22, SEP, CLS, 12, SEP, 0, 0]
  assert not row['token_types'].any() and row['text_lasts'].tolist() == [6, 9]
  assert (ROBERTA.single, ROBERTA.double, NOTHING.double) == (2, 4, 0)
  empty = np.array([], np.int32)
  row = pairs.packed([(empty, None), (np.array([11]), None), (empty, empty)], 4, NOTHING, slots=3)
  assert row['tokens'].tolist() == [5, 11, 5, 0] and row['segments'].tolist() == [1, 2, 3, 0]
