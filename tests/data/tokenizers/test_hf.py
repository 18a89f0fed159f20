"""Tokenizers of Hugging Face folders: special tokens, bytes, words, offsets, fallbacks, broken
files, other processes.
"""

import io
import json
import pickle
import sys

import numpy as np
import pytest
import sentencepiece as spm
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm_jax.core import plugins
from llm_jax.data.tokenizers import byte, hf
from llm_jax.objectives import mlm

TEXTS = [
  'the cat sat on the mat, and the dog ran after the cat',
  "unbelievably unhappy, isn't it? naïve café",
  '多少钱 一二三',
  'a b',
] * 9
LITERALS = '[MASK] a[MASK]b<s>hi</s> <|endoftext|><unk>[UNK] <pad> [CLS]'
BERT = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
ROBERTA = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']


def wordpiece(lowercase=True):
  tokenizer = library.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  tokenizer.train_from_iterator(
    TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=BERT, show_progress=False)
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    '[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=8)
  return tokenizer


def byte_level(specials=('<|endoftext|>',)):
  tokenizer = library.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel()
  tokenizer.train_from_iterator(
    TEXTS,
    trainers.BpeTrainer(
      vocab_size=330,
      special_tokens=list(specials),
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return tokenizer


def unigram():
  tokenizer = library.Tokenizer(models.Unigram())
  tokenizer.normalizer = normalizers.NFKC()
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  tokenizer.train_from_iterator(
    TEXTS,
    trainers.UnigramTrainer(
      vocab_size=90, special_tokens=ROBERTA, unk_token='<unk>', show_progress=False
    ),
  )
  tokenizer.post_processor = processors.RobertaProcessing(('</s>', 2), ('<s>', 0))
  return tokenizer


def folder(path, tokenizer, **files):
  path.mkdir(parents=True, exist_ok=True)
  (path / 'tokenizer.json').write_text(
    tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
  )
  for name, content in files.items():
    (path / f'{name}.json').write_text(json.dumps(content))
  return str(path)


KINDS = {'wordpiece': wordpiece, 'byte_level': byte_level, 'unigram': unigram}


@pytest.fixture(scope='module', params=KINDS)
def opened(request, tmp_path_factory):
  """(kind, our tokenizer, the library's own)."""
  own = KINDS[request.param]()
  path = folder(tmp_path_factory.mktemp('folder'), own)
  own.no_truncation()
  own.no_padding()
  return (
    request.param,
    plugins.construct(
      'tokenizer', hf.create, {'path': path}, texts=None, texts_fingerprint='', cache=''
    ),
    own,
  )


def check_ordinary(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert not tokenizer.special[ids[ids != tokenizer.unk_id]].any()


def test_no_text_is_a_special_token(opened):
  _, tokenizer, own = opened
  check_ordinary(tokenizer, LITERALS)
  for number in np.flatnonzero(tokenizer.special):
    check_ordinary(tokenizer, f'a {own.id_to_token(number)}b{own.id_to_token(number)}')
  assert (
    tokenizer.special[own.encode(LITERALS, add_special_tokens=False).ids].sum() >= 1
  )  # the library finds them unasked
  assert (
    list(tokenizer.encode(LITERALS, special=True))
    == own.encode(LITERALS, add_special_tokens=False).ids
  )


def test_a_unigram_model_finds_special_tokens_in_a_text_unless_hindered():
  own = unigram()
  own.encode_special_tokens = True
  assert own.token_to_id('</s>') in own.encode('hi</s>', add_special_tokens=False).ids


@settings(deadline=None, max_examples=150)
@given(
  text=st.text(max_size=30)
  | st.lists(
    st.sampled_from([*'ab 的é\u0301[]<>/s\n\u2581', '[MASK]', '<s>', '</s>', '<|endoftext|>']),
    max_size=20,
  ).map(''.join)
)
def test_any_text(opened, text):
  kind, tokenizer, own = opened
  check_ordinary(tokenizer, text)
  assert (
    list(tokenizer.encode(text, special=True)) == own.encode(text, add_special_tokens=False).ids
  )
  ids, spans = tokenizer.offsets(text)
  assert list(ids) == list(tokenizer.encode(text)) and spans.shape == (len(ids), 2)
  assert np.all((spans[:, 0] >= 0) & (spans[:, 0] <= spans[:, 1]) & (spans[:, 1] <= len(text)))
  if kind == 'byte_level':
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bytes_words_and_offsets(opened):
  kind, tokenizer, own = opened
  text = 'the cat, unbelievably naïve 多少'
  ids, spans = tokenizer.offsets(text)
  pieces = [text[begin:end] for begin, end in spans]
  words = [own.id_to_token(i) for i in ids]
  starts = tokenizer.word_start[ids]
  if kind == 'wordpiece':
    assert [w.removeprefix('##') for w in words if w != '[UNK]'] == [
      p.lower().replace('ï', 'i') for p, w in zip(pieces, words, strict=True) if w != '[UNK]'
    ]
    assert list(starts) == [not w.startswith('##') and w != '[UNK]' for w in words]
    assert list(tokenizer.token_bytes[ids]) == [
      0 if w == '[UNK]' else len(w.removeprefix('##').encode()) for w in words
    ]
    return
  assert sum(tokenizer.token_bytes[ids]) == len(text.encode()) + (
    kind == 'unigram'
  )  # the space in front
  assert all(starts[i] for i, w in enumerate(words) if w[0] in '▁Ġ,')
  assert not any(starts[i] for i, w in enumerate(words) if w[0].isascii() and w[0].isalpha())
  assert tokenizer.decode(ids) == text


def test_truncation_and_padding_are_off(opened):
  assert len(opened[1].encode('the cat sat on the mat and the dog ran')) > 8
  assert len(opened[1].encode('a')) < 4


def test_special_ids_and_template(opened):
  kind, tokenizer, _ = opened
  ids = tuple(
    getattr(tokenizer, f'{name}_id') for name in ('pad', 'unk', 'cls', 'sep', 'mask', 'bos', 'eos')
  )
  want = {
    'wordpiece': ((0, 1, 2, 3, 4, 2, 3), ((2,), (3,))),
    'byte_level': ((0, 0, 0, 0, None, 0, 0), ((), ())),
    'unigram': ((1, 3, 0, 2, 4, 0, 2), ((0,), (2,))),
  }
  assert (ids, tokenizer.template) == want[kind]


@pytest.mark.parametrize(
  'model, generation, want',
  [
    ({'eos_token_id': [2, 1]}, None, (1, 2)),
    ({'eos_token_id': 2}, {'eos_token_id': [0, 2]}, (1, 0, 2)),
    ({'eos_token_id': [2, 999]}, {'pad_token_id': 0}, (1, 2)),
    ({}, None, (1,)),
  ],
)
def test_every_end_that_a_folder_names_is_one(tmp_path, model, generation, want):
  more = {} if generation is None else {'generation_config': generation}
  path = folder(
    tmp_path,
    byte_level(('<|start|>', '<|end|>', '<|x|>')),
    tokenizer_config={'eos_token': '<|end|>'},
    config=model | {'model_type': 'gpt2'},
    **more,
  )
  assert hf.create(path=path).eos_ids == want
  hf.load(path).save(str(tmp_path / 'saved'))
  assert hf.load(str(tmp_path / 'saved')).eos_ids == want


@pytest.mark.parametrize(
  'config, mapping, model, want',
  [
    ({'eos_token': '<|end|>'}, {}, {}, dict(eos=1, sep=1, pad=1, unk=1, bos=1, cls=1)),
    (
      {'bos_token': {'content': '<|end|>'}},
      {'eos_token': '<|x|>', 'bos_token': '<|x|>'},
      {},
      dict(bos=1, cls=1, eos=2, sep=2, pad=2),
    ),
    (
      {},
      {},
      {'bos_token_id': 1, 'eos_token_id': [2, 1], 'pad_token_id': 300},
      dict(bos=1, eos=2, cls=1, pad=2),
    ),
    (
      {},
      {},
      {'eos_token_id': 5},
      dict(pad=0, unk=0, eos=0, bos=0),
    ),  # 5 is an ordinary token: not believed
    ({'pad_token': '<|no such|>'}, {}, {}, dict(pad=0)),
    ({'mask_token': '!'}, {}, {}, dict(pad=0)),
  ],
)
def test_where_special_tokens_come_from(tmp_path, config, mapping, model, want):
  own = byte_level(('<|start|>', '<|end|>', '<|x|>'))
  path = folder(
    tmp_path,
    own,
    tokenizer_config=config,
    special_tokens_map=mapping,
    config=model | {'model_type': 'gpt2'},
  )
  tokenizer = hf.create(path=path)
  assert {name: getattr(tokenizer, f'{name}_id') for name in want} == want
  mask = own.token_to_id(config['mask_token']) if 'mask_token' in config else None
  assert tokenizer.mask_id == mask
  if mask is None:
    with pytest.raises(ValueError, match="'mlm' needs a mask token"):
      mlm.Objective(tokenizer)
  else:
    assert (
      tokenizer.special[mask] and list(tokenizer.encode('a!', special=True))[-1] == mask
    )  # named, so it is special
  hf.load(path).save(str(tmp_path / 'saved'))
  assert hf.load(str(tmp_path / 'saved')).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
  'config, want',
  [
    ({'add_bos_token': True, 'add_eos_token': False}, 'add_eos_token=False'),
    ({'add_bos_token': False}, 'add_bos_token=False'),
    ({'add_bos_token': True, 'add_eos_token': True}, None),
    ({}, None),
  ],
)
def test_the_post_processor_has_the_last_word_on_the_template(tmp_path, caplog, config, want):
  own = byte_level(('<pad>', '<|x|>', '<|y|>'))
  own.post_processor = processors.TemplateProcessing(
    '<|x|> $A <|y|>', special_tokens=[('<|x|>', 1), ('<|y|>', 2)]
  )
  config = config | {'bos_token': '<|x|>', 'eos_token': '<|y|>'}
  opened = hf.create(path=folder(tmp_path, own, tokenizer_config=config))
  assert opened.template == ((1,), (2,))
  assert ('not obeyed' in caplog.text) == (want is not None) and (want or '') in caplog.text


def test_berts_options_stand_in_its_config(tmp_path):
  own = wordpiece()
  uncased = hf.create(path=folder(tmp_path, own))
  assert uncased.decode(uncased.encode('CAT')) == 'cat'
  config = {'tokenizer_class': 'BertTokenizer', 'do_lower_case': False}
  cased = hf.create(path=folder(tmp_path, own, tokenizer_config=config))
  assert list(cased.encode('CAT')) == [cased.unk_id]


def test_ids_without_a_token(tmp_path):
  content = json.loads(byte_level().to_str())
  content['model']['vocab'] = {
    token: number + 5 * (number > 100) for token, number in content['model']['vocab'].items()
  }
  tokenizer = hf.create(path=folder(tmp_path, json.dumps(content)))
  assert tokenizer.vocab_size == max(content['model']['vocab'].values()) + 1
  assert tokenizer.special[101:106].all() and not tokenizer.token_bytes[101:106].any()
  assert tokenizer.decode([*tokenizer.encode('cat'), 103]) == 'cat'
  with pytest.raises(ValueError, match=f'0 to {tokenizer.vocab_size - 1}'):
    tokenizer.decode([tokenizer.vocab_size])


def test_save_load_and_other_processes(opened, tmp_path):
  _, tokenizer, _ = opened
  tokenizer.save(str(tmp_path / 'made' / 'here'))
  loaded = hf.load(str(tmp_path / 'made' / 'here'))
  sent = pickle.loads(pickle.dumps(tokenizer))
  assert (
    loaded.fingerprint == sent.fingerprint == tokenizer.fingerprint
    and loaded.specials == tokenizer.specials
  )
  assert (
    list(sent.encode(TEXTS[1])) == list(loaded.encode(TEXTS[1])) == list(tokenizer.encode(TEXTS[1]))
  )
  with pytest.raises(ValueError, match="holds a tokenizer 'hf', not byte"):
    byte.load(str(tmp_path / 'made' / 'here'))
  other = KINDS[opened[0]]()
  other.normalizer = normalizers.Lowercase()
  assert hf.load(folder(tmp_path / 'other', other)).fingerprint != tokenizer.fingerprint


def test_what_was_looked_for(tmp_path):
  with pytest.raises(
    ValueError,
    match=r'tokenizer.json, vocab.txt, vocab.json with merges.txt, tokenizer.model, spiece.model',
  ):
    hf.create(path=str(tmp_path))
  byte.create().save(str(tmp_path))
  with pytest.raises(ValueError, match="holds a tokenizer 'byte', not hf"):
    hf.create(path=str(tmp_path))


def test_older_vocabulary_files(tmp_path):
  own = wordpiece(lowercase=False)
  vocab = own.get_vocab()
  (tmp_path / 'vocab.txt').write_text('\n'.join(sorted(vocab, key=vocab.get)))
  (tmp_path / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
  own.no_truncation()
  own.no_padding()
  tokenizer = hf.create(path=str(tmp_path))
  assert list(tokenizer.encode(TEXTS[1])) == own.encode(TEXTS[1], add_special_tokens=False).ids
  assert tokenizer.template == ((2,), (3,))
  (tmp_path / 'vocab.txt').write_bytes(b'[UNK]\n\xff\n')
  with pytest.raises(ValueError, match=r'vocab.txt is not a text file in UTF-8'):
    hf.create(path=str(tmp_path))
  (tmp_path / 'vocab.txt').write_text('a\nb\n')
  with pytest.raises(ValueError, match=r'has no \[UNK\]'):
    hf.create(path=str(tmp_path))


def test_other_byte_level_vocabularies_want_their_tokenizer_json(tmp_path):
  byte_level().model.save(str(tmp_path))
  assert hf.create(path=str(tmp_path)).vocab_size == byte_level().get_vocab_size()
  (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
  with pytest.raises(ValueError, match='Qwen2Tokenizer without a tokenizer.json'):
    hf.create(path=str(tmp_path))


def model_file(path, name='tokenizer.model', **options):
  """A SentencePiece model as its trainer makes it by default: a space in front, unk 0, bos 1, eos
  2.
  """
  path.mkdir(exist_ok=True)
  writer = io.BytesIO()
  spm.SentencePieceTrainer.Train(
    sentence_iterator=iter(TEXTS),
    model_writer=writer,
    hard_vocab_limit=False,
    minloglevel=2,
    **(dict(vocab_size=60) | options),
  )
  (path / name).write_bytes(writer.getvalue())
  return spm.SentencePieceProcessor(model_proto=writer.getvalue())


@pytest.mark.parametrize(
  'options',
  [{}, dict(model_type='bpe'), dict(model_type='bpe', byte_fallback=True, vocab_size=330)],
)
def test_a_sentencepiece_model_in_a_folder(tmp_path, options):
  model = model_file(tmp_path, **options)
  size = model.vocab_size()
  (tmp_path / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': 'LlamaTokenizer',
        'added_tokens_decoder': {
          str(size): {'content': '<|user|>', 'special': True},
          str(size + 1): {'content': '<tool>', 'special': False},
        },
      }
    )
  )
  tokenizer = hf.create(path=str(tmp_path))
  for text in [
    *TEXTS[:4],
    ' the  cat',
    '  ',
    LITERALS.replace('<unk>', '').replace('<s>', '').replace('</s>', ''),
  ]:
    assert list(tokenizer.encode(text)) == model.encode(text)
  assert list(tokenizer.encode('the cat<tool>')) == [*model.encode('the cat'), size + 1]
  assert list(tokenizer.encode('<s><|user|>', special=True)) == [1, size]
  assert (
    not tokenizer.special[tokenizer.encode('the<|user|>')[1:]].all()
    and tokenizer.vocab_size == size + 2
  )
  assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.template) == (
    0,
    1,
    2,
    ((1,), ()),
  )


def test_the_order_of_xlm_roberta(tmp_path):
  model = model_file(tmp_path, 'sentencepiece.bpe.model')
  tokenizer = hf.create(path=str(tmp_path))
  want = [i + 1 if i else 3 for i in model.encode(TEXTS[0] + ' ÿ')]
  assert list(tokenizer.encode(TEXTS[0] + ' ÿ')) == want
  assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.unk_id) == (0, 1, 2, 3)
  assert tokenizer.mask_id == model.vocab_size() + 1 == tokenizer.vocab_size - 1
  model_file(tmp_path, 'sentencepiece.bpe.model', bos_id=-1)
  with pytest.raises(ValueError, match='begins with <unk>, <s>, </s>, this one with'):
    hf.create(path=str(tmp_path))


