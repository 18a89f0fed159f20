"""Vocabularies without the tokens that a corpus never needs. Its texts become the same tokens as
before, whose ids are other ones; any other text is still spelled, by shorter pieces.

WordPiece takes the longest match, a unigram model the most likely pieces: neither changes where
tokens that were not chosen are gone. Of BPE what a token is merged from stays too.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

_IDS = '_token_id'  # how keys end whose values are ids


def with_parts(tokens: Collection[str], vocabulary: Collection[str]) -> set[str]:
  """The tokens, and all that two tokens of the vocabulary are joined to on the way to them."""
  found: set[str] = set()
  waiting = list(tokens)
  while waiting:
    token = waiting.pop()
    if token in found:
      continue
    found.add(token)
    for cut in range(1, len(token)):
      parts = token[:cut], token[cut:]
      if all(part in vocabulary for part in parts):
        waiting += parts
  return found


def tokenizer_json(
  description: Mapping[str, Any], used: Collection[int]
) -> tuple[dict[str, Any], list[int]]:
  """A tokenizer.json with some tokens, and their former ids in the order of the new ones.

  Args:
    description: tokenizer.json.
    used: ids that are needed. Single characters and bytes, special and added tokens stay as well.

  Raises:
    ValueError: a kind of model that is not known.
  """
  model = dict(description['model'])
  kind = model.get('type') or ('Unigram' if 'unk_id' in model else 'BPE')
  added = description.get('added_tokens') or []
  if kind == 'Unigram':
    pieces = [piece for piece, _ in model['vocab']]
    ids = {piece: number for number, piece in enumerate(pieces)}
  elif kind in ('WordPiece', 'BPE'):
    ids = dict(model['vocab'])
  else:
    raise ValueError(
      f'a vocabulary of the kind {kind} cannot be pruned; WordPiece, BPE, Unigram can.'
    )
  needed = {token for token, number in ids.items() if number in used or _short(token)}
  needed |= {token['content'] for token in added} & ids.keys()
  if model.get('unk_token') in ids:
    needed.add(model['unk_token'])
  if kind == 'BPE':
    needed = with_parts(needed, ids)
  if kind == 'Unigram' and model.get('unk_id') is not None:
    needed.add(pieces[model['unk_id']])
  kept = {ids[token] for token in needed} | {token['id'] for token in added}
  order = sorted(kept)
  new = {old: number for number, old in enumerate(order)}
  if kind == 'Unigram':
    if any(old >= len(pieces) for old in order[: len(needed)]):
      raise ValueError(
        'a Unigram vocabulary with added tokens between its pieces cannot be pruned.'
      )
    model['vocab'] = [entry for number, entry in enumerate(model['vocab']) if number in kept]
    if model.get('unk_id') is not None:
      model['unk_id'] = new[model['unk_id']]
  else:
    model['vocab'] = {token: new[number] for token, number in ids.items() if number in kept}
  if kind == 'BPE':
    model['merges'] = [merge for merge in model['merges'] if _merged(merge) <= needed]
  changed = dict(description) | {
    'model': model,
    'added_tokens': [token | {'id': new[token['id']]} for token in added],
    'post_processor': _processor(description.get('post_processor'), new),
  }
  return changed, order


def special_ids(config: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
  """A config.json, or a tokenizer_config.json, with the new ids; one that is gone is left out."""
  new = {old: number for number, old in enumerate(order)}
  changed = {}
  for key, value in config.items():
    if key == 'added_tokens_decoder':
      changed[key] = {str(new[int(old)]): said for old, said in value.items() if int(old) in new}
    elif key.endswith(_IDS) and isinstance(value, list):
      changed[key] = [new[old] for old in value if old in new]
    elif key.endswith(_IDS) and value is not None:
      changed |= {key: new[value]} if value in new else {}
    else:
      changed[key] = value
  return changed


def sentencepiece_model(model: bytes, used: Collection[int]) -> tuple[bytes, list[int]]:
  """A SentencePiece model with some pieces, and their former ids in the order of the new ones.

  Args:
    model: serialised.
    used: ids that are needed. Single characters, bytes and special pieces stay as well.
  """
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
  ordinary = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
  needed = {token for token in ordinary if ids[token] in used or len(token) == 1}
  if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
    needed = with_parts(needed, ordinary)
  kept = [p for p in proto.pieces if p.type != p.NORMAL or p.piece in needed]
  order = sorted(ids[piece.piece] for piece in kept)
  del proto.pieces[:]
  proto.pieces.extend(sorted(kept, key=lambda piece: ids[piece.piece]))
  new = {old: number for number, old in enumerate(order)}
  spec = proto.trainer_spec
  for name in ('unk_id', 'bos_id', 'eos_id', 'pad_id'):
    if getattr(spec, name) >= 0:
      setattr(spec, name, new.get(getattr(spec, name), -1))
  spec.vocab_size = len(order)
  return proto.SerializeToString(), order


def _short(token: str) -> bool:
  """Whether a token is one character, a piece of WordPiece of one, or a byte."""
  bare = token.removeprefix('##')
  return len(bare) == 1 or len(token) == 6 and token.startswith('<0x') and token.endswith('>')


def _merged(merge: str | Sequence[str]) -> set[str]:
  """A merge of tokenizer.json, 'a b' or ['a', 'b']: its parts and what it makes."""
  left, right = merge.split(' ') if isinstance(merge, str) else merge
  return {left, right, left + right}


def _processor(processor: Any, new: Mapping[int, int]) -> Any:
  """What stands around a text, with the new ids."""
  if not isinstance(processor, dict):
    return processor
  changed = dict(processor)
  if 'processors' in changed:
    changed['processors'] = [_processor(part, new) for part in changed['processors']]
  for name in ('sep', 'cls'):
    if isinstance(changed.get(name), list):
      changed[name] = [changed[name][0], new[changed[name][1]]]
  if isinstance(changed.get('special_tokens'), dict):
    changed['special_tokens'] = {
      text: said | {'ids': [new[old] for old in said['ids']]}
      for text, said in changed['special_tokens'].items()
    }
  return changed
