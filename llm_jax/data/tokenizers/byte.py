"""The simplest tokenizer: seven special tokens, then the 256 bytes of UTF-8 (as in ByT5, Xue et al. 2022, arXiv:2105.13626)."""

import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np

from llm_jax.data.tokenizers import _words

SPECIALS = ('pad', 'unk', 'cls', 'sep', 'mask', 'bos', 'eos')


class Tokenizer:
  """Byte b of a text's UTF-8 is id b + 7; any text comes back exactly. No text holds `unk`: the contract wants its id."""

  pad_id, unk_id, cls_id, sep_id, mask_id, bos_id, eos_id = range(len(SPECIALS))
  vocab_size = len(SPECIALS) + 256
  fingerprint = hashlib.sha256(b'byte, seven special tokens first').hexdigest()

  def __init__(self):
    first = len(SPECIALS)
    self.special = np.arange(self.vocab_size) < first
    self.token_bytes = np.where(self.special, 0, 1).astype(np.int32)
    self.word_start = np.array([False] * first + [_words.byte_begins_word(byte) for byte in range(256)])

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids [n] int32 of the n bytes; ValueError for half of a surrogate pair, which UTF-8 cannot hold."""
    return np.frombuffer(_words.utf8(text), np.uint8).astype(np.int32) + len(SPECIALS)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text; special tokens are left out, invalid UTF-8 becomes U+FFFD. ValueError for an id out of range."""
    ids = _words.checked(ids, self.vocab_size)
    return (ids[ids >= len(SPECIALS)] - len(SPECIALS)).astype(np.uint8).tobytes().decode('utf-8', 'replace')

  def save(self, directory: str) -> None:
    """Writes tokenizer.json into `directory`, which is made if needed."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, 'tokenizer.json'), 'w', encoding='utf-8') as file:
      json.dump({'name': 'byte', 'specials': {name: number for number, name in enumerate(SPECIALS)}}, file, indent=2)


def create() -> Tokenizer:
  """Returns the tokenizer; there is nothing to train."""
  return Tokenizer()


def load(directory: str) -> Tokenizer:
  """Returns the tokenizer that `save` wrote; ValueError if `directory` holds none or another one."""
  with open(os.path.join(directory, 'tokenizer.json'), encoding='utf-8') as file:
    name = json.load(file)['name']
  if name != 'byte':
    raise ValueError(f'{directory} holds a tokenizer {name!r}, not byte; load it with that module.')
  return Tokenizer()
