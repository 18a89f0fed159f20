"""Words of a segmenter: where tokens begin them, and that masking takes them whole."""

import builtins

import jieba
import numpy as np
import pytest

from llm_jax.data import documents, segmenters
from llm_jax.data.tokenizers import byte
from llm_jax.objectives import mlm, nsp

TOKENIZER = byte.create()
TEXTS = [
  '北京大学的学生在图书馆学习自然语言处理。',
  '床前明月光，疑是地上霜。举头望明月，低头思故乡。',
  '我们用 JAX 训练语言模型,  and it works！😀',
  '',
]


def test_starts_by_hand():
  spans = [(0, 2), (2, 3), (3, 5), (5, 5), (5, 6), (6, 7), (6, 7), (6, 7), (7, 9), (9, 10)]
  # Words 0-3, 3-4 (which the third token goes beyond), 4-6, 6-7 (one character of three tokens), a
  # space, 8-10.
  words = [(0, False), (3, False), (4, False), (6, False), (7, True), (8, False)]
  found = segmenters.word_starts(np.array(spans), words)
  assert found.tolist() == [1, 0, 1, 0, 0, 1, 0, 0, 1, 0]
  assert segmenters.word_starts(np.zeros((0, 2), int), []).shape == (0,)


def units(text):
  """The words of a text, each with the white space before it, as UTF-8."""
  found, space = [], ''
  for word in jieba.cut(text):
    space += word
    if not word.isspace():
      found, space = [*found, space], ''
  return [unit.encode() for unit in [*found, space] if unit]


def test_the_starts_of_a_text_spell_its_words():
  for text in TEXTS:
    encoded = segmenters.encode_with_jieba({'text': text}, TOKENIZER)
    np.testing.assert_array_equal(encoded['tokens'], TOKENIZER.encode(text))
    cuts = np.flatnonzero(encoded['word_starts'])[1:] if text else []
    pieces = np.split(encoded['tokens'], cuts)
    assert [TOKENIZER.decode(ids).encode() for ids in pieces if len(ids)] == units(text)


def masked_words(objective, laid_out, row):
  """For each word of a row, which of its tokens are masked."""
  rng = np.random.default_rng(row)
  example = laid_out.example(row, rng)
  starts = example.get(segmenters.WORD_STARTS)
  out = objective.transform(example, rng)
  taken = np.zeros(len(out['tokens']), bool)
  taken[out['mask_positions'][out['mask_weights'] > 0]] = True
  if starts is None:
    return taken, out
  ordinary = (example['segments'] > 0) & ~TOKENIZER.special[example['tokens']]
  begin, length = mlm.words(ordinary, starts > 0, len(ordinary))
  return [taken[b : b + n] for b, n in zip(begin, length, strict=True)], out


@pytest.mark.parametrize('masking', ['word', 'span'])
@pytest.mark.parametrize('layout', ['mlm', 'nsp'])
def test_words_are_masked_whole(masking, layout):
  objective = mlm.Objective(TOKENIZER, mask_rate=0.4, masking=masking, words='jieba')
  encode = mlm.Objective.encoding({'words': 'jieba'})
  memory = documents.Memory([{'text': text} for text in TEXTS], encode, TOKENIZER)
  rows = (objective if layout == 'mlm' else nsp.Objective(TOKENIZER)).rows(memory, 96)
  masked = longer = 0
  for row in range(len(rows)):
    words, out = masked_words(objective, rows, row)
    assert segmenters.WORD_STARTS not in out
    assert all(word.all() or not word.any() for word in words)
    masked += sum(word.all() for word in words)
    longer += sum(word.all() and len(word) > 3 for word in words)  # more than one character
  assert masked > 4 and longer > 2


def test_without_a_segmenter_words_are_cut():
  """Negative control: the tokenizer sees each sign as a word."""
  objective = mlm.Objective(TOKENIZER, mask_rate=0.4, masking='word')
  assert mlm.Objective.encoding({}) is mlm.Objective.encode
  memory = documents.Memory([{'text': TEXTS[0]}], mlm.Objective.encode, TOKENIZER)
  taken, _ = masked_words(objective, objective.rows(memory, 96), 0)
  encoded = segmenters.encode_with_jieba({'text': TEXTS[0]}, TOKENIZER)
  pieces = np.split(taken[1 : 1 + len(encoded['tokens'])], np.flatnonzero(encoded['word_starts']))
  assert any(piece.any() and not piece.all() for piece in pieces)


def test_what_is_refused(monkeypatch):
  with pytest.raises(ValueError, match="objective.words='jeiba' must be one of jieba"):
    mlm.Objective(TOKENIZER, masking='word', words='jeiba')
  with pytest.raises(ValueError, match='masking by token masks none as a whole'):
    mlm.Objective(TOKENIZER, words='jieba')
  objective = mlm.Objective(TOKENIZER, masking='word', words='jieba')
  row = {'tokens': np.zeros(4, np.int32), 'segments': np.ones(4, np.int32)}
  with pytest.raises(ValueError, match='needs rows that mlm, nsp or sop lays out'):
    objective.transform(row, np.random.default_rng(0))
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == 'jieba':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(ImportError, match="pip install 'llm_jax.zh.'"):
    mlm.Objective(TOKENIZER, masking='word', words='jieba')
