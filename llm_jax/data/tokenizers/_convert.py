"""A SentencePiece model as a tokenizer.json, with the same ids for the same text.

The `tokenizers` library reads the same two algorithms (unigram, BPE) in other words, so the habits
of SentencePiece are spelled out:

* Pieces are spelled with a plain space, not with U+2581, so that the sign itself stays a character
  where the model lets it.
* BPE: SentencePiece joins the two neighbours whose union is the best piece, however it is split,
  and the leftmost of equals; a list of merges ranks each split, so splits of one piece stand
  together, the longest left half first.
* User-defined symbols stay whole and untouched: one of several characters, or one that the
  normalization would change, is replaced by a private character before it and put back by the
  decoder.
* No text may become a control or byte piece. A unigram model finds every piece of its list in a
  text, these too, so a pre-tokenizer cuts through the spelling of each.
* The character map: the library's `Precompiled` takes a whole cluster (a letter with its marks) or
  single characters, and loses marks where a cluster begins with a mapped character. Clusters are
  therefore split by a marker that is taken out again, and sequences composed by NFC afterwards.

What still differs:

* Letters with two or more marks that are not in the order of Unicode's normal forms or whose
  composition skips a mark, and a mark behind a ligature: NFC composes or reorders them,
  SentencePiece leaves them.
* Equally good segmentations (the run of spaces as 4 and 2 or as 2 and 4) in a unigram model that
  was not trained here: SentencePiece adds up scores in float32, `tokenizers` in float64. `rounded`
  makes the sums exact in both.
* A text that holds one of the private characters or the marker.
"""

import base64
import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from llm_jax.data.tokenizers import _export

_SPACE = '\u2581'
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # SentencePiece.Type
_MARKER = '\ufdd0\ufdd1'  # two noncharacters, which Unicode keeps out of text
# where a cluster of several characters goes on
_CLUSTER = '(?<=\\r)(?=\\n)|(?<=[^\\n])(?=[\\p{M}\u200c\u200d])'
_PRIVATE = 0x10F000  # stand-ins are taken from here, in the last plane of private use


def convert(
  model: bytes,
  specials: Mapping[str, int],
  *,
  sign_is_space: bool,
  added: Mapping[int, str] | None = None,
) -> dict[str, Any]:
  """Returns tokenizer.json, without a post-processor.

  Args:
    model: the serialised SentencePiece model.
    specials: id of each special token, by name; ids beyond the pieces become tokens of their own.
    sign_is_space: U+2581 in a text is a space (as SentencePiece has it), else a character like any
      other.
    added: texts of further special tokens, by id.

  Raises:
    ValueError: a kind of model that the `tokenizers` library has no twin of.
  """
  proto = _parse(model)
  names = special_names(proto, specials) | dict(added or {})
  stand_ins = _stand_ins(proto, names.values())
  vocab = [_spelled(piece, stand_ins) for piece in proto.pieces]
  unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
  bytes_too = any(piece.type == _BYTE for piece in proto.pieces)
  bpe = proto.trainer_spec.model_type == _BPE
  make = _bpe if bpe else _unigram
  return _export.description(
    make(proto, vocab, unknown, bytes_too),
    [_export.added_token(number, names[number]) for number in sorted(names)],
    normalizer=_normalizers(proto, stand_ins, sign_is_space),
    pre_tokenizer=None if bpe else _cuts(proto, vocab),
    decoder=_decoders(proto, stand_ins, bytes_too),
  )


def foreign(model: bytes, *, xlm_roberta: bool) -> tuple[dict[str, Any], dict[str, str]]:
  """tokenizer.json of a model in a Hugging Face folder, and the texts of its special tokens by
  name.

  Args:
    model: the serialised SentencePiece model.
    xlm_roberta: the ids are those of XLM-RoBERTa: <s>, <pad>, </s> and <unk> come first, <mask>
      after all pieces.
  """
  if xlm_roberta:
    model = _xlm_roberta(model)
  pieces = {piece.piece: number for number, piece in enumerate(_parse(model).pieces)}
  specials = {}
  for name, usual in _export.NAMES.items():
    known = [text for text in usual if text in pieces]
    if known:
      specials[name] = known[0]
  if xlm_roberta:
    specials |= {'cls': '<s>', 'sep': '</s>'}
  ids = {name: pieces[text] for name, text in specials.items()}
  return convert(model, ids, sign_is_space=True), specials


