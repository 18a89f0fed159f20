import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import words
from llm_jax.data.tokenizers import byte

TOKENIZER = byte.create()


def test_words_are_joined_and_texts_are_split():
  assert words.joined(['A', '', 'bc'], ' ') == ('A  bc', [(0, 1), (2, 2), (3, 5)])
  assert words.joined(['我', '们'], '') == ('我们', [(0, 1), (1, 2)])
  text = 'Bonn (am Rhein), 2\u00a0km.'
  split = {
    'space': ['Bonn', '(am', 'Rhein),', '2', 'km.'],
    'punctuation': ['Bonn', '(', 'am', 'Rhein', ')', ',', '2', 'km', '.'],
    'character': [c for c in text if not c.isspace()],
  }
  for name, wanted in split.items():
    found = words.WORDS[name]({'text': text}, TOKENIZER)
    assert found['words'] == wanted
    begins, ends = found['word_begins'].tolist(), found['word_ends'].tolist()
    assert [text[a:b] for a, b in zip(begins, ends, strict=True)] == wanted
    assert found['tokens'].tolist() == TOKENIZER.encode(text).tolist()


def test_chinese_is_joined_by_nothing_and_split_by_jieba():
  found = words.WORDS['jieba']({'text': '我爱 北京天安门'}, TOKENIZER)
  assert found['words'] == ['我', '爱', '北京', '天安门']
  again = words.WORDS['jieba']({'words': ['我', '爱', '北京']}, TOKENIZER)
  assert again['tokens'].tolist() == TOKENIZER.encode('我爱北京').tolist()
  assert again['token_words'].tolist() == [0] * 3 + [1] * 3 + [2] * 6


def test_a_token_is_that_of_the_first_word_whose_characters_it_spells():
  given_words = [(0, 2), (2, 4), (4, 4), (5, 6), (6, 7)]
  tokens = [(0, 0), (0, 1), (1, 3), (3, 4), (4, 5), (4, 6), (6, 7), (7, 7)]
  found = words.token_words(np.array(tokens), given_words)
  assert found.tolist() == [-1, 0, 0, 1, -1, 3, 4, -1]
  assert words.token_words(np.zeros((0, 2)), given_words).tolist() == []
  assert words.token_words(np.array([(0, 1)]), []).tolist() == [-1]
  assert words.token_words(np.array([(0, 1)]), [(0, 0)]).tolist() == [-1]
  assert words.token_words(np.array([(2, 3), (0, 1)]), [(0, 1), (2, 3)]).tolist() == [1, -1]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_it_is_what_a_search_finds(data):
  sizes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=8)
  spans = []
  for offset, size in data.draw(sizes):
    start = (spans[-1][1] if spans else 0) + offset
    spans.append((start, start + size))
  cuts = sorted(data.draw(st.lists(st.integers(0, 24), max_size=12)))
  tokens = list(zip(cuts, cuts[1:], strict=False))
  wanted = [
    next((w for w, (a, b) in enumerate(spans) if max(a, start) < min(b, stop)), -1)
    for start, stop in tokens
  ]
  assert words.token_words(np.array(tokens).reshape(-1, 2), spans).tolist() == wanted


def wordpiece(tokenizers):
  made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token='[UNK]'))
  made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  return made, tokenizers.trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIALS)


def byte_level(tokenizers):
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=340, special_tokens=SPECIALS, initial_alphabet=alphabet
  )
  return made, trainer


SPECIALS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']


@pytest.mark.parametrize('kind', [wordpiece, byte_level])
def test_words_are_found_with_tokenizers_of_hugging_face(tmp_path, kind):
  import tokenizers

  from llm_jax.data.tokenizers import hf

  made, trainer = kind(tokenizers)
  made.train_from_iterator(['the cat sat, caf\u00e9', 'in Z\u00fcrich 北京'] * 20, trainer)
  made.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = hf.load(str(tmp_path))
  given_words = ['The', 'cat,', '北京', '😀', 'cafe\u0301', '\u0301', 'Z\u00fcrich']
  found = words.WORDS['space']({'words': given_words}, tokenizer)
  text, spans = words.joined(given_words, ' ')
  ids, token_spans = tokenizer.offsets(text)
  assert found['tokens'].tolist() == ids.tolist()
  read, firsts = np.unique(found['token_words'], return_index=True)
  read = dict(zip(read.tolist(), firsts.tolist(), strict=True))
  lost = {5} if kind is wordpiece else set()  # its normaliser takes accents away
  assert read.keys() - {-1} == set(range(7)) - lost
  for word, token in read.items():
    if word >= 0:  # a byte-level token has the space before its word, or begins with it
      assert token_spans[token][0] in (spans[word][0], spans[word][0] - 1)


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'words': 'a b'}, "field 'words' is 'a b'; it must be a list"),
    ({'words': ['a', 3]}, "field 'words': word 1 is 3; each must be a string"),
    ({'text': 3}, "field 'text' is 3"),
    ({'txt': 'a'}, 'no words and no text, only txt'),
  ],
)
def test_records_that_cannot_be(record, message):
  with pytest.raises(ValueError, match=message):
    words.WORDS['space'](record, TOKENIZER)


def test_an_unknown_name_is_refused():
  with pytest.raises(ValueError, match="words='blank' must be one of space, punctuation"):
    words.check('blank')
