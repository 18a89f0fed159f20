"""tokenizer.json made from the older vocabulary files of a Hugging Face folder."""

import json
import os
from collections.abc import Mapping
from typing import Any

from llm_jax.data.tokenizers import _convert, _export

SENTENCEPIECE = ('tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model')
# Other classes split texts by rules of their own, which vocab.json does not say.
_BYTE_LEVEL = ('GPT2Tokenizer', 'RobertaTokenizer')


def with_tokenizer_json(directory: str, files: Mapping[str, str]) -> dict[str, str]:
  """The files with a tokenizer.json, and a tokenizer_config.json that goes with it.

  Args:
    directory: holds vocab.txt (WordPiece), vocab.json and merges.txt (byte-level BPE) or a
      SentencePiece model.
    files: tokenizer_config.json, special_tokens_map.json and config.json by name, as far as the
      folder has them.

  Raises:
    ValueError: none of these files is there, or one of them is broken.
  """
  known = ('vocab.txt', 'vocab.json', 'merges.txt', *SENTENCEPIECE)
  there = {name for name in known if os.path.isfile(os.path.join(directory, name))}
  options: dict[str, Any] = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    options |= json.loads(files.get(name, '{}'))
  if os.path.isfile(os.path.join(directory, 'added_tokens.json')):
    with open(os.path.join(directory, 'added_tokens.json'), encoding='utf-8') as file:
      options['added_tokens'] = json.load(file)
  models = [name for name in SENTENCEPIECE if name in there]
  if 'vocab.txt' in there:
    options.setdefault('model_input_names', ['input_ids', 'token_type_ids', 'attention_mask'])
    description, names = _wordpiece(os.path.join(directory, 'vocab.txt'), options)
  elif {'vocab.json', 'merges.txt'} <= there:
    description, names = _byte_level(directory, options)
  elif models:
    description, names = _sentencepiece(os.path.join(directory, models[0]), options)
  else:
    raise ValueError(
      f'{directory} holds no tokenizer; looked for tokenizer.json, vocab.txt, vocab.json with '
      f'merges.txt, {", ".join(SENTENCEPIECE)}.'
    )
  config: dict[str, Any] = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
  }
  for key in ('model_max_length', 'chat_template', 'model_input_names'):
    if key in options:
      config[key] = options[key]
  config |= names
  return dict(files) | {
    'tokenizer.json': json.dumps(description, ensure_ascii=False),
    'tokenizer_config.json': json.dumps(config, ensure_ascii=False, indent=2),
  }


def byte_alphabet() -> dict[str, int]:
  """The characters that stand for bytes in a byte-level vocabulary (GPT-2): printable Latin-1 as it
  is, the rest from U+0100.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = sorted(set(range(256)) - set(printable))
  alphabet = {chr(byte): byte for byte in printable}
  for number, byte in enumerate(others):
    alphabet[chr(256 + number)] = byte
  return alphabet


def _wordpiece(path: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
  """BERT's: text is normalised as tokenizer_config.json says, split at spaces, punctuation and
  Chinese signs.
  """
  vocab = {line: number for number, line in enumerate(_lines(path))}
  usual = {name: _export.NAMES[name][0] for name in ('pad', 'unk', 'cls', 'sep', 'mask')}
  names = _names(options, usual, vocab)
  if 'unk_token' not in names:
    raise ValueError(f'{path} has no [UNK]; name the unknown token in tokenizer_config.json.')
  normalizer = {
    'type': 'BertNormalizer',
    'clean_text': True,
    'handle_chinese_chars': options.get('tokenize_chinese_chars', True),
    'strip_accents': options.get('strip_accents'),
    'lowercase': options.get('do_lower_case', True),
  }
  model = {
    'type': 'WordPiece',
    'unk_token': names['unk_token'],
    'continuing_subword_prefix': '##',
    'max_input_chars_per_word': 100,
    'vocab': vocab,
  }
  ends = []
  for key in ('cls_token', 'sep_token'):
    ends.append((vocab[names[key]], names[key]) if key in names else None)
  description = _export.description(
    model,
    _added(options, names, vocab),
    normalizer=normalizer,
    pre_tokenizer={'type': 'BertPreTokenizer'},
    decoder={'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
    post_processor=_export.template(*ends),
  )
  return description, names


def _byte_level(
  directory: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
  """GPT-2's and RoBERTa's: bytes as characters, merged within what GPT-2's rule calls a word."""
  kind = str(options.get('tokenizer_class', 'GPT2Tokenizer')).removesuffix('Fast')
  if kind not in _BYTE_LEVEL:
    raise ValueError(
      f'{directory} holds the vocabulary of a {kind} without a tokenizer.json; vocab.json and '
      f'merges.txt are enough for {" and ".join(_BYTE_LEVEL)} only. Open it with transformers once '
      'and save it: that writes one.'
    )
  path = os.path.join(directory, 'vocab.json')
  with open(path, encoding='utf-8') as file:
    vocab = json.load(file)
  merges = [
    line.split(' ')
    for line in _lines(os.path.join(directory, 'merges.txt'))
    if line and not line.startswith('#version')
  ]
  roberta = kind == 'RobertaTokenizer' or ('<s>' in vocab and '<mask>' in vocab)
  usual = dict.fromkeys(('bos', 'eos', 'unk'), '<|endoftext|>')
  if roberta:
    usual = dict(
      bos='<s>', eos='</s>', cls='<s>', sep='</s>', unk='<unk>', pad='<pad>', mask='<mask>'
    )
  names = _names(options, usual, vocab)
  space = options.get('add_prefix_space', False)
  level = {
    'type': 'ByteLevel',
    'add_prefix_space': space,
    'trim_offsets': roberta,
    'use_regex': True,
  }
  around: dict[str, Any] = {
    'type': 'RobertaProcessing',
    'trim_offsets': True,
    'add_prefix_space': space,
  }
  for key in ('sep', 'cls'):
    text = names.get(f'{key}_token')
    if text is not None:
      around[key] = [text, vocab[text]]
  model = {
    'type': 'BPE',
    'dropout': None,
    'unk_token': None,
    'continuing_subword_prefix': '',
    'end_of_word_suffix': '',
    'fuse_unk': False,
    'byte_fallback': False,
    'ignore_merges': False,
    'vocab': vocab,
    'merges': merges,
  }
  description = _export.description(
    model,
    _added(options, names, vocab),
    pre_tokenizer=level,
    decoder=level,
    post_processor=around if roberta else level,
  )
  return description, names