def rounded(model: bytes) -> bytes:
  """The model with the scores of a unigram model rounded to 1/64.

  Sums of such scores are exact in float32 up to 65,536 (a text of some 8,000 tokens). Segmentations
  that are equally good (a run of spaces as 4 and 2 or as 2 and 4) then tie in every implementation,
  and each takes the same one of them.
  """
  proto = _parse(model)
  if proto.trainer_spec.model_type == _UNIGRAM:
    for piece in proto.pieces:
      piece.score = round(piece.score * 64) / 64
  return proto.SerializeToString()


def _xlm_roberta(model: bytes) -> bytes:
  """The model with the pieces in the order of XLM-RoBERTa's ids."""
  proto = _parse(model)
  first = {piece.piece: piece for piece in proto.pieces[:3]}
  if first.keys() != {'<unk>', '<s>', '</s>'}:
    raise ValueError(
      f'a model of XLM-RoBERTa begins with <unk>, <s>, </s>, this one with {", ".join(first)}.'
    )
  make = type(first['<s>'])
  pad = make(piece='<pad>', score=0.0, type=_CONTROL)
  mask = make(piece='<mask>', score=0.0, type=_CONTROL)
  pieces = [first['<s>'], pad, first['</s>'], first['<unk>'], *proto.pieces[3:], mask]
  del proto.pieces[:]
  proto.pieces.extend(pieces)
  return proto.SerializeToString()


def special_names(proto: Any, specials: Mapping[str, int]) -> dict[int, str]:
  """Text of every special token by id: control and unknown pieces, and those of `specials`."""
  pieces = proto.pieces
  names = {i: piece.piece for i, piece in enumerate(pieces) if piece.type in (_CONTROL, _UNKNOWN)}
  for name, number in specials.items():
    names[number] = pieces[number].piece if number < len(pieces) else _export.NAMES[name][0]
  return names


def _parse(model: bytes) -> Any:
  # Here, both: only training and export need protobuf.
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2

  try:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  except DecodeError as error:
    raise ValueError(f'not a SentencePiece model ({len(model)} bytes); copy it again.') from error
  if not any(piece.type == _UNKNOWN for piece in proto.pieces):
    raise ValueError(
      f'a SentencePiece model without an unknown piece ({len(model)} bytes); copy it again.'
    )
  kind = proto.trainer_spec.model_type
  if kind not in (_UNIGRAM, _BPE):
    raise ValueError(
      f'a SentencePiece model of type {kind} is not supported: the tokenizers library has unigram '
      'and BPE.'
    )
  unused = any(piece.type == _UNUSED for piece in proto.pieces)
  if unused or proto.trainer_spec.treat_whitespace_as_suffix:
    raise ValueError(
      'a SentencePiece model with unused pieces, or with the space behind its word, is not '
      'supported.'
    )
  return proto


def _stand_ins(proto: Any, specials: Iterable[str]) -> dict[str, str]:
  """A private character for each user-defined symbol that needs one; the longest symbols first."""
  symbols = {piece.piece for piece in proto.pieces if piece.type == _USER} - set(specials)
  used = set().union(*(piece.piece for piece in proto.pieces))
  free = (chr(number) for number in itertools.count(_PRIVATE) if chr(number) not in used)
  found = {}
  for symbol in sorted(symbols, key=lambda symbol: (-len(symbol), symbol)):
    if len(symbol) > 1 or _is_mapped(proto.normalizer_spec, symbol):
      found[symbol] = next(free)
  return found


def _is_mapped(spec: Any, character: str) -> bool:
  """Whether the character map may change a character; the plain NFKC maps are known, any other one
  may.
  """
  if not spec.precompiled_charsmap:
    return False
  if spec.name not in ('nfkc', 'nfkc_cf'):
    return True
  return unicodedata.normalize('NFKC', character).casefold() != character


def _spelled(piece: Any, stand_ins: Mapping[str, str]) -> str:
  if piece.type == _USER:
    return stand_ins.get(piece.piece, piece.piece).replace(_SPACE, ' ')
  return piece.piece.replace(_SPACE, ' ') if piece.type == _NORMAL else piece.piece


