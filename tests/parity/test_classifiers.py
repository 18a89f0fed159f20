"""Classifiers of all families, from text: the answers of transformers, for single texts and pairs,
read from their folders and written to ours; and answers to questions.
"""

import json

import numpy as np
import pytest

import llm_jax
from configs import base
from llm_jax.core import config as config_lib
from llm_jax.inference.export import export
from llm_jax.training import loop

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')
pytestmark = pytest.mark.parity

WORDS = 'the a cat dog sat on mat ran fast slow good bad film was not very it is and'.split()
TEXTS = [' '.join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
PAIRS = [('the cat sat on the mat', 'the dog ran fast'), ('bad', 'it is a very bad film')]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def word_pieces():
  made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token='[UNK]'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  specials = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials)
  made.train_from_iterator(TEXTS, trainer)
  made.post_processor = around('[CLS] $A [SEP]', '[CLS] $A [SEP] $B:1 [SEP]:1', made)
  names = dict(zip(('pad', 'unk', 'cls', 'sep', 'mask'), specials, strict=True))
  return made, names


def byte_level(single=None, pair=None):
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  specials = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=specials,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  made.train_from_iterator(TEXTS, trainer)
  if single is not None:
    made.post_processor = around(single, pair, made)
  names = dict(zip(('bos', 'pad', 'eos', 'unk', 'mask'), specials, strict=True))
  return made, names | {'cls': '<s>', 'sep': '</s>'}


def around(single, pair, made):
  specials = [token.partition(':')[0] for token in f'{single} {pair}'.split() if token[0] != '$']
  ids = [(token, made.token_to_id(token)) for token in dict.fromkeys(specials)]
  return tokenizers.processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def roberta():
  return byte_level('<s> $A </s>', '<s> $A </s> </s> $B </s>')


def llama():
  return byte_level('<s> $A', '<s> $A <s> $B')


DECODER = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1)
KV = DECODER | dict(num_key_value_heads=1)
FAMILIES = {
  'Bert': (word_pieces, dict(pad_token_id=0)),
  'Roberta': (roberta, DECODER | dict(type_vocab_size=1)),
  'XLMRoberta': (roberta, DECODER | dict(type_vocab_size=1)),
  'ModernBert': (
    word_pieces,
    dict(pad_token_id=0, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3)
    | dict(global_attn_every_n_layers=1, classifier_pooling='mean', norm_bias=True),
  ),
  'Esm': (
    roberta,
    dict(pad_token_id=1, mask_token_id=4, position_embedding_type='rotary', token_dropout=False),
  ),
  'GPT2': (byte_level, DECODER),
  'Llama': (llama, KV),
  'Mistral': (llama, KV | dict(sliding_window=None)),
  'Qwen2': (byte_level, KV),
  'Qwen3': (byte_level, KV | dict(head_dim=16)),
}


@pytest.fixture(scope='module', params=FAMILIES)
def folder(request, tmp_path_factory):
  """A random classifier as transformers writes it."""
  return written(request.param, 'SequenceClassification', tmp_path_factory.mktemp('folder'))


def written(name, task, path):
  """A random model in a folder."""
  make, options = FAMILIES[name]
  made, names = make()
  inputs = ['input_ids', *['token_type_ids'] * (name == 'Bert'), 'attention_mask']
  specials = {f'{key}_token': text for key, text in names.items()}
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, model_input_names=inputs, **specials
  ).save_pretrained(path)
  torch.manual_seed(0)
  config = getattr(transformers, f'{name}Config')(
    vocab_size=made.get_vocab_size(),
    max_position_embeddings=66,
    initializer_range=0.5,
    **SIZES | dict(num_labels=2 if task == 'QuestionAnswering' else 3),
    **options,
  )
  getattr(transformers, f'{name}For{task}')(config).save_pretrained(path)
  return path


