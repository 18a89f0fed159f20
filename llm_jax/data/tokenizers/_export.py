"""The files that `transformers.AutoTokenizer` opens: the format of the `tokenizers` library,
written as plain JSON.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core.tree import PyTree

# special token -> what it may be called; the first name is the one that our own tokenizers give it
NAMES = {
  'pad': ('[PAD]', '<pad>'),
  'unk': ('[UNK]', '<unk>'),
  'cls': ('[CLS]', '<cls>'),
  'sep': ('[SEP]', '<sep>'),
  'mask': ('[MASK]', '<mask>'),
  'bos': ('[BOS]', '<s>', '<bos>'),
  'eos': ('[EOS]', '</s>', '<eos>'),
}
FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json')


def write(directory: str, files: Mapping[str, str]) -> None:
  """Writes texts by file name into `directory`, which is made if needed."""
  os.makedirs(directory, exist_ok=True)
  for name, text in files.items():
    with open(os.path.join(directory, name), 'w', encoding='utf-8') as file:
      file.write(text)


def folder(
  description: Mapping[str, Any],
  specials: Mapping[str, tuple[int, str]],
  *,
  causal: bool,
  max_len: int,
  token_types: bool,
  closed: bool = False,
) -> dict[str, str]:
  """The three files of a tokenizer, by name.

  Args:
    description: tokenizer.json without its post-processor.
    specials: id and text of each special token, by name ('pad', 'cls', ...).
    causal: BOS before each text, else [CLS] before and [SEP] after; the second text of a pair has
      type 1.
    closed: a causal model's texts have EOS after them, and a separator between them; those of an
      encoder-decoder, which is not causal here, EOS alone.
    max_len: the longest row that the model takes.
    token_types: whether the model reads the types.
  """
  if causal and closed:
    post_processor = template(specials['bos'], specials['eos'], [specials['sep']])
  elif causal:
    post_processor = template(before=specials['bos'])
  elif closed:
    post_processor = template(after=specials['eos'])
  else:
    post_processor = template(before=specials['cls'], after=specials['sep'])
  names = {f'{name}_token': text for name, (_, text) in specials.items()}
  inputs = ['input_ids', *['token_type_ids'] * token_types, 'attention_mask']
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': max_len,
    'clean_up_tokenization_spaces': False,
    'model_input_names': inputs,
  } | names
  whole = dict(description) | {'post_processor': post_processor}
  return {
    'tokenizer.json': json.dumps(whole, ensure_ascii=False),
    'tokenizer_config.json': json.dumps(config, ensure_ascii=False, indent=2),
    'special_tokens_map.json': json.dumps(names, ensure_ascii=False, indent=2),
  }


def description(
  model: Mapping[str, Any],
  added: Sequence[Mapping[str, Any]],
  *,
  normalizer: Any = None,
  pre_tokenizer: Any = None,
  decoder: Any = None,
  post_processor: Any = None,
) -> dict[str, Any]:
  """A tokenizer.json; lists of normalizers, pre-tokenizers or decoders become sequences, empty ones
  nothing.
  """
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': list(added),
    'normalizer': _sequence(normalizer, 'normalizers'),
    'pre_tokenizer': _sequence(pre_tokenizer, 'pretokenizers'),
    'post_processor': post_processor,
    'decoder': _sequence(decoder, 'decoders'),
    'model': dict(model),
  }


def added_token(number: int, text: str, *, special: bool = True) -> dict[str, Any]:
  """A token that is found in a text before anything else; the ids of those that the model lacks
  must follow its own.
  """
  return {
    'id': number,
    'content': text,
    'single_word': False,
    'lstrip': False,
    'rstrip': False,
    'normalized': not special,
    'special': special,
  }


Special = tuple[int, str]  # id and text


def template(
  before: Special | None = None,
  after: Special | None = None,
  between: Sequence[Special] | None = None,
) -> dict[str, Any]:
  """The post-processor that puts special tokens around a text, and around the texts of a pair, of
  which the second has type 1.

  Args:
    before: stands before a text, or before the first of a pair.
    after: after a text, or after the second of a pair.
    between: between the two; by default `after`, or without one `before`.
  """
  if between is None:
    between = [token for token in (after or before,) if token]

  def item(token: Special | None, type_id: int) -> list[dict[str, Any]]:
    return [{'SpecialToken': {'id': token[1], 'type_id': type_id}}] if token else []

  def text(name: str, type_id: int) -> list[dict[str, Any]]:
    return [{'Sequence': {'id': name, 'type_id': type_id}}]

  first = item(before, 0) + text('A', 0)
  # A separator belongs to the text that it ends, BOS to the one that it begins.
  middle = [part for token in between for part in item(token, int(token == before))]
  second = text('B', 1) + item(after, 1)
  tokens = {}
  for number, name in filter(None, (before, after, *between)):
    tokens[name] = {'id': name, 'ids': [number], 'tokens': [name]}
  return {
    'type': 'TemplateProcessing',
    'single': first + item(after, 0),
    'pair': first + middle + second,
    'special_tokens': tokens,
  }


def replace(old: str, new: str) -> dict[str, Any]:
  """A normalizer or decoder that replaces a string."""
  return {'type': 'Replace', 'pattern': {'String': old}, 'content': new}


def replace_regex(pattern: str, new: str) -> dict[str, Any]:
  """A normalizer that replaces what a regular expression (Oniguruma's) matches."""
  return {'type': 'Replace', 'pattern': {'Regex': pattern}, 'content': new}


def _sequence(parts: PyTree, key: str) -> Any:
  if not isinstance(parts, list):
    return parts
  if len(parts) > 1:
    return {'type': 'Sequence', key: parts}
  return parts[0] if parts else None
