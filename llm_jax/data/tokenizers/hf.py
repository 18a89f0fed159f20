"""The tokenizer of a Hugging Face folder, through the `tokenizers` library (extra `hf`): WordPiece,
BPE, Unigram.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging

from llm_jax.data.tokenizers import _convert, _export, _vocabulary, _words

SPECIALS = tuple(_export.NAMES)
_LAYOUT = 1  # to be raised with any change to how text becomes ids; part of every fingerprint
_KEPT = (*_export.FILES, 'config.json', 'chat_template.jinja')
_FALLBACKS = {  # a special token that a folder lacks is another one; in this order
  'cls': ('bos', 'eos'),
  'sep': ('eos',),
  'bos': ('cls', 'eos'),
  'eos': ('sep',),
  'pad': ('eos',),
  'unk': ('pad',),
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
      special_tokens_map.json, config.json (the ids of special tokens) and chat_template.jinja.

  Raises:
    ValueError: tokenizer.json is broken.
    ImportError: the `tokenizers` library is not installed.
  """

  def __init__(self, files: Mapping[str, str]):
    self._files = {name: files[name] for name in _KEPT if name in files}
    self._description = description = _described(self._files)
    self._plain = plain = _open(description)
    self._marked = None  # opened when a text with special tokens comes
    self._named = named = _named_specials(self._files, plain)
    _mark_special(plain, named)
    self.specials = _find_specials(self._files, description, plain, named)
    self._set_ids()
    self.template = _template(self._files, plain, self.specials)
    _hide_specials(plain, description, np.flatnonzero(self.special))
    plain.encode_special_tokens = True
    spelled = _spellings(description, plain, self.vocab_size)
    self.token_bytes = np.where(self.special, 0, [len(text) for text in spelled]).astype(np.int32)
    self.word_start = _word_starts(description, plain, spelled) & ~self.special
    key = (_LAYOUT, sorted(self.specials.items()))
    self.fingerprint = hashlib.sha256(
      (json.dumps(description, sort_keys=True) + repr(key)).encode()
    ).hexdigest()

  def _set_ids(self) -> None:
    vocab = self._plain.get_vocab(with_added_tokens=True)
    self.vocab_size = _highest(vocab) + 1
    ids = _filled(self.specials)
    self.pad_id, self.unk_id, self.cls_id, self.sep_id = (
      ids[name] for name in ('pad', 'unk', 'cls', 'sep')
    )
    self.mask_id, self.bos_id, self.eos_id = (ids.get(name) for name in ('mask', 'bos', 'eos'))
    self.special = np.ones(self.vocab_size, bool)  # an id without a token can be no text either
    self.special[list(vocab.values())] = False
    self.special[[*self.specials.values(), *_flagged(self._plain).values()]] = True

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
      _mark_special(marked, self._named)
      self._marked = marked
    return (self._marked if special else self._plain).encode(text, add_special_tokens=False)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text; special tokens are left out, invalid UTF-8 becomes U+FFFD. ValueError for
    an id out of range.
    """
    ids = _words.checked(ids, self.vocab_size)
    return self._plain.decode(ids[~self.special[ids]].tolist(), skip_special_tokens=False)

  def save(self, directory: str) -> None:
    """Writes the folder's own files into `directory`, which is made if needed; of config.json the
    special ids only.
    """
    _export.write(directory, self._files)

  def export(self, directory: str, *, causal: bool, max_len: int, token_types: bool) -> None:
    """Writes what `transformers.AutoTokenizer` opens: the folder's own files, which say themselves
    what stands around a text.

    Args:
      directory: is made if needed.
      causal: said by the folder already, not used.
      max_len: the longest row that the model takes; written where the folder does not say it.
      token_types: said by the folder already, not used.
    """
    files = {name: text for name, text in self._files.items() if name != 'config.json'}
    config = _json(files, 'tokenizer_config.json')
    texts = {
      f'{name}_token': self._plain.id_to_token(number) for name, number in self.specials.items()
    }
    if not config:
      config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'clean_up_tokenization_spaces': False,
      } | texts
    files['tokenizer_config.json'] = json.dumps(
      {'model_max_length': max_len} | config, indent=2, ensure_ascii=False
    )
    _export.write(directory, files)

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
  files, path = _read(directory), os.path.join(directory, 'tokenizer.json')
  try:
    return Tokenizer(files)
  except ValueError as error:
    raise ValueError(f'{path if os.path.exists(path) else directory}: {error}') from error


def _read(directory: str) -> dict[str, str]:
  """Texts by name; tokenizer.json is made from the vocabulary files where the folder has none."""
  files = {}
  for name in _KEPT:
    path = os.path.join(directory, name)
    if os.path.isfile(path):
      files[name] = _text(path)
  for name in (name for name in files if name.endswith('.json')):
    _checked_json(files, name, directory)
  if 'config.json' in files:
    ids = {
      key: value
      for key, value in sorted(_json(files, 'config.json').items())
      if key.endswith('_token_id')
    }
    files['config.json'] = json.dumps(ids)
  return files if 'tokenizer.json' in files else _vocabulary.complete(directory, files)


def _text(path: str) -> str:
  try:
    with open(path, encoding='utf-8') as file:
      return file.read()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} is not a text file in UTF-8 ({error.reason} at byte {error.start}); copy it again.'
    ) from error


def _checked_json(files: Mapping[str, str], name: str, directory: str) -> None:
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


def _json(files: Mapping[str, str], name: str) -> dict[str, Any]:
  return json.loads(files.get(name, '{}'))


def _described(files: Mapping[str, str]) -> dict[str, Any]:
  """tokenizer.json, with the options of tokenizer_config.json that `transformers` puts above it."""
  description, config = _json(files, 'tokenizer.json'), _json(files, 'tokenizer_config.json')
  normalizer = description.get('normalizer')
  if isinstance(normalizer, dict) and normalizer.get('type') == 'BertNormalizer':
    if config.get('tokenizer_class') not in (
      'PreTrainedTokenizerFast',
      'TokenizersBackend',
    ):  # these take it as it is
      options = {
        'lowercase': 'do_lower_case',
        'strip_accents': 'strip_accents',
        'handle_chinese_chars': 'tokenize_chinese_chars',
      }
      description['normalizer'] = normalizer | {
        key: config[name] for key, name in options.items() if name in config
      }
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
  except Exception as error:  # the library raises nothing narrower
    raise ValueError(
      f'the tokenizers library {library.__version__} cannot read it ({error}); copy it again, or '
      'update the '
      'library.'
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


def _named_specials(files: Mapping[str, str], tokenizer: Any) -> dict[str, int]:
  """Ids of the special tokens that the folder names."""
  found = {}
  for source in ('special_tokens_map.json', 'tokenizer_config.json'):
    content = _json(files, source)
    for name in SPECIALS:
      text = content.get(f'{name}_token')
      text = text.get('content') if isinstance(text, dict) else text
      if isinstance(text, str):
        number = tokenizer.token_to_id(text)
        if number is not None:
          found[name] = number
        elif name not in found:
          logging.warning(
            '%s names %s_token %r, which is not in the vocabulary: left out.', source, name, text
          )
  return found


def _flagged(tokenizer: Any) -> dict[str, int]:
  return {
    token.content: number
    for number, token in tokenizer.get_added_tokens_decoder().items()
    if token.special
  }


def _mark_special(tokenizer: Any, named: Mapping[str, int]) -> None:
  """Special tokens that are in the vocabulary only become ones that are found in a text, as
  `transformers` does.
  """
  known = set(_flagged(tokenizer).values())
  texts = [tokenizer.id_to_token(number) for number in sorted(set(named.values()) - known)]
  tokenizer.add_special_tokens(
    [_library().AddedToken(text, special=True, normalized=False) for text in texts]
  )


def _find_specials(
  files: Mapping[str, str], description: Mapping[str, Any], tokenizer: Any, named: Mapping[str, int]
) -> dict[str, int]:
  found, flagged, config = dict(named), _flagged(tokenizer), _json(files, 'config.json')
  for name, usual in _export.NAMES.items():
    texts = (*usual, '<|endoftext|>') if name == 'eos' else usual
    ids = [flagged[text] for text in texts if text in flagged]
    own = _unknown(description, tokenizer) if name == 'unk' else None
    ids = [own, *ids] if own is not None else ids
    number = config.get(f'{name}_token_id')
    number = number[0] if isinstance(number, list) and number else number
    ids += [number] if isinstance(number, int) and number in flagged.values() else []
    if name not in found and ids:
      found[name] = ids[0]
  return found


def _unknown(description: Mapping[str, Any], tokenizer: Any) -> int | None:
  """The id that the model itself gives to what its vocabulary cannot spell."""
  model = description['model']
  return (
    tokenizer.token_to_id(model['unk_token']) if model.get('unk_token') else model.get('unk_id')
  )


def _filled(specials: Mapping[str, int]) -> dict[str, int]:
  """Every special token but mask has an id."""
  ids = dict(specials)
  for name, others in _FALLBACKS.items():
    ids.setdefault(name, next((ids[other] for other in others if other in ids), 0))
  return ids


def _hide_specials(tokenizer: Any, description: Mapping[str, Any], specials: np.ndarray) -> None:
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
    library = _library()
    cut = library.pre_tokenizers.Split(library.Regex('|'.join(patterns)), 'isolated')
    before = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*before, cut])


def _template(
  files: Mapping[str, str], tokenizer: Any, specials: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids before and after one text; add_bos_token and add_eos_token of tokenizer_config.json
  have the last word.
  """
  config, ids = _json(files, 'tokenizer_config.json'), _filled(specials)
  if 'add_bos_token' in config or 'add_eos_token' in config:
    return tuple(
      (ids[name],) if config.get(f'add_{name}_token') and name in specials else ()
      for name in ('bos', 'eos')
    )
  encoding = tokenizer.encode('a')
  ordinary = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
  first, last = (
    (ordinary[0], ordinary[-1] + 1) if len(ordinary) else (len(encoding.ids), len(encoding.ids))
  )
  return tuple(encoding.ids[:first]), tuple(encoding.ids[last:])


