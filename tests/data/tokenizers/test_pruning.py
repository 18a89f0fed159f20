"""Vocabularies without tokens: texts that need the others are the same tokens as before."""

import json

import numpy as np
import pytest

from llm_jax.data.tokenizers import _pruning, hf, sentencepiece

TEXTS = [
  'the cat sat on the mat, and the cats sat on the mats',
  'a dog and a catalogue of dogs; dogmatic cats at the mat',
  '多少 rain in Spain — naïve café, déjà vu… 🙂🙂 42',
]
OTHERS = ['the dog sat on a catalogue', 'zebras: ñandú! 🦓 in Spain 2024']

SIZES = {'unigram': 320, 'bpe': 345}


def trained(kind, folder):
  texts = [text for text in TEXTS + OTHERS for _ in range(30)]
  return sentencepiece.create(
    lambda: iter(texts), kind, str(folder), vocab_size=SIZES[kind], kind=kind
  )


def wordpiece(folder):
  words = 'the cat ##s sat on mat , and a dog ##matic at of ; catalogue ##alogue in rain x q'
  letters = sorted(set(''.join(TEXTS).lower()) - {' '})
  names = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *words.split()]
  names += [c for c in letters if c not in names] + [f'##{c}' for c in letters]
  folder.mkdir(exist_ok=True)
  (folder / 'vocab.txt').write_text('\n'.join(names))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps(dict(tokenizer_class='BertTokenizer', do_lower_case=True))
  )
  return hf.load(str(folder))


def exported(kind, folder):
  trained(kind, folder).export(str(folder / 'hf'), causal=True, max_len=64, token_types=False)
  return hf.load(str(folder / 'hf'))


MADE = {
  'unigram': lambda folder: trained('unigram', folder),
  'bpe': lambda folder: trained('bpe', folder),
  'hf unigram': lambda folder: exported('unigram', folder),
  'hf bpe': lambda folder: exported('bpe', folder),
  'wordpiece': lambda folder: wordpiece(folder / 'words'),
}


@pytest.mark.parametrize('kind', MADE)
def test_texts_of_the_corpus_are_the_same_tokens(kind, tmp_path):
  whole = MADE[kind](tmp_path)
  before = [whole.encode(text) for text in TEXTS]
  pruned, order = whole.pruned(set(np.concatenate(before).tolist()))
  assert pruned.vocab_size == len(order) < whole.vocab_size
  former = np.array(order)
  for text, ids in zip(TEXTS, before, strict=True):
    np.testing.assert_array_equal(former[pruned.encode(text)], ids)
  for text in OTHERS:  # another text is still spelled
    assert pruned.decode(pruned.encode(text)) == whole.decode(whole.encode(text))
  for name, number in whole.specials.items():
    assert former[pruned.specials[name]] == number
  if whole.template is not None:
    for ours, theirs in zip(pruned.template, whole.template, strict=True):
      assert former[list(ours)].tolist() == list(theirs)
  # Written and read, it is the same one.
  pruned.save(str(tmp_path / 'saved'))
  module = hf if isinstance(pruned, hf.Tokenizer) else sentencepiece
  again = module.load(str(tmp_path / 'saved'))
  assert again.fingerprint == pruned.fingerprint != whole.fingerprint


def test_of_bpe_what_a_token_is_made_of_stays():
  vocabulary = {'a', 'b', 'c', 'ab', 'bc', 'abc', 'd', 'cd'}
  assert _pruning.with_parts(['abc'], vocabulary) == {'abc', 'ab', 'bc', 'a', 'b', 'c'}


def test_ids_of_configs_are_the_new_ones_and_those_that_are_gone_are_left_out():
  config = {'eos_token_id': [3, 7], 'pad_token_id': 0, 'bos_token_id': 5, 'x': 1}
  config |= {'added_tokens_decoder': {'3': {'content': 'e'}, '5': {'content': 'b'}}}
  assert _pruning.special_ids(config, [0, 3, 7]) == {
    'eos_token_id': [1, 2],
    'pad_token_id': 0,
    'x': 1,
    'added_tokens_decoder': {'1': {'content': 'e'}},
  }


def test_a_kind_that_is_not_known_is_refused():
  with pytest.raises(ValueError, match='of the kind WordLevel cannot be pruned'):
    _pruning.tokenizer_json({'model': {'type': 'WordLevel', 'vocab': {'a': 0}}}, [0])
