"""Open sets (models, objectives, sources, tokenizers, ...) are found by module path; nothing
registers itself.

`load('objective', 'mlm')` imports `llm_jax.objectives.mlm`; a name with a dot is the path of a
module of the user's own. A config section holds the keyword arguments of the class found there,
checked against its signature before anything is compiled.
"""

import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

# Kind -> the package of the modules that ship, and the name that each of them defines.
KINDS = {
  'model': ('llm_jax.models', 'Model'),
  'objective': ('llm_jax.objectives', 'Objective'),
  'source': ('llm_jax.data.sources', 'Source'),
  'tokenizer': ('llm_jax.data.tokenizers', 'create'),
  'adapter': ('llm_jax.adapters', 'Adapter'),
  'compress': ('llm_jax.compress', 'Compression'),
  'evaluator': ('llm_jax.evaluators', 'Evaluator'),
  'hook': ('llm_jax.training.hooks', 'Hook'),
  'mode': ('llm_jax.modes', 'run'),
}
_FLAX_OWN = ('parent', 'name')  # fields that every Linen module has
_Made = TypeVar('_Made')


def load(kind: str, name: str) -> types.ModuleType:
  """The module that implements `name`.

  Raises:
    ValueError: an unknown name, with the known ones and the nearest.
  """
  package, defines = KINDS[kind]
  if '.' in name:
    return importlib.import_module(name)
  known = names(kind)
  if name not in known:
    raise ValueError(
      f'{kind} {name!r} is not known{nearest(name, known)}; known: {", ".join(known)}; '
      f'or give the dotted path of a module that defines {defines}.'
    )
  return importlib.import_module(f'{package}.{name}')


def names(kind: str) -> list[str]:
  """The names of one kind that ship with the package, sorted."""
  package = importlib.import_module(KINDS[kind][0])
  found = [module for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
  return sorted(module.name for module in found if not module.name.startswith('_'))


def said(plug_in: object) -> str:
  """What a config calls a plug-in that was made: 'mlm', or the path of the user's own module."""
  module = type(plug_in).__module__
  return module.rpartition('.')[2] if module.split('.')[0] == 'llm_jax' else module


def construct(
  section: str, factory: Callable[..., _Made], options: Mapping[str, Any], **given: Any
) -> _Made:
  """Calls `factory(**options, **given)` after checking each option's name and type against its
  signature.

  Args:
    section: where the options stand in the config, for messages: 'objective'; '' for the top level.
    factory: a class or function; its annotations are the allowed types.
    options: the config section without its `name`; an option that is None is left to the factory's
      default.
    **given: arguments from the program, not from the user; those that the factory does not take
      are left out.

  Raises:
    ValueError: an option that the factory does not take (with the nearest that it does), or a
      required one missing.
    TypeError: an option of the wrong type.
  """
  checked = check(section, factory, options, given)
  parameters = signature(factory)
  taken = {name: value for name, value in given.items() if name in parameters}
  return factory(**checked, **taken)


def check(
  section: str,
  factory: Callable[..., Any],
  options: Mapping[str, Any],
  given: Iterable[str] = (),
) -> dict[str, Any]:
  """The options that are set, in the types that `factory` wants; calls nothing.

  Raises:
    ValueError, TypeError: as `construct`.
  """
  where, given = path_of(section), set(given)
  parameters = {name: p for name, p in signature(factory).items() if name not in given}
  chosen = {name: value for name, value in options.items() if value is not None}
  check_names(where, chosen, parameters)
  required = [name for name, p in parameters.items() if p.default is p.empty]
  missing = [name for name in required if name not in chosen]
  if missing:
    raise ValueError(f'{where} needs {", ".join(missing)}.')
  hints = _type_hints(factory)
  return {
    name: coerce(f'{where}.{name}', value, hints.get(name, Any)) for name, value in chosen.items()
  }


def signature(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
  """The named parameters of a class or function; of a Linen module without Flax's own."""
  parameters = dict(inspect.signature(factory).parameters)
  if 'parent' not in parameters:
    return parameters
  return {name: p for name, p in parameters.items() if name not in _FLAX_OWN}


def path_of(section: str) -> str:
  """'config.objective' for 'objective', 'config' for the top level."""
  return f'config.{section}' if section else 'config'


def check_names(where: str, given: Iterable[str], allowed: Iterable[str]) -> None:
  """Raises ValueError for the first name that is not allowed, with the nearest that is."""
  allowed = sorted(allowed)
  for name in given:
    if name not in allowed:
      raise ValueError(
        f'{where}.{name} is not an option{nearest(name, allowed)}; '
        f'allowed: {", ".join(allowed) or "none"}.'
      )


def coerce(where: str, value: Any, hint: Any) -> Any:
  """`value` as the annotation `hint` wants it: an int becomes a float, a list a tuple.

  Args:
    where: the option's path, for the message.
    value: as the config has it.
    hint: a type, a union, a generic alias; anything else is not checked.

  Raises:
    TypeError: the value is of another type.
  """
  origin = typing.get_origin(hint)
  if hint is Any:
    return value
  if origin in (typing.Union, types.UnionType):
    return _coerce_to_one(where, value, hint)
  if origin is tuple or hint is tuple:
    return tuple(value) if isinstance(value, list | tuple) else _refuse(where, value, hint)
  if hint is float and _is_int(value):
    return float(value)
  kind = origin or hint
  if not isinstance(kind, type):  # nothing that isinstance can check
    return value
  if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
    return value
  _refuse(where, value, hint)


def nearest(name: str, known: Iterable[str]) -> str:
  """A half sentence with the nearest known name, or '' where none is near."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f' (did you mean {close[0]!r}?)' if close else ''


def _type_hints(factory: Callable[..., Any]) -> dict[str, Any]:
  hints = typing.get_type_hints(factory)
  if inspect.isclass(factory):
    hints |= typing.get_type_hints(factory.__init__)
  return hints


def _coerce_to_one(where: str, value: Any, union: Any) -> Any:
  for hint in typing.get_args(union):
    try:
      return coerce(where, value, hint)
    except TypeError:
      continue
  _refuse(where, value, union)


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _refuse(where: str, value: Any, hint: Any) -> NoReturn:
  wanted = getattr(hint, '__name__', hint)
  raise TypeError(f'{where}={value!r} is of type {type(value).__name__}; it must be {wanted}.')