def _steps(part: Any) -> list[dict[str, Any]]:
  """A decoder, or the several of a sequence."""
  if not isinstance(part, dict):
    return []
  return (
    [step for one in part['decoders'] for step in _steps(one)]
    if part.get('type') == 'Sequence'
    else [part]
  )


def _spellings(description: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> list[bytes]:
  """What each id spells, as bytes."""
  added = tokenizer.get_added_tokens_decoder()
  steps = {step['type']: step for step in _steps(description.get('decoder'))}
  alphabet = _vocabulary.byte_alphabet() if 'ByteLevel' in steps else None
  replaced = [
    (step['pattern']['String'], step['content'])
    for step in _steps(description.get('decoder'))
    if step['type'] == 'Replace' and 'String' in step['pattern']
  ]
  replaced += [(steps['Metaspace'].get('replacement', '▁'), ' ')] if 'Metaspace' in steps else []
  prefix = steps['WordPiece'].get('prefix', '##') if 'WordPiece' in steps else ''
  suffix = steps['BPEDecoder'].get('suffix', '</w>') if 'BPEDecoder' in steps else ''

  def spell(number: int) -> bytes:
    text = tokenizer.id_to_token(number)
    if text is None or number in added:
      return (text or '').encode()
    if alphabet is not None:
      return bytes(alphabet[c] for c in text) if all(c in alphabet for c in text) else text.encode()
    if 'ByteFallback' in steps and len(text) == 6 and text.startswith('<0x') and text.endswith('>'):
      return bytes.fromhex(text[3:5])
    for old, new in replaced:
      text = text.replace(old, new)
    text = text.removeprefix(prefix)
    return (text.removesuffix(suffix) + ' ' if suffix and text.endswith(suffix) else text).encode()

  return [spell(number) for number in range(vocab_size)]


def _word_starts(
  description: Mapping[str, Any], tokenizer: Any, spelled: Sequence[bytes]
) -> np.ndarray:
  if type(tokenizer.model).__name__ == 'WordPiece':
    prefix = description['model'].get('continuing_subword_prefix', '##')
    return np.array(
      [
        not (tokenizer.id_to_token(number) or '').startswith(prefix)
        for number in range(len(spelled))
      ]
    )
  return np.array([_words.bytes_begin_word(text) for text in spelled])
