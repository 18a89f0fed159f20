"""Which linear maps an adapter acts on, and which heads are trained beside it.

A pattern is a regular expression for the end of a module's path, whole components: 'query|value'
matches `model/stack/layers/block/attention/query`, 'mlp/.*' all maps of each mlp, '.*' all. Heads
(`heads_<name>`) are trained as they are or not at all.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn

from llm_jax.core.params import Info
from llm_jax.nn.linear import Linear

# The masked-LM head is as pretrained as the model; all others belong to a task.
TASK_HEADS = '(?!mlm$).*'
_MODEL, _HEAD = 'model/', 'heads_'


class Heads:
  """The heads that are trained.

  Args:
    pattern: of their names; '' for none; None for all but the masked-LM head.

  Raises:
    ValueError: no regular expression.
  """

  def __init__(self, pattern: str | None):
    check_pattern('heads', pattern or '')
    self.pattern = pattern

  def __contains__(self, path: str) -> bool:
    """Whether a parameter belongs to one of them."""
    name = path.split('/')[0]
    pattern = TASK_HEADS if self.pattern is None else self.pattern
    return name.startswith(_HEAD) and bool(re.fullmatch(pattern, name.removeprefix(_HEAD)))

  def check(self, base: Collection[str]) -> None:
    """Raises ValueError where a pattern that was given matches no head."""
    if not self.pattern or any(path in self for path in base):
      return
    names = {path.split('/')[0] for path in base}
    known = sorted(name.removeprefix(_HEAD) for name in names if name.startswith(_HEAD))
    raise ValueError(
      f'config.adapter.heads={self.pattern!r} matches no head; there are: '
      f'{", ".join(known) or "none"}.'
    )


def linear(context: nn.module.InterceptorContext, pattern: str) -> Linear | None:
  """The linear map of the model that is being called, if the pattern matches it."""
  module = context.module
  called = isinstance(module, Linear) and context.method_name == '__call__'
  return module if called and matches(pattern, '/'.join(module.path)) else None


def matches(pattern: str, path: str) -> bool:
  """Whether a pattern matches a module of the model."""
  return path.startswith(_MODEL) and bool(re.fullmatch(f'(?:.*/)?(?:{pattern})', path))


def check_pattern(option: str, pattern: str) -> None:
  """Raises ValueError unless the value of an option is a regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f'config.adapter.{option}={pattern!r} is no regular expression: {error}.'
    ) from None


def check_found(
  option: str, pattern: str, infos: Mapping[str, Info], base: Collection[str]
) -> None:
  """Raises ValueError, with the nearest paths, where a pattern matches no linear map."""
  maps = [path.removesuffix('/kernel') for path in base if _is_map(path, infos[path])]
  if any(matches(pattern, path) for path in maps):
    return

  def likeness(path: str) -> float:
    ends = [path.split('/', count)[-1] for count in range(path.count('/') + 1)]
    return max(difflib.SequenceMatcher(None, pattern, end).ratio() for end in ends)

  near = sorted(maps, key=likeness, reverse=True)[:3]
  names = sorted({path.split('/')[-1] for path in maps})
  raise ValueError(
    f'config.adapter.{option}={pattern!r} matches no linear map of this model; nearest: '
    f'{", ".join(near) or "there are none"}; names: {", ".join(names) or "none"}.'
  )


def softmax_hides(path: str) -> str | None:
  """Why a key's bias may have no gradient: it adds the same to all scores of a query, where
  positions are not rotary.
  """
  return 'softmax hides it' if path.endswith('/attention/key/bias') else None


def check_rate(option: str, value: float) -> None:
  """Raises ValueError for a rate that is not at least 0 and below 1."""
  if not 0.0 <= value < 1.0:
    raise ValueError(f'config.adapter.{option}={value} must be at least 0 and below 1.')


def modules(params: Mapping[str, Any], name: str) -> list[str]:
  """The paths of the modules that have a parameter of this name.

  Args:
    params: by path.
    name: the last component.
  """
  return [path.removesuffix(f'/{name}') for path in params if path.endswith(f'/{name}')]


def check_dense(params: Mapping[str, Any], path: str) -> None:
  """Raises ValueError unless a kernel is there as an array, which can be multiplied into."""
  if path not in params:
    raise ValueError(
      f'{path} is no array, but a weight form; an adapter is merged into dense kernels only.'
    )


def _is_map(path: str, info: Info) -> bool:
  """Whether a parameter is the kernel of a `Linear` of the model, not its output vocabulary."""
  kernel = path.startswith(_MODEL) and path.endswith('/kernel')
  return kernel and bool(info.inputs) and 'vocab' not in info.names
