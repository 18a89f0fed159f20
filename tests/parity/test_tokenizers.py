"""Token ids equal to those of `transformers`: folders read, and our own tokenizers exported and
opened by AutoTokenizer.
"""

import io
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import pairs
from llm_jax.data.sources import stdlib
from llm_jax.data.tokenizers import _convert, _training, byte, hf, sentencepiece

library = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

import sentencepiece as spm  # noqa: E402
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

CHINESE = (
  '清晨的港口还没有醒来，渔民们已经把小船推下了水。'
  '老张说：“今天的风从东边来，晚上也许会下雨。”１９８７年'
)
MARKS = 'café Ångström Tiếng Việt ñ é が ế 한국어 각하 हिन्दी में क़'
NASTY = [
  '',
  ' ',
  '   ',
  '\n',
  '\t',
  '\r\n',
  'a\r\nb\r\n',
  'hello',
  ' hello',
  'hello ',
  '  two  spaces\tand\r\n\n lines \n',
  'x' * 300,
  'ab' * 200,
  'Supercalifragilisticexpialidocious' * 9,
  '-' * 101,
  '!' * 50,
  'the cat sat on the mat. ' * 9,
  '[MASK] [CLS] [SEP] [PAD] [UNK]',
  'a[MASK]b',
  '<s>hi</s>',
  '<unk><pad><mask>',
  '<|endoftext|>',
  '<0x41>',
  'x<0x0A>y',
  '<0x',
  's>',
  '👩\u200d👩\u200d👧',
  '👍🏽 👨🏿\u200d🚀 🏳\ufe0f\u200d🌈',
  '🇩🇪🇫🇷',
  CHINESE,
  'こんにちは、世界。カタカナ ｶﾞｷﾞ',
  'مرحبا بالعالم، كيف الحال؟',
  'สวัสดีชาวโลก ภาษาไทยง่ายมาก',
  unicodedata.normalize('NFC', MARKS),
  unicodedata.normalize('NFD', MARKS),
  '\u0301',
  'ａ\u0301',
  'ﬁ Ⅷ ａ ① \u00a0\u3000',
  '½ ² ™ ℃ ㌔ ﷺ',
  'ŉ ß ẞ İ ı ſ',
  '\x00\x07\x1b',
  'a\x00b',
  '\u200b\u200d\u200c\ufeff\u2060',
  'soft\u00adhyphen',
  '\u2028\u2029',
  '\u2581',
  'a\u2581b\u2581\u2581 c',
  ' \u2581 ',
  '\ue000\uf8ff',
  '\U0010ffff',
  '\ufffe\uffff',
  '\ufffd',
  "don't I'll we've",
  '1234567890 3.14159',
  'https://example.com/a?b=c&d=%20',
  'def f(x):\n        return x**2  # café\n',
]
ANY = st.text(max_size=20) | st.lists(
  st.sampled_from(
    [*'aab  \n\t的。é>s0x\u0301\u2581\u3000ﬁ👩', 'the ', '[MASK]', '<s>', '</s>', '<0x41>', '\r\n']
  ),
  max_size=20,
).map(''.join)
BERT = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
NAMES = ('pad', 'unk', 'cls', 'sep', 'mask', 'bos', 'eos')


def corpus():
  source = stdlib.Source()
  return [line[:300] for i in range(0, len(source), 200) for line in source[i]['text'].split('\n')][
    :2500
  ] + [CHINESE, MARKS] * 3


def wordpiece(path, lowercase):
  """BERT: vocab.txt and its config alone."""
  own = library.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  own.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  own.train_from_iterator(
    corpus(), trainers.WordPieceTrainer(vocab_size=800, special_tokens=BERT, show_progress=False)
  )
  vocab = own.get_vocab()
  (path / 'vocab.txt').write_text('\n'.join(sorted(vocab, key=vocab.get)) + '\n')
  return {'tokenizer_class': 'BertTokenizer', 'do_lower_case': lowercase}, 'bert'


