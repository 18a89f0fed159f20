"""The kernels and tables that get another form: linear maps of the layers, and the two ends of the
vocabulary.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from llm_jax.core.contracts import Scheme
from llm_jax.core.params import Info


def of_model(infos: Mapping[str, Info], vocabulary: bool = True) -> list[str]:
  """The paths of the kernels of the layers, and with `vocabulary` of the token table and of a
  projection of its own; heads stay as they are.
  """
  return [path for path, info in infos.items() if _in_layers(info) or vocabulary and is_end(info)]


def is_end(info: Info) -> bool:
  """Whether it is a token table, or a projection on the vocabulary."""
  return info.formable and 'vocab' in info.names


def fitting(
  scheme: Scheme, paths: Iterable[str], infos: Mapping[str, Info], shapes: Mapping[str, Any]
) -> dict[str, Scheme]:
  """The scheme for each path that it fits.

  Raises:
    ValueError: it fits none of them.
  """
  found, reason = {}, 'the model has none'
  for path in paths:
    refused = scheme.fits(shapes[path].shape, infos[path])
    if refused is None:
      found[path] = scheme
      continue
    reason = f'{path}: {refused}'
    logging.log_first_n(logging.INFO, '%s stays as it is: %s.', 20, path, refused)
  if not found:
    raise ValueError(f'config.compress finds no kernel that it can change ({reason}).')
  return found


def without(paths: Iterable[str], keep: Sequence[str]) -> list[str]:
  """The paths that no pattern of `keep` is found in.

  Raises:
    ValueError: a pattern that is none, or is found in no path; no path that is left.
  """
  paths = list(paths)
  for pattern in keep:
    try:
      found = any(re.search(pattern, path) for path in paths)
    except re.error as error:
      raise ValueError(
        f'config.compress.keep: {pattern!r} is no regular expression ({error}).'
      ) from None
    if not found:
      shown = '\n  '.join(paths[:20])
      raise ValueError(f'config.compress.keep: {pattern!r} is found in no path of\n  {shown}')
  left = [path for path in paths if not any(re.search(pattern, path) for pattern in keep)]
  if not left:
    raise ValueError(f'config.compress.keep={tuple(keep)} leaves nothing to change.')
  return left


def check_positive(name: str, value: int | None) -> None:
  """Raises ValueError unless an option is None or a number of at least 1."""
  if value is not None and value < 1:
    raise ValueError(f'config.compress.{name}={value} must be at least 1.')


def _in_layers(info: Info) -> bool:
  return info.formable and info.layer is not None and info.layer >= 0
