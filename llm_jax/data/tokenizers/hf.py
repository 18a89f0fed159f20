"""The tokenizer of a Hugging Face folder, through the `tokenizers` library (extra `hf`): WordPiece,
BPE, Unigram.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging

from llm_jax.data.tokenizers import (
  _added,
  _export,
  _pruning,
  _specials,
  _spelling,
  _vocabulary,
  _words,
)

_LAYOUT = 1  # to be raised with any change to how text becomes ids; part of every fingerprint
_KEPT = (*_export.FILES, *_specials.CONFIGS, 'chat_template.jinja')
_UNCHANGED = ('PreTrainedTokenizerFast', 'TokenizersBackend')  # classes that keep tokenizer.json
_BERT_OPTIONS = {  # of a BertNormalizer: key in tokenizer.json -> key in tokenizer_config.json
  'lowercase': 'do_lower_case',
  'strip_accents': 'strip_accents',
  'handle_chinese_chars': 'tokenize_chinese_chars',
}


class Tokenizer:
  """What a Hugging Face folder holds, with the same ids as `transformers` gives.

  `encode` reads every text as ordinary text, '[MASK]' and '</s>' too, and gives no special token
  but `unk_id` for what the vocabulary cannot spell; with special=True the folder's special tokens
  are recognised in the text, as `transformers` does. Other added tokens (runs of spaces, say) are
  part of the vocabulary and recognised always. Truncation and padding that the folder asks for are
  switched off.

  The rules are those of tokenizer.json, or of the SentencePiece model, which the model was trained
  with. For the class LlamaTokenizer transformers 5 makes rules of its own from the vocabulary:
  there a text that begins with a space gets no further one in front, and so one token less or
  another one.

  `token_bytes` counts the UTF-8 bytes of what a token spells: a byte-level token its bytes, a piece
  with a sign for a space the space too, a byte piece 1, a WordPiece its letters without the ## in
  front. A WordPiece vocabulary does not spell spaces, and one without capitals or accents counts
  the text as it normalises it: sums are those of the normalised words.

  `word_start` is true for a WordPiece without ##, else as for the other tokenizers: at spaces,
  signs and punctuation.

  Special tokens are those that tokenizer_config.json and special_tokens_map.json name, else the
  special tokens that are called as usual ('[MASK]', '<mask>', ...), else those that the ids of
  config.json point at. Where there is none: cls is bos, else eos; sep is eos; bos is cls, else eos;
  eos is sep; pad is eos, else 0; unk is pad; mask_id is None.

  Args:
    files: texts by name: tokenizer.json, and as far as the folder has them tokenizer_config.json,
      special_tokens_map.json, config.json and generation_config.json (the ids of special tokens)
      and chat_template.jinja.

  Raises:
    ValueError: tokenizer.json is broken.
    ImportError: the `tokenizers` library is not installed.
  """

  def __init__(self, files: Mapping[str, str]):
    self._files = {name: files[name] for name in _KEPT if name in files}
    self._description = description = _described(self._files)
    self._plain = plain = _open(description)
    self._marked = None  # opened when a text with special tokens comes
    self._named = named = _specials.named(self._files, plain)
    _specials.mark(plain, named, _library())
    self.specials = _specials.find(self._files, description, plain, named)
    self._set_ids()
    self.template = _specials.template(self._files, plain)
    self.pair_template = _specials.pair_template(self._files, plain)
    _specials.hide(plain, description, np.flatnonzero(self.special), _library())
    plain.encode_special_tokens = True
    self._spelled = spelled = _spelling.spellings(description, plain, self.vocab_size)
    sizes = [len(text) for text in spelled]
    self.token_bytes = np.where(self.special, 0, sizes).astype(np.int32)
    self.word_start = _spelling.word_starts(description, plain, spelled) & ~self.special
    key = json.dumps(description, sort_keys=True) + repr((_LAYOUT, sorted(self.specials.items())))
    self.fingerprint = hashlib.sha256(key.encode()).hexdigest()

  def _set_ids(self) -> None:
    vocab = self._plain.get_vocab(with_added_tokens=True)
    self.vocab_size = _highest(vocab) + 1
    ids = _specials.filled(self.specials)
    self.pad_id, self.unk_id = ids['pad'], ids['unk']
    self.cls_id, self.sep_id = ids['cls'], ids['sep']
    self.bos_id, self.eos_id = ids['bos'], ids['eos']
    self.mask_id = ids.get('mask')
    self.eos_ids = _specials.ends(self._files, self.eos_id, self.vocab_size)
    self.special = np.ones(self.vocab_size, bool)  # an id without a token is no text either
    self.special[list(vocab.values())] = False
    self.special_texts = _added.named(self.specials, {n: text for text, n in vocab.items()})
    self.sentinels = _added.sentinels(vocab)
    self.special[[*self.specials.values(), *_specials.flagged(self._plain).values()]] = True

  def encode(self, text: str, special: bool = False) -> np.ndarray:
    """Returns the ids [n] int32; ValueError for half of a surrogate pair, which is no text.

    Args:
      text: any text.
      special: special tokens in the text ('[MASK]') become their ids; otherwise they are text like
        any other.
    """
    return np.array(self._encoding(text, special).ids, np.int32)

  def offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] int32 and, [n, 2], where each one's characters begin and end in the text, as the
    library has them.
    """
    encoding = self._encoding(text, special)
    return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

  def _encoding(self, text: str, special: bool) -> Any:
    _words.utf8(text)
    if special and self._marked is None:
      marked = _open(self._description)
      _specials.mark(marked, self._named, _library())
      self._marked = marked
    tokenizer = self._marked if special else self._plain
    return tokenizer.encode(text, add_special_tokens=False)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text; special tokens are left out, invalid UTF-8 becomes U+FFFD. ValueError for
    an id out of range.
    """
    ids = _words.checked(ids, self.vocab_size)
    return self._plain.decode(ids[~self.special[ids]].tolist(), skip_special_tokens=False)

  def special_text(self, number: int) -> str:
    """The text of a special token."""
    return self._plain.id_to_token(int(number)) or ''

  def spelling(self, number: int) -> bytes:
    """What an id spells within a text; b'' for a special token."""
    return b'' if self.special[number] else self._spelled[number]

  def save(self, directory: str) -> None:
    """Writes the folder's own files into `directory`, which is made if needed; of config.json the
    special ids only.
    """
    _export.write(directory, self._files)

  def export(
    self, directory: str, *, causal: bool, max_len: int, token_types: bool, closed: bool = False
  ) -> None:
    """Writes what `transformers.AutoTokenizer` opens: the folder's own files, which say themselves
    what stands around a text.

    Args:
      directory: is made if needed.
      causal, closed: not used, the folder says it.
      max_len: the longest row that the model takes; written where the folder does not say it.
      token_types: not used, the folder says it.
    """
    files = {name: text for name, text in self._files.items() if name != 'config.json'}
    config = _specials.read_json(files, 'tokenizer_config.json')
    if not config:
      config['tokenizer_class'] = 'PreTrainedTokenizerFast'
      config['clean_up_tokenization_spaces'] = False
      for name, number in self.specials.items():
        config[f'{name}_token'] = self._plain.id_to_token(number)
    config = {'model_max_length': max_len} | config
    files['tokenizer_config.json'] = json.dumps(config, indent=2, ensure_ascii=False)
    _export.write(directory, files)

  def pruned(self, used: Collection[int]) -> tuple['Tokenizer', list[int]]:
    """The same without tokens that are not needed; see `_pruning`.

    Args:
      used: ids that are.

    Returns:
      The tokenizer, and the former id of each of its ids.
    """
    used = {*used, *_specials.filled(self.specials).values(), *np.flatnonzero(self.special)}
    description = _specials.read_json(self._files, 'tokenizer.json')
    changed, order = _pruning.tokenizer_json(description, used)
    files = self._files | {'tokenizer.json': json.dumps(changed, ensure_ascii=False)}
    for name in files.keys() & {*_specials.CONFIGS, 'tokenizer_config.json'}:
      config = _pruning.special_ids(_specials.read_json(files, name), order)
      files[name] = json.dumps(config, ensure_ascii=False)
    return Tokenizer(files), order

  def __reduce__(self):
    return Tokenizer, (self._files,)


def create(*, path: str) -> Tokenizer:
  """Returns the tokenizer of a Hugging Face folder.

  Args:
    path: the folder, with tokenizer.json or the vocabulary files that `_vocabulary` reads.
  """
  tokenizer = load(os.path.expanduser(path))
  logging.info(
    'Tokenizer: %s, %s ids; special tokens %s.',
    path,
    f'{tokenizer.vocab_size:,}',
    tokenizer.specials,
  )
  return tokenizer


def load(directory: str) -> Tokenizer:
  """Returns the tokenizer of a folder; ValueError naming the file that is missing or broken."""
  files = _read(directory)
  try:
    return Tokenizer(files)
  except ValueError as error:
    path = os.path.join(directory, 'tokenizer.json')
    raise ValueError(f'{path if os.path.exists(path) else directory}: {error}') from error


def _read(directory: str) -> dict[str, str]:
  """Texts by name; tokenizer.json is made from the vocabulary files where the folder has none."""
  files = {}
  for name in _KEPT:
    path = os.path.join(directory, name)
    if os.path.isfile(path):
      files[name] = _text(path)
  for name in files:
    if name.endswith('.json'):
      _check_json(files, name, directory)
  for name in files.keys() & set(_specials.CONFIGS):
    config = sorted(_specials.read_json(files, name).items())
    ids = {key: value for key, value in config if key.endswith('_token_id')}
    files[name] = json.dumps(ids)
  if 'tokenizer.json' not in files:
    return _vocabulary.with_tokenizer_json(directory, files)
  return files


def _text(path: str) -> str:
  try:
    with open(path, encoding='utf-8') as file:
      return file.read()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} is not a text file in UTF-8 ({error.reason} at byte {error.start}); copy it again.'
    ) from error


def _check_json(files: Mapping[str, str], name: str, directory: str) -> None:
  path = os.path.join(directory, name)
  try:
    content = json.loads(files[name])
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}); copy it again.') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds a {type(content).__name__}, not an object; copy it again.')
  if name == 'tokenizer.json' and content.keys() == {'name', 'specials'}:
    raise ValueError(
      f'{directory} holds a tokenizer {content["name"]!r}, not hf; load it with that module.'
    )


def _described(files: Mapping[str, str]) -> dict[str, Any]:
  """tokenizer.json, with the options of tokenizer_config.json that `transformers` puts above it."""
  description = _specials.read_json(files, 'tokenizer.json')
  config = _specials.read_json(files, 'tokenizer_config.json')
  normalizer = description.get('normalizer')
  if not isinstance(normalizer, dict) or normalizer.get('type') != 'BertNormalizer':
    return description
  if config.get('tokenizer_class') in _UNCHANGED:
    return description
  for key, name in _BERT_OPTIONS.items():
    if name in config:
      normalizer[key] = config[name]
  return description


def _library() -> ModuleType:
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError(
      "a Hugging Face folder's tokenizer needs the tokenizers library: pip install 'llm_jax[hf]'."
    ) from error
  return tokenizers


def _open(description: Mapping[str, Any]) -> Any:
  library = _library()
  try:
    tokenizer = library.Tokenizer.from_str(json.dumps(description))
  except BaseException as error:  # the library raises nothing narrower, and panics
    if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
      raise
    raise ValueError(
      f'the tokenizers library {library.__version__} cannot read it ({error}); copy it again, or '
      'update the library.'
    ) from error
  tokenizer.no_truncation()
  tokenizer.no_padding()
  _highest(tokenizer.get_vocab())
  return tokenizer


def _highest(vocab: Mapping[str, int]) -> int:
  highest = max(vocab.values(), default=-1)
  if highest < 0 or highest > 16 * len(vocab) + 65536:
    raise ValueError(
      f'{len(vocab)} tokens with ids up to {highest} are no vocabulary; copy the file again.'
    )
  return highest
