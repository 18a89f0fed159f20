"""What the folder of a sentence-transformers model (sbert.net) says beside its weights: how the
vector of a text is made, and how long a text may be; read and written.
"""

import json
import os
from typing import Any, NamedTuple

from llm_jax.hf import safetensors

MODULES = 'modules.json'
_OPTIONS = 'sentence_bert_config.json'
_POOLS = {
  'pooling_mode_cls_token': 'cls',
  'pooling_mode_mean_tokens': 'mean',
  'pooling_mode_lasttoken': 'last',
}


class Sentences(NamedTuple):
  """How a folder makes vectors.

  Attributes:
    pool: one of `nn.heads.POOLS`.
    normalize: whether vectors have length 1.
    lower: whether texts are written in small letters first.
  """

  pool: str
  normalize: bool
  lower: bool


def read(path: str | os.PathLike[str]) -> Sentences | None:
  """What a folder says; None where it is no such folder.

  Raises:
    ValueError: a module or a way of pooling that is not supported.
  """
  modules = _json(os.path.join(path, MODULES))
  if modules is None:
    return None
  folders = {str(module['type']).rpartition('.')[2]: module['path'] for module in modules}
  unknown = sorted(set(folders) - {'Transformer', 'Pooling', 'Normalize'})
  if unknown or folders.get('Transformer'):
    what = ', '.join(unknown) or 'a Transformer in a folder of its own'
    raise ValueError(
      f'{os.path.join(path, MODULES)}: {what} is not supported; only a Transformer in this folder, '
      'Pooling and Normalize are.'
    )
  return Sentences(
    pool=_pool(os.path.join(path, folders.get('Pooling', ''), 'config.json')),
    normalize='Normalize' in folders,
    lower=bool((_json(os.path.join(path, _OPTIONS)) or {}).get('do_lower_case', False)),
  )


def write(path: str | os.PathLike[str], pool: str, dim: int, max_len: int) -> None:
  """Writes beside the weights of a model what sentence-transformers needs to make its vectors, of
  length 1.

  Args:
    path: the folder.
    pool: one of `nn.heads.POOLS`.
    dim: how long a vector is.
    max_len: tokens of a text, special ones included.
  """
  chosen = next(mode for mode, name in _POOLS.items() if name == pool)
  kinds = {'Transformer': '', 'Pooling': '1_Pooling', 'Normalize': '2_Normalize'}
  modules = [
    {'idx': i, 'name': str(i), 'path': folder, 'type': f'sentence_transformers.models.{kind}'}
    for i, (kind, folder) in enumerate(kinds.items())
  ]
  modes = {mode: mode == chosen for mode in _POOLS}
  for name, value in (
    (MODULES, modules),
    (_OPTIONS, {'max_seq_length': max_len, 'do_lower_case': False}),
    (os.path.join('1_Pooling', 'config.json'), {'word_embedding_dimension': dim, **modes}),
  ):
    file = os.path.join(path, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, 'w') as stream:
      json.dump(value, stream, indent=2)
      stream.write('\n')


def max_len(path: str | os.PathLike[str]) -> int | None:
  """Tokens of a text, special ones included; None where the folder does not say."""
  return (_json(os.path.join(path, _OPTIONS)) or {}).get('max_seq_length')


def _pool(file: str) -> str:
  config = _json(file) or {}
  modes = [key for key, on in config.items() if key.startswith('pooling_mode_') and on is True]
  if len(modes) != 1 or modes[0] not in _POOLS:
    raise ValueError(
      f'{file}: pooling by {" and ".join(modes) or "nothing"} is not supported; one of '
      f'{", ".join(_POOLS)} is.'
    )
  return _POOLS[modes[0]]


def _json(file: str) -> Any:
  return safetensors.read_json(file) if os.path.isfile(file) else None
