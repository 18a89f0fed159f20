"""Values of a config.json, checked as they are read: single keys, activations, rotary positions."""

import math
from collections.abc import Mapping
from typing import Any

ACTIVATIONS = {
  'gelu': 'gelu',
  'gelu_python': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'relu': 'relu',
  'silu': 'silu',
  'swish': 'silu',
}
"""Their names of activations -> ours. The first name of each is the one that is written."""

_WANTED = {
  bool: 'true or false',
  int: 'a whole number, at least 1',
  float: 'a number, at least 0',
}
_LENGTH = 'original_max_position_embeddings'
_SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', _LENGTH)

Kind = type | Mapping[str, str]  # bool, int, float, or their value -> ours


def field(config: Mapping[str, Any], key: str, kind: Kind, *default: Any) -> Any:
  """The value of a key, as `kind` wants it.

  Args:
    config: a config.json.
    key: of the value.
    kind: int (at least 1), float (at least 0), bool, or a table of the values that are supported.
    default: what a key that is left out stands for; without one the key must be there. A default
      of None allows null.

  Raises:
    ValueError: the key is missing, or its value is not of this kind.
  """
  if key not in config and not default:
    raise ValueError(f'{key} is missing.')
  value = config.get(key, *default)
  if value is None and default == (None,):
    return None
  if isinstance(kind, Mapping):
    if not isinstance(value, str) or value not in kind:
      raise ValueError(f'{key}={value!r} is not supported; supported: {", ".join(kind)}.')
    return kind[value]
  if kind is bool and isinstance(value, bool):
    return value
  if kind is int and type(value) is int and 1 <= value < 2**31:
    return value
  if kind is float and type(value) in (int, float) and 0 <= value < math.inf:
    return float(value)
  raise ValueError(f'{key}={value!r} must be {_WANTED[kind]}.')


def rope(config: Mapping[str, Any], theta: Any) -> tuple[float, tuple[float, ...] | None]:
  """Base and scaling of rotary positions.

  Args:
    config: with them in the spelling of transformers 5 (`rope_parameters`) or 4 (`rope_scaling`).
    theta: the base where these keys do not give one.

  Raises:
    ValueError: a kind of rotation other than 'default', 'linear' and 'llama3', or a rotation of
      only a part of the dimensions.
  """
  given = config.get('rope_parameters') or config.get('rope_scaling') or {}
  if not isinstance(given, dict):
    raise ValueError(f'rope_parameters={given!r} must be a dictionary.')
  part = given.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0))
  if part not in (None, 1.0):
    raise ValueError(f'partial_rotary_factor={part!r} is not supported; only 1.0 is.')
  base = field(given, 'rope_theta', float, theta)
  if base is None or base < 1:
    raise ValueError(f'rope_theta={base} must be at least 1.')
  kind = given.get('rope_type', given.get('type', 'default'))
  return base, _scaling(config, given, kind)


def rope_scaling(scaling: tuple[float, ...] | None) -> dict[str, Any] | None:
  """A scaling as a config.json gives it, in the spelling that transformers 4 and 5 both read."""
  if scaling is None:
    return None
  values = dict(zip(_SCALING, scaling, strict=False))
  if len(scaling) == 1:
    return {'rope_type': 'linear', 'type': 'linear', **values}
  return {'rope_type': 'llama3', **values, _LENGTH: int(values[_LENGTH])}


def _scaling(
  config: Mapping[str, Any], given: Mapping[str, Any], kind: Any
) -> tuple[float, ...] | None:
  if kind == 'default':
    return None
  if kind == 'linear':
    scaling = (field(given, 'factor', float),)
  elif kind == 'llama3':
    # The length stands beside the factors, else at the top level, else it is that of the model.
    length = {_LENGTH: config.get('max_position_embeddings')}
    if _LENGTH in config:
      length[_LENGTH] = config[_LENGTH]
    factors = [field(given, key, float) for key in _SCALING[:3]]
    scaling = (*factors, float(field(length | given, _LENGTH, int)))
  else:
    raise ValueError(f'rope_type={kind!r} is not supported; supported: default, linear, llama3.')
  if scaling[0] < 1:
    raise ValueError(f'the factor of rope_type={kind!r} is {scaling[0]}; it must be at least 1.')
  return scaling
