"""The simplest tokenizer: seven special tokens, then the 256 bytes of UTF-8 (as in ByT5, Xue et al.
2022, arXiv:2105.13626).
"""

import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np

from llm_jax.data.tokenizers import _added, _export, _words

SPECIALS = tuple(_export.NAMES)
_BYTES = len(SPECIALS) + 256  # and the special tokens before them
_TEXTS = {usual[0]: [number] for number, usual in enumerate(_export.NAMES.values())}


class Tokenizer:
  """Byte b of a text's UTF-8 is id b + 7; any text comes back exactly. No text holds `unk`, whose
  id the contract asks for.

  Args:
    added: texts of further special tokens, whose ids come after the bytes.
  """

  pad_id, unk_id, cls_id, sep_id, mask_id, bos_id, eos_id = range(len(SPECIALS))
  template = pair_template = None
  eos_ids = (eos_id,)

  def __init__(self, added: Sequence[str] = ()):
    first, self._added = len(SPECIALS), tuple(added)
    self._texts = _TEXTS | {text: [_BYTES + number] for number, text in enumerate(added)}
    self.sentinels = _added.sentinels({text: ids[0] for text, ids in self._texts.items()})
    own = {ids[0]: text for text, ids in _TEXTS.items()}
    self.special_texts = _added.named({name: i for i, name in enumerate(SPECIALS)}, own)
    self.vocab_size = _BYTES + len(self._added)
    ids = np.arange(self.vocab_size)
    self.special = (ids < first) | (ids >= _BYTES)
    self.token_bytes = np.where(self.special, 0, 1).astype(np.int32)
    starts = [_words.byte_begins_word(byte) for byte in range(256)]
    self.word_start = np.array([False] * first + starts + [False] * len(self._added))
    key = ' '.join(['byte, seven special tokens first', *map(repr, added)])
    self.fingerprint = hashlib.sha256(key.encode()).hexdigest()

  def encode(self, text: str, special: bool = False) -> np.ndarray:
    """Returns the ids [n] int32 of the n bytes; ValueError for half of a surrogate pair, which
    UTF-8 cannot hold.

    Args:
      text: any text.
      special: '[MASK]' and the like in the text become special tokens; otherwise they are text like
        any other.
    """
    if special:
      return self.offsets(text, special)[0]
    return np.frombuffer(_words.utf8(text), np.uint8).astype(np.int32) + len(SPECIALS)

  def offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] int32 and, [n, 2], where each one's character begins and ends in the text."""
    _words.utf8(text)
    parts = _words.parts(text, self._texts if special else {})
    return _words.joined(_ids_and_spans(start, part, ids) for start, part, ids in parts)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text; special tokens are left out, invalid UTF-8 becomes U+FFFD. ValueError for
    an id out of range.
    """
    ids = _words.checked(ids, self.vocab_size)
    spelled = ids[~self.special[ids]] - len(SPECIALS)
    return spelled.astype(np.uint8).tobytes().decode('utf-8', 'replace')

  def special_text(self, number: int) -> str:
    """The text of a special token."""
    return next((text for text, ids in self._texts.items() if ids == [number]), '')

  def spelling(self, number: int) -> bytes:
    """The byte of an id; b'' for a special token."""
    return b'' if self.special[number] else bytes([number - len(SPECIALS)])

  def save(self, directory: str) -> None:
    """Writes tokenizer.json into `directory`, which is made if needed."""
    os.makedirs(directory, exist_ok=True)
    specials = {name: number for number, name in enumerate(SPECIALS)}
    with open(os.path.join(directory, 'tokenizer.json'), 'w', encoding='utf-8') as file:
      added = {'added': list(self._added)} if self._added else {}
      json.dump({'name': 'byte', 'specials': specials} | added, file, indent=2)

  def export(
    self, directory: str, *, causal: bool, max_len: int, token_types: bool, closed: bool = False
  ) -> None:
    """Writes what `transformers.AutoTokenizer` opens, with the same ids: a BPE without merges,
    whose characters become bytes.

    Args:
      directory: is made if needed.
      causal: [BOS] before each text, else [CLS] before and [SEP] after.
      max_len: the longest row that the model takes.
      token_types: whether the model tells the texts of a pair apart by an embedding.
      closed: texts end with EOS: of a causal model that classifies, of an encoder-decoder.
    """
    vocab = {text: number for text, [number] in self._texts.items()}
    vocab |= {f'<0x{byte:02X}>': byte + len(SPECIALS) for byte in range(256)}
    model = {
      'type': 'BPE',
      'dropout': None,
      'unk_token': '[UNK]',
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': False,
      'byte_fallback': True,
      'ignore_merges': False,
      'vocab': vocab,
      'merges': [],
    }
    description = _export.description(
      model,
      [_export.added_token(number, text) for text, [number] in self._texts.items()],
      decoder=[{'type': 'ByteFallback'}, {'type': 'Fuse'}],
    )
    specials = {
      name: (number, text) for name, (text, [number]) in zip(SPECIALS, _TEXTS.items(), strict=True)
    }
    options = dict(causal=causal, max_len=max_len, token_types=token_types, closed=closed)
    _export.write(directory, _export.folder(description, specials, **options))


def _ids_and_spans(
  start: int, text: str, ids: Sequence[int] | None
) -> tuple[Sequence[int], Sequence]:
  if ids is not None:
    return ids, [(start, start + len(text))]
  sizes = [len(character.encode()) for character in text]
  begins = np.repeat(start + np.arange(len(text)), sizes)
  return [byte + len(SPECIALS) for byte in text.encode()], begins[:, None] + [0, 1]


def create(*, added: tuple[str, ...] = (), sentinels: int = 0) -> Tokenizer:
  """Returns the tokenizer; there is nothing to train.

  Args:
    added: texts of further special tokens (marks of a chat, say).
    sentinels: how many of the special tokens <extra_id_0>, <extra_id_1>, ... follow them.
  """
  return Tokenizer(_added.texts(added, sentinels, list(_TEXTS)))


def load(directory: str) -> Tokenizer:
  """Returns the tokenizer that `save` wrote; ValueError if `directory` holds another one."""
  with open(os.path.join(directory, 'tokenizer.json'), encoding='utf-8') as file:
    description = json.load(file)
  name = description.get('name', 'hf')
  if name != 'byte':
    raise ValueError(f'{directory} holds a tokenizer {name!r}, not byte; load it with that module.')
  return Tokenizer(description.get('added', ()))
