"""SentencePiece subwords (Kudo & Richardson 2018, arXiv:1808.06226): unigram or BPE, trained on the
corpus or ready-made.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import sentencepiece
from absl import logging

from llm_jax.data.tokenizers import _added, _convert, _export, _pruning, _training, _words

PIECES = _export.NAMES
# To be raised with any change to how text becomes ids; part of every fingerprint and cache key.
_LAYOUT = 1
# To be raised with any change to the models that training makes; part of every cache key.
_TRAINING = 3
_SPACE = '\u2581'  # SentencePiece writes a space as this sign


class Tokenizer:
  """A SentencePiece model with the seven special tokens.

  A model that `create` trained gives decode(encode(x)) == x with normalization 'identity', and x as
  SentencePiece normalises it with 'nfkc'; spaces, tabs and newlines survive in both, no text
  encodes to a special token, and the ids of a text spell exactly as many bytes (`token_bytes`) as
  the normalised text has. A foreign model keeps its own habits: one that puts a space before a text
  spells that byte too (decode takes it off again), one without byte pieces turns unknown characters
  into `unk_id`, which spells nothing.

  Args:
    model: the serialised SentencePiece model.
    specials: id of each special token, by name ('pad', 'unk', 'cls', 'sep', 'mask', 'bos', 'eos');
      ids beyond the model's pieces make the vocabulary larger. None: taken from the model by name,
      those that it lacks following its pieces. PAD is then wherever the model has it, 0 or not:
      padding is known by segment 0, not by id.
    added: texts of further special tokens, whose ids come after all others.

  Raises:
    ValueError: `model` is not a SentencePiece model.
  """

  template = pair_template = None

  def __init__(
    self, model: bytes, specials: Mapping[str, int] | None = None, added: Sequence[str] = ()
  ):
    self._model = model
    self._processor = processor = _processor(model)
    self.specials = dict(specials if specials is not None else _find_specials(processor))
    self.pad_id, self.unk_id = self.specials['pad'], self.specials['unk']
    self.cls_id, self.sep_id = self.specials['cls'], self.specials['sep']
    self.bos_id, self.eos_id = self.specials['bos'], self.specials['eos']
    self.eos_ids = (self.eos_id,)
    self.mask_id = self.specials['mask']
    pieces = processor.vocab_size()
    self.lacked = [name for name, number in self.specials.items() if number >= pieces]
    first = max(pieces, 1 + max(self.specials.values()))
    self._added = {first + number: text for number, text in enumerate(added)}
    self.vocab_size = first + len(self._added)
    self.special = np.zeros(self.vocab_size, bool)
    self.special[pieces:] = True
    self.special[list(self.specials.values())] = True
    for i in range(pieces):
      if processor.is_control(i) or processor.is_unknown(i):
        self.special[i] = True
    self._spelled = [b''] * self.vocab_size
    for i in np.flatnonzero(~self.special).tolist():
      self._spelled[i] = _spelling(processor, i)
    self.token_bytes = np.array([len(spelled) for spelled in self._spelled], np.int32)
    self.word_start = np.array([_words.bytes_begin_word(spelled) for spelled in self._spelled])
    self._dummy_prefix = processor.normalize('a') != 'a'
    self._space_sign = _space_sign_ids(processor) if not self._dummy_prefix else None
    self._texts = {i: processor.id_to_piece(i) for i in range(pieces) if self.special[i]}
    for name in self.lacked:
      self._texts[self.specials[name]] = PIECES[name][0]
    self._texts |= self._added
    self.special_texts = _added.named(self.specials, self._texts)
    self.sentinels = _added.sentinels({text: number for number, text in self._texts.items()})
    key = repr((_LAYOUT, sorted(self.specials.items()), *added))
    self.fingerprint = hashlib.sha256(model + key.encode()).hexdigest()

  def encode(self, text: str, special: bool = False) -> np.ndarray:
    """Returns the ids [n] int32, without special tokens; ValueError for half of a surrogate pair,
    which is no text.

    Args:
      text: any text.
      special: '[MASK]' and the other special tokens, by the names that the model has for them,
        become their ids; otherwise they are text like any other.
    """
    _words.utf8(text)
    if not special and (self._space_sign is None or _SPACE not in text):
      return self._processor.encode(text, return_type='numpy')
    found: list[int] = []
    for _, part, ids in _words.parts(text, self._known(special)):
      found += ids or self._processor.encode(part)
    return np.array(found, np.int32)

  def offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] int32 and, [n, 2], where each one's characters begin and end in the text.

    A character that several tokens spell is given to each; the space that a model puts before a
    text has no characters.
    """
    _words.utf8(text)
    pieces = []
    for start, part, ids in _words.parts(text, self._known(special)):
      if ids is None:
        pieces.append(self._spans(start, part))
      else:
        pieces.append((ids, [(start, start + len(part))] * len(ids)))
    return _words.joined(pieces)

  def _known(self, special: bool) -> dict[str, list[int]]:
    """Strings that have ids of their own: special tokens, and the sign that SentencePiece would
    read as a space.
    """
    known = {text: [number] for number, text in self._texts.items()} if special else {}
    if self._space_sign:
      known[_SPACE] = self._space_sign
    return known

  def _spans(self, start: int, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text that begins at `start`, and their begins and ends: tokens spell the normalised
    text, each of whose characters has an offset in the text as it was given.
    """
    ids, pieces = self._processor.encode(text), self._processor.encode(text, out_type=str)
    normalised, offsets = self._processor.normalize(text, with_offsets=True)
    sizes = [len(c.encode()) for c in normalised]
    character = np.repeat(np.arange(len(normalised)), sizes).tolist()  # of each byte
    character.append(len(normalised))
    spans, byte = [], 0
    for number, piece in zip(ids, pieces, strict=True):
      size = 1 if self._processor.is_byte(number) else len(piece.encode())
      first, last = character[byte], character[byte + size - 1] + 1
      prefix = self._dummy_prefix and last == 1
      begin, end = offsets[first], offsets[last]
      if begin == end and not prefix:  # part of what one character was normalised to
        end = next((after for after in offsets[last:] if after > begin), len(text))
      spans.append((start + begin, start + end))
      byte += size
    return ids, spans

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text; special tokens are left out, invalid UTF-8 becomes U+FFFD. ValueError for
    an id out of range.
    """
    spelled = b''.join(self._spelled[i] for i in _words.checked(ids, self.vocab_size))
    text = spelled.decode('utf-8', 'replace')
    return text.removeprefix(' ') if self._dummy_prefix else text

  def special_text(self, number: int) -> str:
    """The text of a special token."""
    return self._texts.get(number, '')

  def spelling(self, number: int) -> bytes:
    """What an id spells within a text; b'' for a special token."""
    return self._spelled[number]

  def save(self, directory: str) -> None:
    """Writes tokenizer.model and tokenizer.json into `directory`, which is made if needed."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, 'tokenizer.model'), 'wb') as file:
      file.write(self._model)
    with open(os.path.join(directory, 'tokenizer.json'), 'w', encoding='utf-8') as file:
      named = {'name': 'sentencepiece', 'specials': self.specials}
      added = {'added': list(self._added.values())} if self._added else {}
      json.dump(named | added, file, indent=2)

  def export(
    self, directory: str, *, causal: bool, max_len: int, token_types: bool, closed: bool = False
  ) -> None:
    """Writes what `transformers.AutoTokenizer` opens, with the same ids; `_convert` says in which
    texts they may differ.

    Args:
      directory: is made if needed.
      causal: BOS before each text, else CLS before and SEP after.
      max_len: the longest row that the model takes.
      token_types: whether the model tells the texts of a pair apart by an embedding.
      closed: texts end with EOS: of a causal model that classifies, of an encoder-decoder.

    Raises:
      ValueError: a model that is neither unigram nor BPE.
    """
    description = _convert.convert(
      self._model, self.specials, sign_is_space=self._space_sign is None, added=self._added
    )
    specials = {name: (number, self._texts[number]) for name, number in self.specials.items()}
    options = dict(causal=causal, max_len=max_len, token_types=token_types, closed=closed)
    _export.write(directory, _export.folder(description, specials, **options))

  def __reduce__(self):
    return Tokenizer, (self._model, self.specials, tuple(self._added.values()))

  def pruned(self, used: Collection[int]) -> tuple['Tokenizer', list[int]]:
    """The same without pieces that are not needed; see `_pruning`.

    Args:
      used: ids that are.

    Returns:
      The tokenizer, and the former id of each of its ids.
    """
    model, order = _pruning.sentencepiece_model(self._model, used)
    order += range(self._processor.vocab_size(), self.vocab_size)
    new = {old: number for number, old in enumerate(order)}
    specials = {name: new[old] for name, old in self.specials.items()}
    return Tokenizer(model, specials, tuple(self._added.values())), order

  def extended(self, added: Sequence[str], sentinels: int) -> 'Tokenizer':
    """The same with further special tokens; see `create`."""
    if not added and not sentinels:
      return self
    texts = _added.texts(added, sentinels, list(self._texts.values()))
    return Tokenizer(self._model, self.specials, texts)


def load(directory: str) -> Tokenizer:
  """Returns the tokenizer that `save` wrote; ValueError if `directory` holds another one."""
  with open(os.path.join(directory, 'tokenizer.json'), encoding='utf-8') as file:
    description = json.load(file)
  name = description.get('name', 'hf')
  if name != 'sentencepiece':
    raise ValueError(
      f'{directory} holds a tokenizer {name!r}, not sentencepiece; load it with that module.'
    )
  with open(os.path.join(directory, 'tokenizer.model'), 'rb') as file:
    return Tokenizer(file.read(), description['specials'], description.get('added', ()))


def create(
  texts: Callable[[], Iterator[str]],
  texts_fingerprint: str,
  cache: str,
  *,
  vocab_size: int = 8192,
  kind: str = 'unigram',
  normalization: str = 'identity',
  character_coverage: float = 0.9995,
  sample_bytes: int = 4_000_000,
  path: str | None = None,
  added: tuple[str, ...] = (),
  sentinels: int = 0,
) -> Tokenizer:
  """Trains a tokenizer on the corpus, or loads the one that an equal call trained before, or reads
  an existing model.

  Args:
    texts: gives a fresh iterator over the texts to train on.
    texts_fingerprint: changes whenever these texts could.
    cache: folder where trained models are kept, each under a hash of the fingerprint and the
      options.
    vocab_size: ids in all: 7 special tokens, newline and tab, 256 bytes, then pieces.
    kind: 'unigram' or 'bpe'.
    normalization: 'identity' (text stays as it is) or 'nfkc' (Unicode compatibility forms folded,
      as SentencePiece does it: a full-width comma becomes ',').
    character_coverage: share of the sample's characters that get a piece of their own; the rest is
      spelled in bytes.
    sample_bytes: UTF-8 bytes of lines, spread evenly over the corpus, to train on. 4 MB take about
      20 s with 'unigram'.
    path: an existing .model file; then the options of training are not used, and the log says so.
    added: texts of further special tokens (marks of a chat, say), beside `vocab_size`.
    sentinels: how many of the special tokens <extra_id_0>, <extra_id_1>, ... follow them.

  Raises:
    ValueError: an option out of range, an empty corpus, a vocabulary that the corpus cannot fill, a
      file that is no model.
  """
  if path is not None:
    return _read(path).extended(added, sentinels)
  _training.check_options(vocab_size, kind, normalization, character_coverage, sample_bytes)
  options = dict(
    vocab_size=vocab_size,
    model_type=kind,
    normalization_rule_name=normalization,
    character_coverage=character_coverage,
  )
  versions = _LAYOUT, _TRAINING, sentencepiece.__version__
  key = repr((*versions, texts_fingerprint, sample_bytes, sorted(options.items())))
  directory = os.path.join(cache, f'sentencepiece-{hashlib.sha256(key.encode()).hexdigest()[:16]}')
  if os.path.exists(directory):
    logging.info('Tokenizer: %s', directory)
    return load(directory).extended(added, sentinels)
  model = _training.train(_training.sample(texts(), sample_bytes), options)
  tokenizer = Tokenizer(model, {name: number for number, name in enumerate(PIECES)})
  _store(tokenizer, directory)
  return tokenizer.extended(added, sentinels)


def _store(tokenizer: Tokenizer, directory: str) -> None:
  """Writes the tokenizer to `directory` whole or not at all; another process may do the same at the
  same time.
  """
  os.makedirs(os.path.dirname(directory), exist_ok=True)
  draft = tempfile.mkdtemp(prefix='.sentencepiece-', dir=os.path.dirname(directory))
  try:
    tokenizer.save(draft)
    if not os.path.exists(directory):
      os.rename(draft, directory)
  except OSError:
    # Where it is there, the other process was first, with the same content.
    if not os.path.exists(directory):
      raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def _read(path: str) -> Tokenizer:
  if not os.path.isfile(os.path.expanduser(path)):
    raise ValueError(
      f'tokenizer path={path!r} is not a file; give a SentencePiece .model file, or none to train '
      'one.'
    )
  with open(os.path.expanduser(path), 'rb') as file:
    model = file.read()
  try:
    tokenizer = Tokenizer(model)
  except ValueError as error:
    raise ValueError(f'tokenizer path={path!r}: {error}') from error
  logging.info(
    'Tokenizer: %s as it is, %d ids (vocab_size, kind and the other training options are not '
    'used); special tokens that it lacked, added at its end: %s.',
    path,
    tokenizer.vocab_size,
    ', '.join(tokenizer.lacked) or 'none',
  )
  return tokenizer


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(model)
  except RuntimeError as error:
    raise ValueError(
      f'not a SentencePiece model ({len(model)} bytes); give a .model file that its trainer wrote.'
    ) from error
  if not processor.vocab_size():
    raise ValueError(
      'a SentencePiece model without a piece; give a .model file that its trainer wrote.'
    )
  return processor


def _find_specials(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
  """Ids of the special tokens in a foreign model; new ones, after its pieces, for those that it
  does not have.
  """
  own = {
    'pad': processor.pad_id(),
    'unk': processor.unk_id(),
    'bos': processor.bos_id(),
    'eos': processor.eos_id(),
  }
  found, new = {}, processor.vocab_size()
  for name, pieces in PIECES.items():
    numbers = [processor.piece_to_id(piece) for piece in pieces]
    known = [number for number in numbers if number != processor.unk_id()]
    if own.get(name, -1) >= 0:
      found[name] = own[name]
    elif known:
      found[name] = known[0]
    else:
      found[name] = new
      new += 1
  return found


def _spelling(processor: sentencepiece.SentencePieceProcessor, number: int) -> bytes:
  piece = processor.id_to_piece(number)
  if processor.is_byte(number):
    return bytes([int(piece[3:-1], 16)])
  return b'' if processor.is_unused(number) else piece.replace(_SPACE, ' ').encode('utf-8')


def _space_sign_ids(processor: sentencepiece.SentencePieceProcessor) -> list[int] | None:
  """Ids of the three bytes of the sign that stands for a space; None where the model has no byte
  pieces.
  """
  numbers = [processor.piece_to_id(f'<0x{byte:02X}>') for byte in _SPACE.encode('utf-8')]
  return numbers if all(processor.is_byte(number) for number in numbers) else None