def _sentencepiece(path: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
  """SentencePiece's; U+2581 in a text is a space, as in the reference."""
  with open(path, 'rb') as file:
    model = file.read()
  try:
    description, specials = _convert.foreign(
      model, xlm_roberta=os.path.basename(path) == SENTENCEPIECE[-1]
    )
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  size = len(description['model']['vocab'])
  added = {token['id']: token for token in description['added_tokens']}
  for token in _added(options, {}, {}):
    if token['id'] >= size:
      added[token['id']] = token | {'normalized': False}
  description['added_tokens'] = [added[number] for number in sorted(added)]
  texts = {token['content']: token['id'] for token in description['added_tokens']}
  names = _names(options, specials, texts)
  token = {key: (texts[text], text) for key, text in names.items()}
  if 'cls_token' in token and 'sep_token' in token:
    begin, end = token['cls_token'], token['sep_token']
    description['post_processor'] = _export.template(begin, end, [end, end])
  else:
    before = token.get('bos_token') if options.get('add_bos_token', True) else None
    after = token.get('eos_token') if options.get('add_eos_token', False) else None
    between = [token for token in (after, before) if token]
    description['post_processor'] = _export.template(before, after, between)
  return description, names


def _names(
  options: Mapping[str, Any], usual: Mapping[str, str], vocab: Mapping[str, int]
) -> dict[str, str]:
  """Texts of the special tokens that the vocabulary has: those that the folder names, else the
  usual ones.
  """
  names = {}
  for name in _export.NAMES:
    text = options.get(f'{name}_token', usual.get(name))
    text = text.get('content') if isinstance(text, dict) else text
    if text in vocab:
      names[f'{name}_token'] = text
  return names


def _added(
  options: Mapping[str, Any], names: Mapping[str, str], vocab: Mapping[str, int]
) -> list[dict[str, Any]]:
  """Special tokens, and others that tokenizer_config.json or added_tokens.json adds."""
  added = {vocab[text]: _export.added_token(vocab[text], text) for text in names.values()}
  for text, number in (options.get('added_tokens') or {}).items():
    added.setdefault(number, _export.added_token(number, text, special=False))
  for number, token in (options.get('added_tokens_decoder') or {}).items():
    special = token.get('special', False)
    entry = _export.added_token(int(number), token['content'], special=special)
    for key in ('single_word', 'lstrip', 'rstrip', 'normalized'):
      if key in token:
        entry[key] = token[key]
    added[int(number)] = entry
  return [added[number] for number in sorted(added)]


def _lines(path: str) -> list[str]:
  try:
    with open(path, encoding='utf-8', newline='\n') as file:
      return [line.rstrip('\r\n') for line in file]
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} is not a text file in UTF-8 ({error.reason} at byte {error.start}); copy it again.'
    ) from error
