"""A tokenizer whose tokens are characters; its alphabet is learned from the training texts."""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

SPECIALS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '[BOS]', '[EOS]')
FILE = 'alphabet.json'


class Tokenizer:
  """Seven special tokens, then the characters of an alphabet."""

  pad_id, unk_id, cls_id, sep_id, mask_id, bos_id, eos_id = range(len(SPECIALS))
  template = pair_template = None
  eos_ids = (eos_id,)

  def __init__(self, alphabet: str):
    self.alphabet = alphabet
    self.vocab = {text: number for number, text in enumerate([*SPECIALS, *alphabet])}
    self.vocab_size = len(self.vocab)
    self.fingerprint = hashlib.sha256(alphabet.encode()).hexdigest()
    self.special = np.arange(self.vocab_size) < len(SPECIALS)
    sizes = [0] * len(SPECIALS) + [len(character.encode()) for character in alphabet]
    self.token_bytes = np.array(sizes, np.int32)
    self.word_start = np.array([text == ' ' for text in self.vocab])

  def encode(self, text: str, special: bool = False) -> np.ndarray:
    return self.offsets(text, special)[0]

  def offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    known = [*map(re.escape, SPECIALS)] if special else []
    found = list(re.finditer('|'.join([*known, '.']), text, re.DOTALL))
    ids = [self.vocab.get(match[0], self.unk_id) for match in found]
    spans = [match.span() for match in found]
    return np.array(ids, np.int32), np.array(spans, np.int64).reshape(-1, 2)

  def decode(self, ids: Sequence[int]) -> str:
    first = len(SPECIALS)
    return ''.join(self.alphabet[number - first] for number in ids if number >= first)

  def save(self, directory: str) -> None:
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(self.alphabet))

  def export(
    self, directory: str, *, causal: bool, max_len: int, token_types: bool, closed: bool = False
  ) -> None:
    """As a BPE without merges, whose tokens are characters."""
    around = ['[BOS]'] if causal else ['[CLS]', '[SEP]']
    first, *last = ({'SpecialToken': {'id': name, 'type_id': 0}} for name in around)
    single = [first, {'Sequence': {'id': 'A', 'type_id': 0}}, *last]
    description = {
      'version': '1.0',
      'added_tokens': [_added(number, name) for number, name in enumerate(SPECIALS)],
      'model': {'type': 'BPE', 'vocab': self.vocab, 'merges': [], 'unk_token': '[UNK]'},
      'decoder': {'type': 'Fuse'},
      'post_processor': {
        'type': 'TemplateProcessing',
        'single': single,
        'pair': [*single, {'Sequence': {'id': 'B', 'type_id': 1}}],
        'special_tokens': {
          name: {'id': name, 'ids': [self.vocab[name]], 'tokens': [name]} for name in around
        },
      },
    }
    settings = {f'{name.strip("[]").lower()}_token': name for name in SPECIALS}
    settings |= {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': max_len}
    folder = pathlib.Path(directory)
    (folder / 'tokenizer.json').write_text(json.dumps(description))
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def create(texts: Callable[[], Iterator[str]]) -> Tokenizer:
  """The tokenizer of all characters in the training texts."""
  return Tokenizer(''.join(sorted({character for text in texts() for character in text})))


def load(directory: str) -> Tokenizer:
  """The tokenizer that `save` wrote."""
  return Tokenizer(json.loads((pathlib.Path(directory) / FILE).read_text()))


def _added(number: int, name: str) -> dict:
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  return {'id': number, 'content': name, 'special': True} | flags
