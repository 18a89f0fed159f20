"""SentencePiece: exact round trips in English and Chinese, byte counts, special tokens, foreign
models, trained ones kept.
"""

import importlib
import io
import os
import pickle
import unicodedata

import numpy as np
import pytest
import sentencepiece as library
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_jax.core import plugins
from llm_jax.data.sources import stdlib
from llm_jax.data.tokenizers import _training, sentencepiece

CHINESE = (
  '清晨的港口还没有醒来，渔民们已经把小船推下了水。老张说：“今天的风从东边来，晚上也许会下雨。”\n'
  '孩子们坐在石阶上吃早饭，有的看书，有的数着远处的灯。１９８７年，这里只有三户人家；如今街上有了学校、邮局和一间小小的图书馆。\n'
  '　　图书馆里最旧的一本书，是用毛笔抄写的航海日记，每一页都画着云和星星。'
)
SAMPLES = [
  '',
  ' ',
  '\n',
  '  two  spaces\tand\r\n\n lines \n',
  '[MASK] [CLS]<0x41> [PAD]',
  'a\u2581b\u2581\u2581',
  'ﬁ Ⅷ ａ ① \u00a0\u3000 e\u0301',
  '👩‍👩‍👧 \U0010ffff',
  '\x00\x07',
  CHINESE,
]


def normalised(model, text):
  """The text as the library normalises it, spaces as spaces; the sign that it writes for them stays
  where the text has it.
  """
  return '\u2581'.join(
    model.normalize(part).replace('\u2581', ' ') for part in text.split('\u2581')
  )


def training_texts():
  source = stdlib.Source()
  yield from (source[i]['text'] for i in range(0, len(source), 60))
  yield CHINESE


@pytest.fixture(scope='module')
def english():
  source = stdlib.Source()
  return [source[i]['text'] for i in range(7, len(source), 150)]


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(
  scope='module',
  params=[('unigram', 'identity'), ('bpe', 'nfkc'), ('unigram', 'nfkc')],
  ids='-'.join,
)
def trained(request, cache):
  """(tokenizer, the library's own processor of the same model, normalization)."""
  kind, normalization = request.param
  tokenizer = sentencepiece.create(
    training_texts,
    'corpus',
    cache,
    vocab_size=900,
    kind=kind,
    normalization=normalization,
    sample_bytes=150_000,
  )
  return (
    tokenizer,
    library.SentencePieceProcessor(model_proto=pickle.loads(pickle.dumps(tokenizer))._model),
    normalization,
  )


def check(trained, text):
  tokenizer, model, normalization = trained
  want = text if normalization == 'identity' else normalised(model, text)
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert tokenizer.decode(ids) == want
  assert tokenizer.token_bytes[ids].sum() == len(want.encode())
  assert not tokenizer.special[ids].any()
  if '\u2581' not in text:
    assert list(ids) == model.encode(text)


def test_real_text_comes_back(trained, english):
  for text in [*english, CHINESE, *SAMPLES]:
    check(trained, text)


@settings(deadline=None, max_examples=200)
@given(
  text=st.text(max_size=40)
  | st.text(alphabet=st.sampled_from('的。，a b\n\t\r\u2581\u3000é\u0301[MASK]'), max_size=30)
)
@example('\u2581')
def test_any_text_comes_back(trained, text):
  check(trained, text)


def test_normalization_does_what_it_says(trained):
  tokenizer, _, normalization = trained
  text = 'ﬁ Ⅷ １９８７'
  want = unicodedata.normalize('NFKC', text) if normalization == 'nfkc' else text
  assert tokenizer.decode(tokenizer.encode(text)) == want
  assert (want == text) == (normalization == 'identity')


def poems():
  """Made-up lines of five and seven characters, with full-width punctuation."""
  rng = np.random.default_rng(0)
  signs = sorted({sign for sign in CHINESE if '\u4e00' <= sign <= '\u9fff'})
  for size in (5, 7) * 150:
    first, second = (''.join(rng.choice(signs, size)) for _ in range(2))
    yield first + rng.choice(list('，、：；？！')) + second + rng.choice(['。', '？', '！', '；'])


OTHER_SCRIPTS = [
  'مَرْحَبًا بِالعَالَمِ، كيف الحال؟ ﷺ ﻻ',
  'नमस्ते दुनिया। क्या हाल है? क्‍ष ज़',
  'สวัสดีชาวโลก น้ำใจ ๑๒๓',
  '👩‍👩‍👧 ❤️ ☎︎ 🇫🇷 👍🏽 e\u0301 é Å ｱｲｳ',
  '  leading,  runs   of\tspaces\n\n\tand trailing  \n',
  '（全角　空格）“引号”——……《诗》〈〉１２３ＡＢＣ①㎏',
]


