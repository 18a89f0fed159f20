"""Random models of every family in folders, as transformers writes them."""

import types

import pytest

WORDS = 'the a cat dog sat on mat ran fast slow good bad film was not very it is and'.split()
TEXTS = [' '.join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def word_pieces():
  import tokenizers

  made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token='[UNK]'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  specials = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials)
  made.train_from_iterator(TEXTS, trainer)
  made.post_processor = around('[CLS] $A [SEP]', '[CLS] $A [SEP] $B:1 [SEP]:1', made)
  names = dict(zip(('pad', 'unk', 'cls', 'sep', 'mask'), specials, strict=True))
  return made, names


def byte_level(single=None, pair=None):
  import tokenizers

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
  import tokenizers

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


def written(name, task, path):
  """A random model in a folder."""
  import torch
  import transformers

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


@pytest.fixture(scope='session')
def tiny():
  return types.SimpleNamespace(TEXTS=TEXTS, written=written)


@pytest.fixture(scope='module', params=FAMILIES)
def classifier(request, tmp_path_factory):
  """A random classifier of each family."""
  return written(request.param, 'SequenceClassification', tmp_path_factory.mktemp('folder'))
