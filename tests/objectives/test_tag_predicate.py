"""A predicate between signs: words, tags and characters are those of the text as it was given."""

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import words as words_lib
from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.objectives import tag

RNG = np.random.default_rng(0)
TOKENIZER = byte.create()
BIO = ('B-A0', 'B-A1', 'I-A1', 'O')
BOUGHT = {'words': ['Ann', 'bought', 'old', 'books'], 'tags': ['B-A0', 'O', 'B-A1', 'I-A1']}


def memory(*records, **options):
  return Memory(records, tag.Objective.encoding(options | {'predicate': True}), TOKENIZER)


def made(**options):
  return tag.Objective(TOKENIZER, BIO, predicate=True, **options)


def spelled(row):
  return bytes(int(token) - 7 for token in row['tokens'] if token >= 7).decode()


def test_the_predicate_stands_between_signs():
  first, second = BOUGHT | {'predicate': 1}, BOUGHT | {'predicate': [2, 4]}
  for record, text in (
    (first, 'Ann @ bought @ old books'),
    (second, 'Ann bought @ old books @'),
    ({'text': 'Ann saw 北京', 'predicate': [8, 10]}, 'Ann saw @ 北京 @'),
  ):
    row = made(unlabelled='ignore').rows(memory(record), 40).example(0, RNG)
    assert spelled(row) == text
  row = made().rows(memory(first), 40).example(0, RNG)
  positions = np.flatnonzero(row['tag_weight'])
  assert positions.tolist() == [1, 7, 16, 20] and row['tag'][positions].tolist() == [0, 3, 1, 2]
  every = made(label_all=True).rows(memory(first), 40).example(0, RNG)
  signs = [1 + i for i, c in enumerate(spelled(row)) if c in '@ ']
  assert not every['tag_weight'][signs].any()


WORDS = st.one_of(
  st.sampled_from(['the', '我们', '😀', '\U0001f469\u200d\U0001f467', '', '@', 'a @ b']),
  st.text(st.characters(exclude_categories=['Cs']), max_size=4),
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
  words=st.lists(WORDS, min_size=1, max_size=6),
  name=st.sampled_from(['space', 'character']),
  as_text=st.booleans(),
  data=st.data(),
)
def test_words_and_their_characters_are_those_of_the_text(words, name, as_text, data):
  """With a predicate and without: equal words at equal characters, and the tokens of each word
  spell the same.
  """
  record = {'text': ' '.join(words)} if as_text else {'words': words}
  plain = words_lib.WORDS[name](record, TOKENIZER)
  there = [number for number, word in enumerate(plain['words']) if word.strip()]
  if not there:
    return
  predicate = data.draw(st.sampled_from(there))
  marked = words_lib.MARKED[name](record | {'predicate': predicate}, TOKENIZER)
  for key in ('word_begins', 'word_ends', 'words', 'characters'):
    np.testing.assert_array_equal(marked[key], plain[key])
  for number in range(len(plain['words'])):
    own = [found['tokens'][found['token_words'] == number].tolist() for found in (plain, marked)]
    assert own[0] == own[1]
  opens, closes = marked['mark']
  between = marked['tokens'][opens : closes + 1]
  span = slice(plain['word_begins'][predicate], plain['word_ends'][predicate])
  text = record['text'] if as_text else words_lib.joined(words, ' ' if name == 'space' else '')[0]
  assert TOKENIZER.decode(between) == f'@ {text[span]} @'
  assert len(marked['tokens']) == len(plain['tokens']) + 4
  assert len(marked['tokens']) - closes - 1 == len(text[span.stop :].encode())


def test_answers_are_of_the_text_as_it_was_given():
  rows = made().layout(memory({'text': 'Ann bought old books', 'predicate': 1}), 40)
  row = {'tags': np.zeros(40, int)} | dict.fromkeys(
    ('probability', 'entropy', 'margin'), np.full(40, 0.5)
  )
  row['tags'][[1, 7, 16, 20]] = [0, 3, 1, 2]
  (answer,) = made().answers(row, rows, 0)
  assert answer['words'] == ['Ann', 'bought', 'old', 'books'] and answer['tags'] == BOUGHT['tags']
  entities = [
    (each['label'], each['text'], each['start'], each['end']) for each in answer['entities']
  ]
  assert entities == [('A0', 'Ann', 0, 3), ('A1', 'old books', 11, 20)]
  assert 'unread' not in answer


def test_a_predicate_that_a_row_does_not_hold(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'warning', lambda message, *values: lines.append(message % values))
  late = BOUGHT | {'predicate': 3}
  with pytest.raises(
    ValueError, match='document 1: the predicate ends at token 24, and seq_len=24 '
  ):
    made().rows(memory(BOUGHT | {'predicate': 0}, late), 24)
  assert len(made().rows(memory(late), 26)) == 1
  assert made().layout(memory(late), 24).torn == [0]
  assert 'tag: 1 of 1 texts are answered without their predicate, the first: doc' in lines[-1]


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    (BOUGHT, "field 'predicate' is None; it must be the number of a word .* from 0 to 3"),
    (BOUGHT | {'predicate': 4}, "field 'predicate' is 4; it must be the number"),
    (BOUGHT | {'predicate': -1}, "field 'predicate' is -1; it must be"),
    (BOUGHT | {'predicate': [2, 2]}, r"field 'predicate' is \[2, 2\]; it must be"),
    (BOUGHT | {'predicate': True}, "field 'predicate' is True; it must be"),
    (BOUGHT | {'predicate': '1'}, "field 'predicate' is '1'; it must be"),
    ({'words': ['a', ''], 'predicate': 1}, "field 'predicate' is 1; it must be .* has characters"),
    ({'text': 'a b', 'predicate': [1, 2]}, 'holds nothing but white space'),
    ({'text': 'a b', 'predicate': [0, 4]}, r"'predicate' is \[0, 4\]; it must be \[start, end\]"),
    ({'text': 'a bcd', 'predicate': [2, 4]}, r"\[2, 4\], which cuts the word 'bcd' .*2 to 5\) in"),
  ],
)
def test_predicates_that_cannot_be(record, message):
  with pytest.raises(ValueError, match=message):
    memory(record)


def test_without_the_option_the_field_is_not_read():
  plain = tag.Objective.encoding({})
  record = BOUGHT | {'predicate': 1}
  assert plain(record, TOKENIZER).keys() == plain(BOUGHT, TOKENIZER).keys()
  assert tag.Objective.sample_records({'predicate': True})[0]['predicate'] == 0