@pytest.mark.parametrize('name', ['base', 'bert_tiny', 'bert_base', 'classify', 'gpt_tiny', 'hf'])
def test_the_shipped_configs_give_text_back(cache, name):
  config = importlib.import_module(f'configs.{name}').get_config()
  section = config.tokenizer.to_dict() | dict(vocab_size=600, sample_bytes=150_000)
  options = {key: value for key, value in section.items() if key != 'name' and value is not None}
  tokenizer = sentencepiece.create(poems, 'poems', cache, **options)
  for text in [*poems(), *OTHER_SCRIPTS, *SAMPLES]:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(trained):
  tokenizer, model, _ = trained
  ids = [
    getattr(tokenizer, f'{name}_id') for name in ('pad', 'unk', 'cls', 'sep', 'mask', 'bos', 'eos')
  ]
  assert ids == list(range(7))
  assert [model.id_to_piece(i) for i in ids] == [
    '[PAD]',
    '[UNK]',
    '[CLS]',
    '[SEP]',
    '[MASK]',
    '[BOS]',
    '[EOS]',
  ]
  assert (
    list(np.flatnonzero(tokenizer.special))
    == ids
    == list(np.flatnonzero(tokenizer.token_bytes == 0))
  )
  assert tokenizer.vocab_size == 900 == len(tokenizer.token_bytes) == len(tokenizer.word_start)
  assert (
    tokenizer.decode([2, *tokenizer.encode('one'), 3, *tokenizer.encode(' two'), 3, 0, 0])
    == 'one two'
  )
  assert not tokenizer.special[tokenizer.encode('[PAD][UNK][CLS][SEP][MASK][BOS][EOS]')].any()


def test_special_tokens_in_a_text(trained):
  tokenizer = trained[0]
  text = 'one[MASK] two[SEP]'
  want = [*tokenizer.encode('one'), tokenizer.mask_id, *tokenizer.encode(' two'), tokenizer.sep_id]
  assert list(tokenizer.encode(text, special=True)) == want
  ids, spans = tokenizer.offsets(text, special=True)
  assert list(ids) == want and spans[list(ids).index(tokenizer.mask_id)].tolist() == [3, 9]


@settings(deadline=None, max_examples=150)
@given(
  text=st.text(max_size=40)
  | st.text(alphabet=st.sampled_from('the的。 b\n\u2581\u3000é\u0301ﬁ㌔'), max_size=30)
)
@example('ﬁ ㌔ e\u0301\u2581x')
def test_places(trained, text):
  tokenizer, _, normalization = trained
  ids, spans = tokenizer.offsets(text)
  assert list(ids) == list(tokenizer.encode(text)) and spans.shape == (len(ids), 2)
  assert np.all((spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= len(text))) and np.all(
    np.diff(spans[:, 0]) >= 0
  )
  if normalization == 'identity':
    for number, (begin, end) in zip(ids, spans, strict=True):
      spelled = tokenizer.decode([number])
      assert text[begin:end] == spelled if '\ufffd' not in spelled else end - begin == 1


def test_places_in_a_model_that_puts_a_space_first():
  tokenizer = sentencepiece.Tokenizer(bare())
  ids, spans = tokenizer.offsets('  the  cat 好')
  pieces = [tokenizer.decode([i]) for i in ids]
  assert ids[-1] == tokenizer.unk_id and spans[-1].tolist() == [11, 12]
  assert ''.join('  the  cat 好'[begin:end] for begin, end in spans).split() == [
    'the',
    'cat',
    '好',
  ], pieces


def test_scores_are_rounded_so_that_sums_are_exact(trained):
  _, model, _ = trained
  scores = np.array([model.get_score(i) for i in range(model.vocab_size()) if not model.is_byte(i)])
  assert len(set(scores)) > 50 and np.array_equal(scores * 64, np.round(scores * 64))


def test_indentation_is_short(trained):
  tokenizer = trained[0]
  assert len(tokenizer.encode('\n        return')) <= 4


def test_words_begin_at_spaces_signs_and_punctuation(trained):
  tokenizer, model, _ = trained
  for number in range(7, tokenizer.vocab_size):
    piece = model.id_to_piece(number)
    if not model.is_byte(number):
      want = piece[0] in '\u2581\n\t' or not piece[0].isalnum() or '\u4e00' <= piece[0] <= '\u9fff'
      assert tokenizer.word_start[number] == want, piece
  text = 'the standard library (which)'
  ids = tokenizer.encode(text)
  words = [
    tokenizer.decode(word)
    for word in np.split(ids, np.flatnonzero(tokenizer.word_start[ids]))
    if len(word)
  ]
  assert (
    ''.join(words) == text and words[:3] == ['the', ' standard', ' library'] and words[-1] == ')'
  )