def _bpe(proto: Any, vocab: list[str], unknown: int, bytes_too: bool) -> dict[str, Any]:
  normal = set(_of_types(proto, vocab, _NORMAL))
  merges = []
  for text, piece in zip(vocab, proto.pieces, strict=True):
    if piece.type != _NORMAL:
      continue
    for i in range(len(text) - 1, 0, -1):
      left, right = text[:i], text[i:]
      if left in normal and right in normal:
        merges.append((-piece.score, [left, right]))
  merges.sort(key=lambda merge: merge[0])  # stable: the splits of a piece stay in their order
  return {
    'type': 'BPE',
    'dropout': None,
    'unk_token': vocab[unknown],
    'continuing_subword_prefix': None,
    'end_of_word_suffix': None,
    'fuse_unk': True,
    'byte_fallback': bytes_too,
    'ignore_merges': False,
    'vocab': {text: number for number, text in enumerate(vocab)},
    'merges': [merge for _, merge in merges],
  }


def _unigram(proto: Any, vocab: list[str], unknown: int, bytes_too: bool) -> dict[str, Any]:
  normal = [piece.score for piece in proto.pieces if piece.type == _NORMAL] or [0.0]
  # The lowest score sets the price of an unknown character, so nothing but ordinary pieces may set
  # it.
  low, high = min(normal), max(normal)
  scored = []
  for text, piece in zip(vocab, proto.pieces, strict=True):
    score = piece.score
    if piece.type == _USER:
      score = max(low, len(piece.piece.encode()) * high - 0.1)
    scored.append([text, score])
  return {
    'type': 'Unigram',
    'unk_id': unknown,
    'byte_fallback': bytes_too,
    'vocab': scored,
  }


def _cuts(proto: Any, vocab: list[str]) -> list[dict[str, Any]]:
  """A pre-tokenizer that cuts through the spelling of each piece that no text may become."""
  reserved = _of_types(proto, vocab, _CONTROL, _UNKNOWN)
  patterns = cuts(reserved, _of_types(proto, vocab, _NORMAL, _USER))
  if _of_types(proto, vocab, _BYTE):
    patterns.append('(?<=<)(?=0x[0-9A-F]{2}>)')
  return [split(patterns)]


def _of_types(proto: Any, vocab: list[str], *types: int) -> list[str]:
  """The spellings of the pieces of some types."""
  return [text for text, piece in zip(vocab, proto.pieces, strict=True) if piece.type in types]


def cuts(reserved: Iterable[str], ordinary: Iterable[str]) -> list[str]:
  """Regular expressions for a position within each `reserved` spelling: one that no `ordinary` one
  spans, or else the last.
  """
  pairs = {text[i : i + 2] for text in ordinary for i in range(len(text) - 1)}
  patterns = []
  for text in reserved:
    if len(text) < 2:
      continue
    free = [i for i in range(1, len(text)) if text[i - 1 : i + 1] not in pairs]
    cut = free[0] if free else len(text) - 1
    patterns.append(f'(?<={re.escape(text[:cut])})(?={re.escape(text[cut:])})')
  return patterns


def split(patterns: list[str]) -> dict[str, Any]:
  """A pre-tokenizer that cuts where one of the patterns matches."""
  return {
    'type': 'Split',
    'pattern': {'Regex': '|'.join(patterns)},
    'behavior': 'Isolated',
    'invert': False,
  }


def _normalizers(
  proto: Any, stand_ins: Mapping[str, str], sign_is_space: bool
) -> list[dict[str, Any]]:
  spec = proto.normalizer_spec
  steps = [_export.replace(symbol, private) for symbol, private in stand_ins.items()]
  if spec.precompiled_charsmap:
    charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
    steps += [
      _export.replace_regex(_CLUSTER, _MARKER),
      {'type': 'Precompiled', 'precompiled_charsmap': charsmap},
      _export.replace(_MARKER, ''),
      {'type': 'NFC'},
    ]
  if spec.remove_extra_whitespaces:
    steps += [
      _export.replace_regex('\\A +', ''),
      _export.replace_regex(' {2,}', ' '),
      _export.replace_regex(f'[ {_SPACE}]+\\z' if sign_is_space else ' \\z', ''),
    ]
  if spec.add_dummy_prefix:
    steps.append({'type': 'Prepend', 'prepend': ' '})
  if sign_is_space:
    steps.append(_export.replace(_SPACE, ' '))
  return steps


def _decoders(proto: Any, stand_ins: Mapping[str, str], bytes_too: bool) -> list[dict[str, Any]]:
  steps = [_export.replace(private, symbol) for symbol, private in stand_ins.items()]
  if bytes_too:
    steps.append({'type': 'ByteFallback'})
  steps.append({'type': 'Fuse'})
  if proto.normalizer_spec.add_dummy_prefix:
    steps.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
  return steps