def answers_of_transformers(path):
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
  found = []
  for first, second in PAIRS:
    for texts in ((first,), (first, second), (second, first)):
      with torch.no_grad():
        logits = model(**tokenizer(*texts, return_tensors='pt')).logits[0]
      found.append(torch.softmax(logits.float(), -1).numpy())
  return np.array(found)


def answers(session):
  found = []
  for first, second in PAIRS:
    for texts in (first, (first, second), (second, first)):
      (answer,) = session.predict([texts])
      found.append(list(answer['probabilities'].values()))
  return np.array(found)


def check(path, session):
  ours, theirs = answers(session), answers_of_transformers(path)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  assert np.abs(theirs - theirs[::-1]).max() > 1e-2  # other texts have other answers


def test_a_folder_answers_from_text_as_transformers_and_so_does_its_export(folder, tmp_path):
  session = llm_jax.open(folder)
  check(folder, session)
  export(session, tmp_path / 'out')
  check(tmp_path / 'out', session)


def test_a_decoder_that_was_trained_here_is_exported_with_the_ends_of_its_texts(tmp_path):
  rows = [dict(text=f'{text} {i}', pair=text, label='ab'[i % 2]) for i, text in enumerate(TEXTS)]
  (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, rows * 3)))
  config = base.get_config().to_dict() | dict(steps=1, batch_size=2, seq_len=64, eval_every=1)
  config |= dict(
    data=dict(
      source='jsonl',
      path=str(tmp_path / 'x.jsonl'),
      pair='pair',
      label='label',
      validation=0.1,
      cache=str(tmp_path),
    ),
    tokenizer=dict(name='byte'),
    model=dict(name='decoder', variant='gpt_tiny', dim=32, layers=1, heads=2, max_len=128),
    objective=dict(name='classify', pool='last', task='multiclass'),
    logging=dict(tensorboard=False),
  )
  config['model']['init_std'] = 0.5  # so that texts differ in their answers
  loop.train(loop.prepare(config_lib.parse(config), tmp_path / 'w'))
  session = llm_jax.open(tmp_path / 'w')
  export(session, tmp_path / 'out')
  check(tmp_path / 'out', session)


def spans_of_transformers(path, question, context):
  """Character spans by the sum of their scores, the best first."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  model = transformers.AutoModelForQuestionAnswering.from_pretrained(path).eval()
  read = tokenizer(question, context, return_tensors='pt', return_offsets_mapping=True)
  offsets, inside = read.pop('offset_mapping')[0].tolist(), read.sequence_ids(0)
  with torch.no_grad():
    found = model(**read)
  starts, ends = (x[0].double().numpy() for x in (found.start_logits, found.end_logits))
  tokens = [i for i, text in enumerate(inside) if text == 1]
  sums = {}
  for i, j in ((i, j) for i in tokens for j in tokens if i <= j < i + 30):
    start, end = offsets[i][0], offsets[j][1]
    start += len(context[start:end]) - len(context[start:end].lstrip())
    sums[start, end] = max(starts[i] + ends[j], sums.get((start, end), -np.inf))
  ranked = sorted(sums, key=lambda span: -sums[span])
  weights = np.exp([sums[span] - sums[ranked[0]] for span in ranked[:20]])
  return ranked[:20], weights / weights.sum()


@pytest.mark.parametrize('name', ['Bert', 'Roberta', 'XLMRoberta'])
def test_questions_are_answered_as_by_transformers_and_so_by_the_export(name, tmp_path):
  folder = written(name, 'QuestionAnswering', tmp_path / 'in')
  session = llm_jax.open(folder)
  for path in (folder, tmp_path / 'out'):
    if path != folder:
      export(session, path)
    for question, context in PAIRS:
      (answer,) = llm_jax.open(path).predict([dict(question=question, context=context)])
      spans, probabilities = spans_of_transformers(path, question, context)
      found = [(each['start'], each['end']) for each in answer['answers']]
      assert found[:3] == spans[:3] and len(found) == len(spans)
      ours = [each['probability'] for each in answer['answers']]
      np.testing.assert_allclose(ours, probabilities, atol=1e-4)