def test_errors_of_encode_and_decode(trained):
  tokenizer = trained[0]
  with pytest.raises(ValueError, match='surrogate pair at character 2'):
    tokenizer.encode('ab\udc00')
  for ids in ([900], [-1]):
    with pytest.raises(ValueError, match='0 to 899'):
      tokenizer.decode(ids)
  assert tokenizer.decode([]) == ''


def test_save_load_and_other_processes(trained, tmp_path):
  tokenizer = trained[0]
  tokenizer.save(str(tmp_path / 'made' / 'here'))
  loaded = sentencepiece.load(str(tmp_path / 'made' / 'here'))
  assert loaded.fingerprint == tokenizer.fingerprint and loaded.specials == tokenizer.specials
  sent = pickle.loads(pickle.dumps(tokenizer))
  assert (
    list(sent.encode(CHINESE)) == list(loaded.encode(CHINESE)) == list(tokenizer.encode(CHINESE))
  )


def small(
  cache,
  texts=('the cat sat on the mat and the dog ran after the cat', '多少钱 一 二 三') * 5,
  key='small',
  **options,
):
  options = dict(vocab_size=310, kind='bpe', character_coverage=1.0) | options
  return sentencepiece.create(lambda: iter(texts), key, cache, **options)


def test_training_happens_once_for_each_corpus_and_options(tmp_path):
  first = small(str(tmp_path / 'cache'))
  again = sentencepiece.create(
    lambda: pytest.fail('trained again'),
    'small',
    str(tmp_path / 'cache'),
    vocab_size=310,
    kind='bpe',
    character_coverage=1.0,
  )
  assert again.fingerprint == first.fingerprint == small(str(tmp_path / 'elsewhere')).fingerprint
  others = [
    small(str(tmp_path / 'cache'), key='other corpus'),
    small(str(tmp_path / 'cache'), vocab_size=311),
    small(str(tmp_path / 'cache'), normalization='nfkc'),
    small(str(tmp_path / 'cache'), sample_bytes=2000),
  ]
  assert len(os.listdir(tmp_path / 'cache')) == 1 + len(others)
  assert others[1].fingerprint != first.fingerprint


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(sentencepiece.json, 'dump', full)
    with pytest.raises(OSError, match='No space left'):
      small(str(tmp_path))
  assert os.listdir(tmp_path) == []
  assert small(str(tmp_path)).vocab_size == 310


@pytest.mark.parametrize(
  'options, said',
  [
    (
      dict(vocab_size=8000),
      r'vocab_size=8000 is more than the corpus can fill; the largest that works is \d+',
    ),
    (
      dict(vocab_size=8000, kind='unigram'),
      r'vocab_size=8000 is more than the corpus can fill; the largest that works is \d+',
    ),
    (dict(vocab_size=270), r'vocab_size=270 is too small for the characters .* give at least \d+'),
    (dict(vocab_size=265), r'more than 265'),
    (dict(kind='word'), r"kind='word'.*unigram, bpe"),
    (dict(normalization='nfd'), r"normalization='nfd'.*identity, nfkc"),
    (dict(character_coverage=0.1), r'character_coverage=0.1'),
    (dict(sample_bytes=1), r'sample_bytes=1'),
    (dict(texts=['', '\n']), 'empty corpus'),
    (dict(texts=[]), 'empty corpus'),
  ],
)
def test_options_that_cannot_be(tmp_path, options, said):
  with pytest.raises(ValueError, match=said):
    small(str(tmp_path), **options)
  assert os.listdir(tmp_path) == []


def test_the_largest_vocabulary_that_works_works(tmp_path):
  for kind in _training.KINDS:
    with pytest.raises(ValueError) as error:
      small(str(tmp_path), vocab_size=8000, kind=kind)
    largest = int(str(error.value).split('works is ')[1].split()[0])
    assert small(str(tmp_path), vocab_size=largest, kind=kind).vocab_size == largest


def bare(**options):
  """A model as the library makes it by default: a space before the text, unk 0, bos 1, eos 2, no
  pad, no bytes.
  """
  writer = io.BytesIO()
  library.SentencePieceTrainer.Train(
    sentence_iterator=iter(['the cat sat on the mat', 'a dog ran'] * 20),
    model_writer=writer,
    hard_vocab_limit=False,
    minloglevel=2,
    **(dict(vocab_size=60) | options),
  )
  return writer.getvalue()


