"""What the ids of a tokenizer.json spell, and which of them begin a word."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_jax.core.tree import PyTree
from llm_jax.data.tokenizers import _vocabulary, _words

if TYPE_CHECKING:
  import tokenizers


def spellings(
  description: Mapping[str, Any], tokenizer: 'tokenizers.Tokenizer', vocab_size: int
) -> list[bytes]:
  """What each id spells, as bytes."""
  added = tokenizer.get_added_tokens_decoder()
  steps = _steps(description.get('decoder'))
  kinds = {step['type']: step for step in steps}
  alphabet = _vocabulary.byte_alphabet() if 'ByteLevel' in kinds else None
  replaced = _replacements(steps)
  prefix = kinds['WordPiece'].get('prefix', '##') if 'WordPiece' in kinds else ''
  suffix = kinds['BPEDecoder'].get('suffix', '</w>') if 'BPEDecoder' in kinds else ''

  def spell(number: int) -> bytes:
    text = tokenizer.id_to_token(number)
    if text is None:
      return b''
    if number in added:
      return text.encode()
    if alphabet is not None:
      known = all(c in alphabet for c in text)
      return bytes(alphabet[c] for c in text) if known else text.encode()
    if 'ByteFallback' in kinds and _is_byte(text):
      return bytes.fromhex(text[3:5])
    for old, new in replaced:
      text = text.replace(old, new)
    text = text.removeprefix(prefix)
    if suffix and text.endswith(suffix):
      text = text.removesuffix(suffix) + ' '
    return text.encode()

  return [spell(number) for number in range(vocab_size)]


def word_starts(
  description: Mapping[str, Any], tokenizer: 'tokenizers.Tokenizer', spelled: Sequence[bytes]
) -> np.ndarray:
  """[vocab_size] bool: whether each id begins a word."""
  if type(tokenizer.model).__name__ != 'WordPiece':
    return np.array([_words.bytes_begin_word(text) for text in spelled])
  prefix = description['model'].get('continuing_subword_prefix', '##')
  texts = [tokenizer.id_to_token(number) or '' for number in range(len(spelled))]
  return np.array([not text.startswith(prefix) for text in texts])


def _steps(part: PyTree) -> list[dict[str, Any]]:
  """A decoder, or the several of a sequence."""
  if not isinstance(part, dict):
    return []
  if part.get('type') != 'Sequence':
    return [part]
  return [step for one in part['decoders'] for step in _steps(one)]


def _replacements(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """The strings that decoding replaces, and by what: Metaspace's sign comes last."""
  replaced, signs = [], []
  for step in steps:
    if step['type'] == 'Replace' and 'String' in step['pattern']:
      replaced.append((step['pattern']['String'], step['content']))
    elif step['type'] == 'Metaspace':
      signs = [(step.get('replacement', '▁'), ' ')]
  return replaced + signs


def _is_byte(text: str) -> bool:
  return len(text) == 6 and text.startswith('<0x') and text.endswith('>')