def byte_level(path, roberta):
  """GPT-2 or RoBERTa: vocab.json and merges.txt alone."""
  specials = ['<s>', '<pad>', '</s>', '<unk>', '<mask>'] if roberta else ['<|endoftext|>']
  own = library.Tokenizer(models.BPE())
  own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  own.train_from_iterator(
    corpus(),
    trainers.BpeTrainer(
      vocab_size=800,
      special_tokens=specials,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  own.model.save(str(path))
  return {
    'tokenizer_class': 'RobertaTokenizer' if roberta else 'GPT2Tokenizer'
  }, 'roberta' if roberta else 'gpt2'


def unigram(path):
  """A tokenizer.json with truncation and padding on, and specials that only the config names."""
  own = library.Tokenizer(models.Unigram())
  own.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
  own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  own.train_from_iterator(
    corpus(),
    trainers.UnigramTrainer(
      vocab_size=800,
      special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'],
      unk_token='<unk>',
      show_progress=False,
    ),
  )
  own.post_processor = processors.TemplateProcessing(
    '<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)]
  )
  content = json.loads(own.to_str())
  content['added_tokens'] = [
    token for token in content['added_tokens'] if token['content'] != '<mask>'
  ]
  content['truncation'] = {
    'direction': 'Right',
    'max_length': 4,
    'strategy': 'LongestFirst',
    'stride': 0,
  }
  (path / 'tokenizer.json').write_text(json.dumps(content))
  return {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'mask_token': '<mask>',
    'unk_token': '<unk>',
    'pad_token': '<pad>',
    'bos_token': '<s>',
    'eos_token': '</s>',
  }, 'xlm-roberta'


FOLDERS = {
  'wordpiece uncased': (wordpiece, True),
  'wordpiece cased': (wordpiece, False),
  'bytes': (byte_level, False),
  'bytes roberta': (byte_level, True),
  'unigram': (unigram,),
}


@pytest.fixture(scope='module', params=FOLDERS)
def pair(request, tmp_path_factory):
  """Ours and theirs, from one folder."""
  path = tmp_path_factory.mktemp('folder')
  make, *options = FOLDERS[request.param]
  config, kind = make(path, *options)
  (path / 'tokenizer_config.json').write_text(json.dumps(config))
  (path / 'config.json').write_text(json.dumps({'model_type': kind}))
  return hf.create(path=str(path)), transformers.AutoTokenizer.from_pretrained(path)


def theirs(tokenizer, text):
  return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)['input_ids']


def check_folder(pair, text):
  ours, reference = pair
  ids = ours.encode(text, special=True)
  assert list(ids) == theirs(reference, text)
  assert ours.decode(ids) == reference.decode(
    ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
  )
  assert not ours.special[[i for i in ours.encode(text) if i != ours.unk_id]].any()


def test_folders_give_the_same_ids(pair):
  for text in [*NASTY, *corpus()[:300]]:
    check_folder(pair, text)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(text=ANY)
def test_folders_give_the_same_ids_for_any_text(pair, text):
  check_folder(pair, text)


def test_folders_give_the_same_places_specials_and_template(pair):
  ours, reference = pair
  for text in NASTY:
    encoding = reference(
      text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
    )
    assert ours.offsets(text, special=True)[1].tolist() == [
      list(span) for span in encoding['offset_mapping']
    ]
  assert ours.vocab_size == len(reference)
  for name in NAMES:
    number = getattr(reference, f'{name}_token_id')
    assert number is None or number == getattr(ours, f'{name}_id')
  before, after = ours.template
  assert [*before, *ours.encode('a cat'), *after] == reference('a cat', truncation=False)[
    'input_ids'
  ]
  texts = ours.encode('a cat'), ours.encode('the dog')
  row = pairs.row(*texts, 64, pairs.frame(ours))
  together = reference('a cat', 'the dog', truncation=False)
  count = len(together['input_ids'])
  assert row['tokens'][:count].tolist() == together['input_ids'] and row['segments'].sum() == count
  types = together.get('token_type_ids', [0] * count)  # not there: the model gets zeros
  assert row['token_types'][:count].tolist() == types


def test_folders_go_through_an_export(pair, tmp_path):
  ours, _ = pair
  ours.export(str(tmp_path), causal=False, max_len=99, token_types=True)
  reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
  again = hf.create(path=str(tmp_path))
  for text in NASTY:
    assert (
      list(ours.encode(text, special=True))
      == theirs(reference, text)
      == list(again.encode(text, special=True))
    )
  assert (
    reference.model_max_length == 99
    and ours.specials == again.specials
    and ours.template == again.template
    and ours.pair_template == again.pair_template
  )


def test_a_lost_normalizer_is_noticed(pair):
  ours, reference = pair
  content = json.loads(ours._files['tokenizer.json'])
  if content['normalizer'] is not None:
    other = hf.Tokenizer({'tokenizer.json': json.dumps(content | {'normalizer': None})})
    assert sum(list(other.encode(text)) != theirs(reference, text) for text in NASTY) > 5


def foreign(**options):
  """A model as SentencePiece's own trainer makes it."""
  writer = io.BytesIO()
  spm.SentencePieceTrainer.Train(
    sentence_iterator=iter(corpus()),
    model_writer=writer,
    minloglevel=2,
    num_threads=1,
    hard_vocab_limit=False,
    **(dict(vocab_size=700) | options),
  )
  return sentencepiece.Tokenizer(_convert.rounded(writer.getvalue()))


def own(spaces=True, **options):
  texts = corpus() if spaces else [line.replace(' ', '') for line in corpus()]
  return sentencepiece.Tokenizer(
    _training.train(
      texts,
      dict(
        vocab_size=1000,
        model_type=options['kind'],
        normalization_rule_name=options['normalization'],
        character_coverage=0.9995,
      ),
    )
  )


SYMBOLS = dict(
  user_defined_symbols=['[INST]', '\n', 'ab'],
  control_symbols=['<mask>', '[CLS]'],
  pad_id=3,
  byte_fallback=True,
)
OURS = {
  'byte': (lambda: byte.create(), {}),
  'unigram identity': (own, dict(kind='unigram', normalization='identity')),
  'unigram nfkc': (own, dict(kind='unigram', normalization='nfkc')),
  'bpe identity': (own, dict(kind='bpe', normalization='identity')),
  'bpe nfkc': (own, dict(kind='bpe', normalization='nfkc')),
  'unigram without spaces': (own, dict(kind='unigram', normalization='identity', spaces=False)),
  'bpe without spaces': (own, dict(kind='bpe', normalization='identity', spaces=False)),
  'foreign unigram': (foreign, {}),
  'foreign bpe with bytes': (foreign, dict(model_type='bpe', byte_fallback=True, vocab_size=1000)),
  'foreign llama': (
    foreign,
    dict(
      model_type='bpe',
      byte_fallback=True,
      vocab_size=1000,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
    ),
  ),
  'foreign unigram with symbols': (foreign, dict(vocab_size=1000, **SYMBOLS)),
  'foreign bpe with symbols': (foreign, dict(model_type='bpe', vocab_size=1000, **SYMBOLS)),
  'foreign bpe bare': (
    foreign,
    dict(model_type='bpe', normalization_rule_name='identity', add_dummy_prefix=False),
  ),
}


@pytest.fixture(scope='module', params=OURS)
def exported(request, tmp_path_factory):
  """Ours, theirs, theirs that takes special tokens for text, and ours from the exported folder."""
  path = tmp_path_factory.mktemp('exported')
  make, options = OURS[request.param]
  tokenizer = make(**options)
  tokenizer.export(str(path), causal=False, max_len=99, token_types=True)
  opened = [
    transformers.AutoTokenizer.from_pretrained(path, split_special_tokens=split)
    for split in (False, True)
  ]
  return tokenizer, *opened, hf.create(path=str(path))


def check_export(exported, text):
  ours, reference, plain, again = exported
  ids = list(ours.encode(text))
  assert ids == theirs(plain, text) == list(again.encode(text))
  assert (
    list(ours.encode(text, special=True))
    == theirs(reference, text)
    == list(again.encode(text, special=True))
  )
  assert ours.decode(ids) == plain.decode(ids, skip_special_tokens=True) == again.decode(ids)


def test_exports_give_the_same_ids(exported):
  for text in [*NASTY, *corpus()[:300]]:
    check_export(exported, text)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(text=ANY.filter(lambda text: usual(text)))
def test_exports_give_the_same_ids_for_any_text(exported, text):
  check_export(exported, text)


def usual(text):
  """Whether a text has none of what differs (see `_convert`): two marks on a letter, one on a
  ligature, private characters.
  """
  mark = unicodedata.combining
  decomposed = unicodedata.normalize('NFKD', text)
  twice = any(mark(a) and mark(b) for a, b in zip(decomposed, decomposed[1:], strict=False))
  ligature = any(
    mark(b) and len(unicodedata.normalize('NFKC', a)) > 1
    for a, b in zip(text, text[1:], strict=False)
  )
  return (
    not twice
    and not ligature
    and _convert._MARKER not in text
    and not any(ord(c) >= _convert._PRIVATE for c in text)
  )


def test_exports_have_the_same_special_tokens_and_tables(exported):
  ours, reference, _, again = exported
  assert reference.model_max_length == 99 and len(reference) == ours.vocab_size == again.vocab_size
  assert [getattr(reference, f'{name}_token_id') for name in NAMES] == [
    getattr(ours, f'{name}_id') for name in NAMES
  ]
  assert [getattr(again, f'{name}_id') for name in NAMES] == [
    getattr(ours, f'{name}_id') for name in NAMES
  ]
  for table in ('special', 'token_bytes', 'word_start'):
    np.testing.assert_array_equal(getattr(again, table), getattr(ours, table))
  first, second = list(ours.encode('a cat')), list(ours.encode('mat'))
  row = reference('a cat', 'mat')
  assert row['input_ids'] == [ours.cls_id, *first, ours.sep_id, *second, ours.sep_id]
  assert row['token_type_ids'] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
  assert again.template == ((ours.cls_id,), (ours.sep_id,))


@pytest.mark.parametrize(
  'kind', ['bert', 'roberta', 'modernbert', 'gpt2', 'llama', 'mistral', 'qwen3']
)
def test_exports_stand_beside_any_config(tmp_path, kind):
  causal = kind in ('gpt2', 'llama', 'mistral', 'qwen3')
  byte.create().export(str(tmp_path), causal=causal, max_len=99, token_types=not causal)
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': kind, 'vocab_size': 263}))
  row = transformers.AutoTokenizer.from_pretrained(tmp_path)('a')
  assert row['input_ids'] == ([5, 104] if causal else [2, 104, 3])
  assert ('token_type_ids' in row) != causal


def converted(tokenizer, **changes):
  content = _convert.convert(tokenizer._model, tokenizer.specials, sign_is_space=False)
  return hf.Tokenizer({'tokenizer.json': json.dumps(content | changes)}), content


def differing(one, other, texts):
  return [text for text in texts if list(one.encode(text)) != list(other.encode(text))]


def test_the_character_map_alone_would_lose_marks():
  tokenizer = own(kind='unigram', normalization='nfkc')
  whole, content = converted(tokenizer)
  charsmap = next(
    part for part in content['normalizer']['normalizers'] if part['type'] == 'Precompiled'
  )
  lost = differing(converted(tokenizer, normalizer=charsmap)[0], tokenizer, NASTY)
  assert unicodedata.normalize('NFD', MARKS) in lost and 'hello' not in lost
  assert not differing(whole, tokenizer, NASTY)


def test_scores_that_are_not_rounded_would_differ_in_runs(monkeypatch):
  runs = [
    'the' + a * n + b * m
    for a in ' -x'
    for b in ' -x\n'
    for n in range(1, 40, 3)
    for m in range(1, 40, 3)
  ]
  options = dict(kind='unigram', normalization='identity')
  exact = own(**options)
  assert not differing(converted(exact)[0], exact, runs)
  monkeypatch.setattr(_convert, 'rounded', lambda model: model)
  rough = own(**options)
  assert differing(converted(rough)[0], rough, runs)


def test_marks_out_of_order_are_the_known_difference(tmp_path):
  tokenizer = own(kind='bpe', normalization='nfkc')
  tokenizer.export(str(tmp_path), causal=False, max_len=99, token_types=True)
  opened = hf.create(path=str(tmp_path))
  for text in ('a\u0301\u0323', 'a\u0344'):
    assert list(opened.encode(text)) != list(tokenizer.encode(text))