def test_a_foreign_model(tmp_path):
  path = tmp_path / 'foreign.model'
  path.write_bytes(bare())
  model = library.SentencePieceProcessor(model_file=str(path))
  pieces = model.vocab_size()
  tokenizer = plugins.construct(
    'tokenizer',
    sentencepiece.create,
    {'path': str(path)},
    texts=None,
    texts_fingerprint='',
    cache=str(tmp_path / 'cache'),
  )
  assert not (tmp_path / 'cache').exists()
  assert list(tokenizer.encode('the cat ran')) == model.encode('the cat ran')
  assert tokenizer.decode(tokenizer.encode('the cat ran')) == 'the cat ran'
  assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
  assert [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id] == [
    pieces,
    pieces + 1,
    pieces + 2,
    pieces + 3,
  ]
  assert tokenizer.vocab_size == pieces + 4 and tokenizer.lacked == ['pad', 'cls', 'sep', 'mask']
  assert tokenizer.encode('好')[-1] == tokenizer.unk_id
  tokenizer.save(str(tmp_path / 'saved'))
  assert sentencepiece.load(str(tmp_path / 'saved')).fingerprint == tokenizer.fingerprint
  assert pickle.loads(pickle.dumps(tokenizer)).vocab_size == tokenizer.vocab_size


def test_a_foreign_model_with_its_own_special_tokens():
  tokenizer = sentencepiece.Tokenizer(
    bare(
      pad_id=0,
      unk_id=3,
      control_symbols=['<mask>', '[CLS]'],
      user_defined_symbols=['[SEP]'],
      byte_fallback=True,
      vocab_size=330,
    )
  )
  model = library.SentencePieceProcessor(model_proto=tokenizer._model)
  want = {
    'pad': 0,
    'unk': 3,
    'bos': 1,
    'eos': 2,
    'mask': model.piece_to_id('<mask>'),
    'cls': model.piece_to_id('[CLS]'),
    'sep': model.piece_to_id('[SEP]'),
  }
  assert (
    tokenizer.specials == want
    and tokenizer.lacked == []
    and tokenizer.vocab_size == model.vocab_size()
  )
  assert list(np.flatnonzero(tokenizer.special)) == sorted(want.values())
  assert tokenizer.decode(tokenizer.encode('the 好 cat')) == 'the 好 cat'


@pytest.mark.parametrize('kind', ['word', 'char'])
def test_models_that_cannot_be_exported(tmp_path, kind):
  tokenizer = sentencepiece.Tokenizer(bare(model_type=kind))
  with pytest.raises(ValueError, match='unigram and BPE'):
    tokenizer.export(str(tmp_path), causal=False, max_len=8, token_types=True)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'content', [b'', b'not a model at all', b'\x00' * 100, b'{"version": "1.0"}' * 9]
)
def test_a_file_that_is_no_model(tmp_path, content):
  path = tmp_path / 'x.model'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"x.model'.*not a SentencePiece model"):
    sentencepiece.create(lambda: iter([]), '', str(tmp_path), path=str(path))
  with pytest.raises(ValueError, match='is not a file'):
    sentencepiece.create(lambda: iter([]), '', str(tmp_path), path=str(tmp_path / 'absent.model'))


def test_a_cut_model_is_no_model(tmp_path):
  (tmp_path / 'x.model').write_bytes(bare()[:200])
  with pytest.raises(ValueError, match='not a SentencePiece model'):
    sentencepiece.create(lambda: iter([]), '', str(tmp_path), path=str(tmp_path / 'x.model'))


def test_the_sample_is_spread_and_capped():
  texts = [f'{i:04d} aa\n{i:04d} bbb\n\n{i:04d} cc\n{i:04d} d' for i in range(3000)]
  lines = _training.sample(iter(texts), 10_000)
  assert 9_000 < sum(map(len, lines)) < 11_000
  assert lines == _training.sample(iter(texts), 10_000)
  numbers = np.array([int(line[:4]) for line in lines])
  assert np.ptp(np.histogram(numbers, 10, (0, 3000))[0]) <= 10
  kinds = [sum(line.endswith(end) for line in lines) for end in ('aa', 'bbb', 'cc', ' d')]
  assert min(kinds) > 0.8 * len(lines) / 4
  everything = _training.sample(iter(texts), 10_000_000)
  assert everything == [line for text in texts for line in text.split('\n') if line]
  assert ''.join(_training.sample(['好' * 5001], 10**6)) == '好' * 5001
