"""The special tokens of a Hugging Face folder: which ids they have, and how they are kept out of
ordinary text.
"""

import json
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from llm_jax.data.tokenizers import _convert, _export

if TYPE_CHECKING:
  import tokenizers

NAMES = tuple(_export.NAMES)
CONFIGS = ('config.json', 'generation_config.json')  # of the model; they name ids too
_FALLBACKS = {  # a special token that a folder lacks is another one; in this order
  'cls': ('bos', 'eos'),
  'sep': ('eos',),
  'bos': ('cls', 'eos'),
  'eos': ('sep',),
  'pad': ('eos',),
  'unk': ('pad',),
}


def read_json(files: Mapping[str, str], name: str) -> dict[str, Any]:
  """The content of one file; nothing where the folder lacks it."""
  return json.loads(files.get(name, '{}'))


def named(files: Mapping[str, str], tokenizer: 'tokenizers.Tokenizer') -> dict[str, int]:
  """Ids of the special tokens that the folder names."""
  found = {}
  for source in ('special_tokens_map.json', 'tokenizer_config.json'):
    content = read_json(files, source)
    for name in NAMES:
      text = content.get(f'{name}_token')
      if isinstance(text, dict):
        text = text.get('content')
      if not isinstance(text, str):
        continue
      number = tokenizer.token_to_id(text)
      if number is not None:
        found[name] = number
      elif name not in found:
        logging.warning(
          '%s names %s_token %r, which is not in the vocabulary: left out.', source, name, text
        )
  return found


def flagged(tokenizer: 'tokenizers.Tokenizer') -> dict[str, int]:
  """Ids of the tokens that tokenizer.json marks as special, by text."""
  tokens = tokenizer.get_added_tokens_decoder()
  return {token.content: number for number, token in tokens.items() if token.special}


def mark(tokenizer: 'tokenizers.Tokenizer', named: Mapping[str, int], library: ModuleType) -> None:
  """Special tokens that are in the vocabulary only become ones that are found in a text, as
  `transformers` does.
  """
  unmarked = sorted(set(named.values()) - set(flagged(tokenizer).values()))
  tokens = []
  for number in unmarked:
    text = tokenizer.id_to_token(number)
    tokens.append(library.AddedToken(text, special=True, normalized=False))
  tokenizer.add_special_tokens(tokens)


def find(
  files: Mapping[str, str],
  description: Mapping[str, Any],
  tokenizer: 'tokenizers.Tokenizer',
  named: Mapping[str, int],
) -> dict[str, int]:
  """Ids of all special tokens that the folder has: those that it names, else those that are called
  as usual, else those that config.json points at.
  """
  found, marked, config = dict(named), flagged(tokenizer), read_json(files, 'config.json')
  for name, usual in _export.NAMES.items():
    if name in found:
      continue
    texts = (*usual, '<|endoftext|>') if name == 'eos' else usual
    ids = [marked[text] for text in texts if text in marked]
    own = _unknown(description, tokenizer) if name == 'unk' else None
    if own is not None:
      ids.insert(0, own)
    number = config.get(f'{name}_token_id')
    if isinstance(number, list) and number:
      number = number[0]
    if isinstance(number, int) and number in marked.values():
      ids.append(number)
    if ids:
      found[name] = ids[0]
  return found


def filled(specials: Mapping[str, int]) -> dict[str, int]:
  """An id for every special token but mask."""
  ids = dict(specials)
  for name, others in _FALLBACKS.items():
    ids.setdefault(name, next((ids[other] for other in others if other in ids), 0))
  return ids


def ends(files: Mapping[str, str], eos_id: int, vocab_size: int) -> tuple[int, ...]:
  """The ids at which a text ends: those of generation_config.json, else of config.json, as
  `transformers` takes them, and `eos_id`, which comes first.
  """
  for name in reversed(CONFIGS):
    given = read_json(files, name).get('eos_token_id')
    if given is not None:
      numbers = given if isinstance(given, list) else [given]
      known = [n for n in numbers if isinstance(n, int) and 0 <= n < vocab_size]
      return tuple(dict.fromkeys([eos_id, *known]))
  return (eos_id,)


def hide(
  tokenizer: 'tokenizers.Tokenizer',
  description: Mapping[str, Any],
  specials: np.ndarray,
  library: ModuleType,
) -> None:
  """Keeps the model from finding special tokens in a text by itself, where it looks whole pieces up
  in its vocabulary.
  """
  if type(tokenizer.model).__name__ == 'BPE' and not description['model'].get('ignore_merges'):
    return  # merges never make a special token
  own = tokenizer.get_vocab(with_added_tokens=False)
  texts = {number: text for text, number in own.items()}
  reserved = [texts[number] for number in specials if number in texts]
  patterns = _convert.cuts(reserved, (text for text in own if text not in reserved))
  if patterns:
    cut = library.pre_tokenizers.Split(library.Regex('|'.join(patterns)), 'isolated')
    before = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*before, cut])


def template(
  files: Mapping[str, str], tokenizer: 'tokenizers.Tokenizer'
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids before and after one text: those of tokenizer.json's post-processor, which has the last
  word in `transformers` 5.
  """
  encoding = tokenizer.encode('a')
  ordinary = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
  if not len(ordinary):
    return tuple(encoding.ids), ()
  before, after = tuple(encoding.ids[: ordinary[0]]), tuple(encoding.ids[ordinary[-1] + 1 :])
  config = read_json(files, 'tokenizer_config.json')
  for key, there in (('add_bos_token', before), ('add_eos_token', after)):
    if key in config and bool(config[key]) != bool(there):
      logging.warning(
        'tokenizer_config.json has %s=%s and is not obeyed: the post-processor of tokenizer.json '
        'says which ids stand around a text.',
        key,
        config[key],
      )
  return before, after


def pair_template(
  files: Mapping[str, str], tokenizer: 'tokenizers.Tokenizer'
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
  """The ids before the first text of a pair, between the two and after the second, and the token
  type of the second: 0 where the folder's model is given no types.
  """
  encoding = tokenizer.encode('a', 'a')
  texts = np.array([-1 if text is None else text for text in encoding.sequence_ids])
  first, second = np.flatnonzero(texts == 0), np.flatnonzero(texts == 1)
  if not len(first) or not len(second):  # a vocabulary without this letter, or no pairs
    before, after = template({}, tokenizer)
    return before, (), after, 0
  ids = tuple(encoding.ids)
  reads_types = _reads_types(read_json(files, 'tokenizer_config.json'))
  second_type = encoding.type_ids[second[0]] if reads_types else 0
  return ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :], second_type


def _reads_types(config: Mapping[str, Any]) -> bool:
  """Whether transformers gives token types to the model of a folder."""
  inputs = config.get('model_input_names')
  if inputs is None:
    return (config.get('tokenizer_class') or 'BertTokenizer').startswith('Bert')
  return 'token_type_ids' in inputs


def _unknown(description: Mapping[str, Any], tokenizer: 'tokenizers.Tokenizer') -> int | None:
  """The id that the model itself gives to what its vocabulary cannot spell."""
  model = description['model']
  if model.get('unk_token'):
    return tokenizer.token_to_id(model['unk_token'])
  return model.get('unk_id')
