"""The tokenizer of a Marian folder: two SentencePiece models, of the texts that are read and of
those that are written, and one vocabulary for both (Junczys-Dowmunt et al. 2018, arXiv:1804.00344;
Tiedemann and Thottingal 2020, OPUS-MT).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
import sentencepiece
from absl import logging

from llm_jax.data.tokenizers import _added, _export, _words

SOURCE, TARGET, VOCABULARY = 'source.spm', 'target.spm', 'vocab.json'
FILES = (SOURCE, TARGET, VOCABULARY, 'tokenizer_config.json')
_SPECIALS = {'pad': '<pad>', 'unk': '<unk>', 'eos': '</s>'}
_SPACE = '\u2581'


class Tokenizer:
  """Texts that are read become ids by the model of sources, those that are written by `target`; the
  vocabulary says which id a piece has, and a piece that it lacks is unknown. A code such as
  `>>ita<<` before a text is a token of its own.

  Where a folder names no token for it, the beginning, [CLS] and [SEP] are the end of a text.

  Args:
    files: contents by name, those of `FILES`.

  Raises:
    ValueError: a file that is missing or broken, or a folder with two vocabularies.
  """

  pair_template = None
  mask_id = None

  def __init__(self, files: Mapping[str, bytes], target: bool = False):
    self._files = {name: files[name] for name in FILES if name in files}
    missing = [name for name in (SOURCE, TARGET, VOCABULARY) if name not in files]
    if missing:
      raise ValueError(f'a Marian tokenizer needs {", ".join(missing)}, which is not there.')
    self._settings = json.loads(files.get('tokenizer_config.json', b'{}'))
    if self._settings.get('separate_vocabs'):
      raise ValueError('a Marian folder with two vocabularies cannot be read; only one of one.')
    self._processor = _processor(files[TARGET if target else SOURCE])
    self._reads = self._processor if not target else _processor(files[SOURCE])
    self._ids: dict[str, int] = json.loads(files[VOCABULARY])
    unknown = sorted(set(_SPECIALS.values()) - self._ids.keys())
    if unknown:
      raise ValueError(f'{VOCABULARY} of a Marian tokenizer lacks {", ".join(unknown)}.')
    self._set_ids()
    key = hashlib.sha256(b'marian')
    for name in (SOURCE, TARGET, VOCABULARY):
      key.update(files[name])
    self.fingerprint = key.hexdigest()
    self.target = self if target else Tokenizer(files, target=True)

  def _set_ids(self) -> None:
    self._texts = {number: text for text, number in self._ids.items()}
    self.vocab_size = max(self._texts) + 1
    known = {name: self._ids[text] for name, text in _SPECIALS.items()}
    self.pad_id, self.unk_id, self.eos_id = known['pad'], known['unk'], known['eos']
    self.cls_id = self.sep_id = self.bos_id = self.eos_id
    self.eos_ids, self.template = (self.eos_id,), ((), (self.eos_id,))
    self.special_texts = _added.named(known, self._texts)
    self.sentinels = ()
    self.special = np.ones(self.vocab_size, bool)  # an id without a token is no text either
    for text, number in self._ids.items():
      self.special[number] = text in _SPECIALS.values() or _code(text) == text
    spelled = [self._texts.get(i, '').replace(_SPACE, ' ') for i in range(self.vocab_size)]
    sizes = np.array([len(text.encode()) for text in spelled], np.int32)
    self.token_bytes = np.where(self.special, 0, sizes).astype(np.int32)
    starts = [_words.bytes_begin_word(text.encode()) if text else False for text in spelled]
    self.word_start = np.array(starts) & ~self.special

  def encode(self, text: str, special: bool = False) -> np.ndarray:
    """Returns the ids [n] int32; ValueError for half of a surrogate pair, which is no text.

    Args:
      text: any text, a code of a language before it or none.
      special: special tokens in the text become their ids; otherwise they are text like any other.
    """
    return self.offsets(text, special)[0]

  def offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] int32 and, [n, 2], where each one's characters begin and end in the text."""
    _words.utf8(text)
    code = _code(text)
    first = [(self._ids.get(code, self.unk_id), (0, len(code)))] if code else []
    known = {t: [self._ids[t]] for t in _SPECIALS.values()} if special else {}
    found = [([number for number, _ in first], [span for _, span in first])]
    for start, part, ids in _words.parts(text[len(code) :], known):
      begin = start + len(code)
      if ids is not None:
        found.append((ids, [(begin, begin + len(part))]))
      else:
        found.append(self._pieces(begin, part))
    return _words.joined(found)

  def _pieces(self, begin: int, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text that begins at `begin`, and where their characters are: pieces spell the
    normalised text, each of whose characters has an offset in the text as it was given.
    """
    _, offsets = self._processor.normalize(text, with_offsets=True)
    offsets, at = [*offsets, len(text)], 0
    ids, spans = [], []
    for piece in self._processor.encode(text, out_type=str):
      first, last = (min(n, len(offsets) - 1) for n in (at, at + len(piece)))
      ids.append(self._ids.get(piece, self.unk_id))
      spans.append((begin + offsets[first], begin + offsets[last]))
      at += len(piece)
    return ids, spans

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text; special tokens are left out. ValueError for an id out of range."""
    ids = _words.checked(ids, self.vocab_size)
    pieces = [self._texts[i] for i in ids[~self.special[ids]].tolist()]
    return self._reads.decode_pieces(pieces).replace(_SPACE, ' ').strip()

  def special_text(self, number: int) -> str:
    """The text of a special token."""
    return self._texts.get(int(number), '')

  def spelling(self, number: int) -> bytes:
    """What an id spells within a text; b'' for a special token."""
    text = '' if self.special[number] else self._texts[int(number)]
    return text.replace(_SPACE, ' ').encode()

  def save(self, directory: str) -> None:
    """Writes the folder's own files into `directory`, which is made if needed."""
    os.makedirs(directory, exist_ok=True)
    for name, content in self._files.items():
      with open(os.path.join(directory, name), 'wb') as file:
        file.write(content)

  def export(
    self, directory: str, *, causal: bool, max_len: int, token_types: bool, closed: bool = False
  ) -> None:
    """Writes what `transformers.AutoTokenizer` opens: the folder's own files.

    Args:
      directory: is made if needed.
      causal, closed, token_types: not used, the folder says it.
      max_len: the longest row that the model takes; written where the folder does not say it.
    """
    self.save(directory)
    settings = {'tokenizer_class': 'MarianTokenizer', 'model_max_length': max_len}
    text = json.dumps(settings | self._settings, indent=2, ensure_ascii=False)
    _export.write(directory, {'tokenizer_config.json': text})

  def __reduce__(self):
    return Tokenizer, (self._files, self.target is self)


def create(*, path: str) -> Tokenizer:
  """Returns the tokenizer of a folder.

  Args:
    path: holds the two models and the vocabulary.
  """
  tokenizer = load(os.path.expanduser(path))
  logging.info('Tokenizer: %s, Marian, %s ids.', path, f'{tokenizer.vocab_size:,}')
  return tokenizer


def load(directory: str) -> Tokenizer:
  """Returns the tokenizer of a folder; ValueError naming what is missing or broken."""
  files = {}
  for name in FILES:
    path = os.path.join(directory, name)
    if os.path.isfile(path):
      with open(path, 'rb') as file:
        files[name] = file.read()
  try:
    return Tokenizer(files)
  except ValueError as error:
    raise ValueError(f'{directory}: {error}') from error


def _code(text: str) -> str:
  """The code of a language with which a text begins; '' where there is none."""
  end = text.find('<<')
  return text[: end + 2] if text.startswith('>>') and end > 2 else ''


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(model)
  except RuntimeError as error:
    raise ValueError(f'not a SentencePiece model ({len(model)} bytes); copy it again.') from error
  return processor
