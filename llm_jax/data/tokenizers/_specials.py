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
  files: Mapping[str, str], tokenizer: 'tokenizers.Tokenizer', specials: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids before and after one text; add_bos_token and add_eos_token of tokenizer_config.json
  have the last word.
  """
  config, ids = read_json(files, 'tokenizer_config.json'), filled(specials)
  if 'add_bos_token' in config or 'add_eos_token' in config:

    def asked_for(name: str) -> tuple[int, ...]:
      return (ids[name],) if config.get(f'add_{name}_token') and name in specials else ()

    return asked_for('bos'), asked_for('eos')
  encoding = tokenizer.encode('a')
  ordinary = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
  if not len(ordinary):
    return tuple(encoding.ids), ()
  return tuple(encoding.ids[: ordinary[0]]), tuple(encoding.ids[ordinary[-1] + 1 :])


def _unknown(description: Mapping[str, Any], tokenizer: 'tokenizers.Tokenizer') -> int | None:
  """The id that the model itself gives to what its vocabulary cannot spell."""
  model = description['model']
  if model.get('unk_token'):
    return tokenizer.token_to_id(model['unk_token'])
  return model.get('unk_id')
