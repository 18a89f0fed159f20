"""Virtual tokens stand before each text of every objective's rows, and are nothing else there."""

import pickle

import numpy as np
import pytest

from llm_jax.data import pairs
from llm_jax.data.documents import Memory
from llm_jax.data.prompted import Prompted
from llm_jax.data.tokenizers import byte
from llm_jax.objectives import classify, clm, mlm, nsp, tag

PLAIN = byte.create()
FIRST, COUNT, T = PLAIN.vocab_size + 3, 4, 48  # the model's table may have more rows
TOKENIZER = Prompted(PLAIN, FIRST, COUNT)
TEXTS = ['a', 'some words', 'more words than that', 'words', 'no end of words ' * 6]
OBJECTIVES = {
  'clm': lambda tokenizer, packing: clm.Objective(tokenizer, packing=packing),
  'mlm': lambda tokenizer, packing: mlm.Objective(tokenizer, packing=packing),
  'nsp': lambda tokenizer, _: nsp.Objective(tokenizer),
  'classify': lambda tokenizer, _: classify.Objective(
    tokenizer, task='multiclass', classes=('a', 'b')
  ),
  'tag': lambda tokenizer, _: tag.Objective(tokenizer, tags=('O', 'B-X')),
}


def records(name):
  for text in TEXTS:
    record = {'text': text, 'pair': text[::-1], 'label': 'b'}
    if name == 'tag':
      words = text.split()
      record = {'words': words, 'tags': ['B-X'] * len(words)}
    yield record


def segments(name, tokenizer, packing, seq_len):
  """The tokens of each segment of each row, and of the row's other arrays what stands there."""
  objective = OBJECTIVES[name](tokenizer, packing)
  documents = Memory(list(records(name)), objective.encode, tokenizer)
  rows = objective.rows(documents, seq_len)
  for i in range(len(rows)):
    rng = np.random.default_rng(0)
    row = objective.transform(rows.example(i, rng), rng)
    for k in range(1, row['segments'].max() + 1):
      inside = row['segments'] == k
      np.testing.assert_array_equal(row['positions'][inside], np.arange(inside.sum()))
      yield {key: x[inside] for key, x in row.items() if np.shape(x) == (seq_len,)}


@pytest.mark.parametrize('packing', ['none', 'windows', 'best_fit'])
@pytest.mark.parametrize('name', OBJECTIVES)
def test_they_begin_every_segment_and_nothing_is_asked_of_them(name, packing):
  count = 0
  for part in segments(name, TOKENIZER, packing, T):
    count += 1
    tokens, own = part['tokens'], part['tokens'] >= PLAIN.vocab_size
    assert tokens[:COUNT].tolist() == list(TOKENIZER.prompt) and own.sum() == COUNT
    for key in ('weights', 'tag_weight', 'chain', 'token_types'):
      assert not np.any(part.get(key, 0)[:COUNT] if key in part else 0)
    if name == 'clm':
      np.testing.assert_array_equal(part['weights'][COUNT:], 1)
      np.testing.assert_array_equal(part['targets'][COUNT:-1], tokens[COUNT + 1 :])
  assert count >= len(TEXTS) - 1  # nsp has rows of chunks


@pytest.mark.parametrize('name', ['clm', 'classify', 'tag'])
def test_behind_them_a_row_is_what_it_is_without_them(name):
  plain = list(segments(name, PLAIN, 'none', T))
  shifted = list(segments(name, TOKENIZER, 'none', T + COUNT))
  assert len(plain) == len(shifted)
  rest = {tuple(part['tokens'][COUNT:].tolist()) for part in shifted}
  assert rest == {tuple(part['tokens'].tolist()) for part in plain}


def test_no_virtual_token_is_masked_and_none_replaces_another():
  objective = OBJECTIVES['mlm'](TOKENIZER, 'best_fit')
  documents = Memory(list(records('mlm')), objective.encode, TOKENIZER)
  rows, rng = objective.rows(documents, T), np.random.default_rng(0)
  masked = 0
  for _ in range(20):
    for i in range(len(rows)):
      row = objective.transform(rows.example(i, rng), rng)
      chosen = row['mask_positions'][row['mask_weights'] > 0]
      masked += len(chosen)
      assert np.all(row['mask_targets'][row['mask_weights'] > 0] < PLAIN.vocab_size)
      assert np.all(row['tokens'][chosen] < PLAIN.vocab_size)
  assert masked > 100


def test_the_tokenizer_is_the_same_but_for_them():
  again = pickle.loads(pickle.dumps(TOKENIZER))
  for tokenizer in (TOKENIZER, again):
    assert tokenizer.prompt == (FIRST, FIRST + 1, FIRST + 2, FIRST + 3)
    assert tokenizer.vocab_size == PLAIN.vocab_size and tokenizer.cls_id == PLAIN.cls_id
    assert tokenizer.fingerprint == PLAIN.fingerprint
    ids = tokenizer.encode('words')
    np.testing.assert_array_equal(ids, PLAIN.encode('words'))
    assert tokenizer.decode([*tokenizer.prompt, *ids]) == 'words'
    assert tokenizer.special[FIRST:].all() and len(tokenizer.special) == FIRST + COUNT
    assert not tokenizer.word_start[FIRST:].any() and not tokenizer.token_bytes[FIRST:].any()
  with pytest.raises(AttributeError, match='no_such_thing'):
    _ = TOKENIZER.no_such_thing


def test_frames_of_folders_begin_with_them_too():
  class Folder(Prompted):
    template = ((1,), (2,))
    pair_template = ((1,), (2, 2), (2,), 0)

  frame = pairs.frame(Folder(PLAIN, FIRST, 2))
  assert frame.before == frame.first == (FIRST, FIRST + 1, 1)
  assert (frame.after, frame.between, frame.second_type) == ((2,), (2, 2), 0)