@pytest.mark.parametrize('content', [b'', b'not a model', b'\x00' * 50])
def test_a_broken_sentencepiece_model_is_named(tmp_path, content):
  (tmp_path / 'spiece.model').write_bytes(content)
  with pytest.raises(ValueError, match=r'spiece\.model: (not )?a SentencePiece model'):
    hf.create(path=str(tmp_path))


@pytest.mark.parametrize(
  'content',
  [
    '',
    '{',
    '[]',
    '{}',
    'null',
    '{"model": {}}',
    '{"version": "1.0", "model": {"type": "BPE"}}',
    '{"model": {"type": "WordLevel", "vocab": {"a": 4000000000}, "unk_token": "a"}}',
    # A prefix that is longer than a token: the library panics.
    '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], '
    '"continuing_subword_prefix": "########"}}',
  ],
)
def test_a_broken_file_is_named(tmp_path, content):
  with pytest.raises(ValueError, match=r'tokenizer\.json'):
    hf.create(path=folder(tmp_path, content))
  folder(tmp_path, byte_level())
  (tmp_path / 'tokenizer_config.json').write_text('["a"]')
  with pytest.raises(ValueError, match=r'tokenizer_config\.json holds a list'):
    hf.create(path=str(tmp_path))


SOURCE = json.dumps(json.loads(byte_level().to_str()))


@settings(deadline=None, max_examples=150)
@given(
  start=st.integers(0, len(SOURCE) - 1),
  size=st.integers(0, 40),
  new=st.text('{}[]",:0a\\\u0120', max_size=3),
)
def test_a_file_with_a_hole_is_a_value_error_or_a_tokenizer(tmp_path_factory, start, size, new):
  path = folder(tmp_path_factory.mktemp('cut'), SOURCE[:start] + new + SOURCE[start + size :])
  try:
    tokenizer = hf.load(path)
  except ValueError as error:
    assert 'tokenizer.json' in str(error)
  else:
    tokenizer.decode(tokenizer.encode('a cat'))


def test_without_the_library(tmp_path, monkeypatch):
  path = folder(tmp_path, byte_level())
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ImportError, match=r"pip install 'llm_jax\[hf\]'"):
    hf.create(path=path)


def test_half_of_a_surrogate_pair(opened):
  with pytest.raises(ValueError, match='surrogate pair at character 1'):
    opened[1].encode('a\ud800')
