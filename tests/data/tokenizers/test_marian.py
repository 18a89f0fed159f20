"""Marian's two SentencePiece models: the ids of transformers, codes of languages, and what is
refused.
"""

import json
import pickle

import numpy as np
import pytest
import sentencepiece

import llm_jax
from llm_jax.data.tokenizers import marian
from llm_jax.generation.sampling import Sampling
from llm_jax.inference.export import export

ENGLISH = ['the cat sits on the mat', 'a dog runs to the house', 'three birds sing', 'a house'] * 20
ITALIAN = ['il gatto siede sul tappeto', 'un cane corre a casa', 'tre uccelli cantano'] * 20
TEXTS = [
  'the cat runs',
  '>>ita<< the dog sings',
  '>>xyz<< a bird',
  '  two  spaces \u00e0 \u732b',
  '',
  'il gatto corre',
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('marian')
  pieces = ['<pad>', '</s>', '<unk>', '>>ita<<']
  for name, texts in (('source', ENGLISH), ('target', ITALIAN)):
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_prefix=str(path / name),
      vocab_size=60,
      hard_vocab_limit=False,
      minloglevel=2,
    )
    (path / f'{name}.model').rename(path / f'{name}.spm')
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / f'{name}.spm'))
    pieces += [model.id_to_piece(i) for i in range(3, model.vocab_size())]
  vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
  vocabulary.pop('\u2581cat', None)  # a piece that the vocabulary lacks is unknown
  numbered = {piece: number for number, piece in enumerate(vocabulary)}
  (path / 'vocab.json').write_text(json.dumps(numbered))
  (path / 'tokenizer_config.json').write_text('{"source_lang": "eng", "target_lang": "ita"}')
  return path


@pytest.mark.parity
def test_ids_are_those_of_transformers(folder, tmp_path):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.MarianTokenizer.from_pretrained(folder)
  ours = marian.create(path=str(folder))
  ours.export(str(tmp_path), causal=False, closed=True, max_len=99, token_types=False)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    for made in (theirs, again):
      wanted = made(text)['input_ids']
      assert [*ours.encode(text).tolist(), ours.eos_id] == wanted, text
      target = made(text_target=text)['input_ids']
      assert [*ours.target.encode(text).tolist(), ours.eos_id] == target, text
    shown = theirs.decode(wanted, skip_special_tokens=True)
    kept = [i for i in wanted if i not in (ours.unk_id, ours.eos_id) and not ours.special[i]]
    assert ours.decode(kept) == theirs.decode(kept).strip() and isinstance(shown, str)


def test_it_comes_back_and_names_what_it_needs(folder, tmp_path):
  ours = marian.load(str(folder))
  ours.save(str(tmp_path / 'saved'))
  for again in (marian.load(str(tmp_path / 'saved')), pickle.loads(pickle.dumps(ours))):
    assert again.fingerprint == ours.fingerprint and again.vocab_size == ours.vocab_size
    np.testing.assert_array_equal(again.encode(TEXTS[0]), ours.encode(TEXTS[0]))
    np.testing.assert_array_equal(again.target.encode(TEXTS[5]), ours.target.encode(TEXTS[5]))
  assert ours.template == ((), (ours.eos_id,)) and ours.eos_ids == (ours.eos_id,)
  assert ours.decode(ours.encode('a dog runs')) == 'a dog runs'
  assert ours.encode('</s>', special=True).tolist() == [ours.eos_id]
  assert ours.eos_id not in ours.encode('</s>')
  assert not np.array_equal(ours.encode('il gatto'), ours.target.encode('il gatto'))


def test_offsets(folder):
  ours = marian.load(str(folder))
  text = '>>ita<< the dog \u00e0'
  ids, spans = ours.offsets(text)
  np.testing.assert_array_equal(ids, ours.encode(text))
  assert spans[0].tolist() == [0, 7] and spans[-1, 1] == len(text)
  assert all(a <= b for a, b in spans.tolist())


def test_wrong_folders(folder, tmp_path):
  with pytest.raises(ValueError, match='needs source.spm, target.spm, vocab.json, which is not'):
    marian.load(str(tmp_path))
  files = {name: (folder / name).read_bytes() for name in marian.FILES}
  with pytest.raises(ValueError, match='not a SentencePiece model .3 bytes.; copy it again'):
    marian.Tokenizer(files | {'source.spm': b'abc'})
  with pytest.raises(ValueError, match='vocab.json of a Marian tokenizer lacks </s>, <pad>'):
    marian.Tokenizer(files | {'vocab.json': b'{"<unk>": 0}'})
  with pytest.raises(ValueError, match='two vocabularies cannot be read'):
    marian.Tokenizer(files | {'tokenizer_config.json': b'{"separate_vocabs": true}'})


@pytest.mark.parity
def test_a_folder_writes_what_it_writes_there(folder, tmp_path):
  """From text to text, by beams, and from the folder that it is exported to."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  theirs = transformers.MarianTokenizer.from_pretrained(folder)
  torch.manual_seed(0)
  config = transformers.MarianConfig(
    vocab_size=len(theirs),
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=64,
    init_std=0.6,
    pad_token_id=theirs.pad_token_id,
    eos_token_id=theirs.eos_token_id,
    decoder_start_token_id=theirs.pad_token_id,
    forced_eos_token_id=theirs.eos_token_id,
  )
  model = transformers.MarianMTModel(config).eval()
  model.save_pretrained(tmp_path / 'in')
  theirs.save_pretrained(tmp_path / 'in')
  texts = [TEXTS[0], '>>ita<< three birds sing']
  wanted = []
  for text in texts:
    made = model.generate(
      **theirs(text, return_tensors='pt'), num_beams=3, max_new_tokens=12, do_sample=False
    )
    kept = [i for i in made[0].tolist() if i not in (theirs.unk_token_id, theirs.pad_token_id)]
    wanted.append(theirs.decode(kept, skip_special_tokens=True).strip())
  session = llm_jax.open(tmp_path / 'in')
  chosen = Sampling(max_new_tokens=12, temperature=0, beams=3)
  assert session.complete(texts, sampling=chosen) == wanted and len(set(wanted)) == 2
  export(session, tmp_path / 'out')
  again = llm_jax.open(tmp_path / 'out')
  assert again.config.tokenizer['name'] == 'marian'
  assert again.complete(texts, sampling=chosen) == wanted
