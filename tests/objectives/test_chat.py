"""Conversations in rows: what is learned, whole turns, exact gradients, what is shown and what is
refused.
"""

import collections

import jax
import numpy as np
import pytest
from exact import assert_same, filled, network_of, shape
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import encoding
from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.models import decoder, encoder_decoder
from llm_jax.objectives import chat
from llm_jax.objectives.shared import learned
from llm_jax.training import step

TOKENIZER = byte.create()
PLAIN = {'template': 'plain'}
TEXT = st.text('abc', min_size=1, max_size=9)


def conversation(*said):
  roles = ('user', 'assistant')
  return {'messages': [{'role': roles[i % 2], 'content': text} for i, text in enumerate(said)]}


def documents(records):
  return Memory(records, chat.Objective.encoding(PLAIN), TOKENIZER)


def examples(rows):
  return [rows.example(i, np.random.default_rng(0)) for i in range(len(rows))]


def answers(example):
  """What is learned of each conversation of a row, its ends included."""
  found = collections.Counter()
  for segment in range(1, example['segments'].max() + 1):
    inside = (example['segments'] == segment) & (example['weights'] > 0)
    ids = example['targets'][inside].tolist()
    assert ids[-1] == TOKENIZER.eos_id
    found[TOKENIZER.decode(ids), ids.count(TOKENIZER.eos_id)] += 1
  return found


@settings(max_examples=40, deadline=None)
@given(
  said=st.lists(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), min_size=1, max_size=6),
  packing=st.sampled_from(['best_fit', 'none']),
)
def test_every_answer_is_learned_once_and_nothing_else(said, packing):
  records = [conversation(*(text for turn in turns for text in turn)) for turns in said]
  rows = chat.Objective(TOKENIZER, packing=packing).rows(documents(records), 140)
  found = sum((answers(example) for example in examples(rows)), collections.Counter())
  wanted = collections.Counter((''.join(b for _, b in turns), len(turns)) for turns in said)
  assert found == wanted
  for example in examples(rows):
    for segment in range(1, example['segments'].max() + 1):
      inside = example['segments'] == segment
      assert example['tokens'][inside][0] == TOKENIZER.bos_id
      np.testing.assert_array_equal(example['tokens'][inside][1:], example['targets'][inside][:-1])
  assert packing == 'best_fit' or len(rows) == len(said)


@pytest.mark.slow
def test_packed_conversations_learn_as_if_alone():
  records = [conversation('a' * n, 'xyz'[:n], 'b', 'c') for n in (1, 3, 2, 1)]
  with jax.enable_x64(True):
    model = decoder.Model(vocab_size=TOKENIZER.vocab_size, **shape(128))
    results = []
    for packing in ('none', 'best_fit'):
      objective = chat.Objective(TOKENIZER, packing=packing, label_smoothing=0.1)
      made = examples(objective.rows(documents(records), 128))
      batch = filled(made, 4)
      network, params = network_of(model, objective, batch)
      for count in (1, 2):
        results.append(step.gradient(params, batch, None, network=network, micro_batches=count))
    assert len(made) < 4
    grads, metrics = results[0]
    for other, said in results[1:]:
      assert_same(other, grads)
      assert_same(said, metrics)


def test_what_is_too_long_loses_whole_turns():
  long = [conversation('q', 'aaa', 'q', 'bbb', 'q', 'c' * 60), conversation('q' * 90, 'a')]
  records = [conversation('q', 'a'), *long]
  with pytest.raises(
    ValueError,
    match='document 1: the conversation has 136 tokens, a row takes 81; 2 of 3 are too long. '
    'Raise config.seq_len, or set config.objective.long=cut or drop',
  ):
    chat.Objective(TOKENIZER).rows(documents(records), 80)
  rows = chat.Objective(TOKENIZER, long='cut').rows(documents(records), 80)
  found = sum(map(answers, examples(rows)), collections.Counter())
  assert found == {('a', 1): 1, ('aaabbb', 2): 1} and rows.cut == 1
  assert rows.prompt(1) is None  # its last turn was cut off
  dropped = chat.Objective(TOKENIZER, long='drop').rows(documents(records), 80)
  assert sum(map(answers, examples(dropped)), collections.Counter()) == {('a', 1): 1}


def test_prompts_and_what_should_be_written():
  record = conversation('one', 'two', 'three', 'four')
  rows = chat.Objective(TOKENIZER).rows(documents([record]), 128)
  text = '<user>\none\n<assistant>\ntwo\n<user>\nthree\n<assistant>\n'
  assert TOKENIZER.decode(rows.prompt(0)) == text and rows.texts(0) == [0]
  assert chat.Objective.asked(record) == ('three', 'four')


def test_what_is_learned_is_shown():
  rows = chat.Objective(TOKENIZER).rows(documents([conversation('a<b', 'c\nd')] * 2), 80)
  shown = learned.pieces(examples(rows)[0], TOKENIZER)
  assert shown == [[('[BOS]<user>\na<b\n<assistant>\n', False), ('c\nd[EOS]', True)]] * 2
  assert learned.as_text(shown[:1]).endswith('<assistant>\\n\n\u27e6c\\n\nd[EOS]\u27e7')
  assert '&lt;user&gt;' in learned.as_html(shown) and learned.as_html(shown).count('<span') == 2


def test_the_cache_knows_the_template():
  """Another template makes other tokens of the same record."""
  encoders = [chat.Objective.encoding({'template': name}) for name in ('plain', 'chatml', None)]
  ours, other, default = (encoding.Encoder([encode]) for encode in encoders)
  assert ours.identity == default.identity != other.identity
  (identity,) = ours.identity
  assert 'objectives.chat.encode' in identity


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    (dict(packing='windows'), "objective.packing='windows' must be one of best_fit, none"),
    (dict(long='split'), "objective.long='split' must be one of error, cut, drop"),
    (dict(template='mine'), "objective.template='mine' is no file"),
    (dict(template='{{ x.y.z }}'), 'the chat template fails'),
  ],
)
def test_options_that_cannot_be(options, said):
  with pytest.raises(ValueError, match=said):
    chat.Objective(TOKENIZER, **options)


def test_records_and_models_that_cannot_be():
  with pytest.raises(ValueError, match='the assistant says nothing has nothing to learn'):
    documents([conversation('q')])
  sizes = dict(dim=8, layers=1, heads=1, mlp_dim=8, vocab_size=300, max_len=32)
  with pytest.raises(ValueError, match='objective chat needs a decoder; an encoder-decoder'):
    chat.Objective(TOKENIZER).check(encoder_decoder.Model(**sizes))
