"""Open sets (models, objectives, sources, tokenizers) are found by module path; nothing registers
itself.

`load('objective', 'mlm')` imports `llm_jax.objectives.mlm`; a name with a dot is a module path of
the user's own. A config section is the keyword arguments of the class found there, checked against
its signature before anything is compiled.
"""

import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping

KINDS = {
  'model': ('llm_jax.models', 'Model'),
  'objective': ('llm_jax.objectives', 'Objective'),
  'source': ('llm_jax.data.sources', 'Source'),
  'tokenizer': ('llm_jax.data.tokenizers', 'create'),
}


def load(kind: str, name: str) -> types.ModuleType:
  """Imports the module that implements `name`, or raises ValueError listing the known names and the
  nearest.
  """
  package = KINDS[kind][0]
  if '.' in name:
    return importlib.import_module(name)
  known = names(kind)
  if name not in known:
    raise ValueError(
      f'{kind} {name!r} is not known{nearest(name, known)}; known: {", ".join(known)}; '
      f'or give the dotted path of a module that defines {KINDS[kind][1]}.'
    )
  return importlib.import_module(f'{package}.{name}')


def names(kind: str) -> list[str]:
  """The names of one kind that ship with the package, sorted."""
  package = importlib.import_module(KINDS[kind][0])
  return sorted(
    m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith('_')
  )


def construct(
  section: str, factory: typing.Callable, options: Mapping[str, typing.Any], **given
) -> typing.Any:
  """Calls `factory(**options, **given)` after checking each option's name and type against its
  signature.

  Args: section: where the options stand in the config ('objective'; '' for the top level), for the
    error message. factory: a class or function; its annotations are the allowed types. options: the
    config section without its `name`; an option that is None is left to the factory's default.
    **given: arguments from the program, not from the user; those that the factory does not take are
    left out.

  Raises: ValueError: an option that the factory does not take (with the nearest one it does), or a
    required one missing. TypeError: an option of the wrong type.
  """
  parameters = signature(factory)
  return factory(
    **check(section, factory, options, given), **{k: v for k, v in given.items() if k in parameters}
  )


def check(
  section: str,
  factory: typing.Callable,
  options: Mapping[str, typing.Any],
  given: typing.Iterable[str] = (),
) -> dict:
  """The options that are set, with the names and types that `factory` wants; raises as `construct`
  does, calls nothing.
  """
  options, parameters = {k: v for k, v in options.items() if v is not None}, signature(factory)
  check_names(path_of(section), options, [k for k in parameters if k not in given])
  missing = [
    k for k, p in parameters.items() if p.default is p.empty and k not in options and k not in given
  ]
  if missing:
    raise ValueError(f'{path_of(section)} needs {", ".join(missing)}.')
  hints = typing.get_type_hints(factory)
  if inspect.isclass(factory):
    hints |= typing.get_type_hints(factory.__init__)
  return {
    k: coerce(f'{path_of(section)}.{k}', v, hints.get(k, typing.Any)) for k, v in options.items()
  }


def signature(factory: typing.Callable) -> dict[str, inspect.Parameter]:
  """The named parameters of a class or function; of a Linen module without `parent` and `name`,
  which are Flax's own.
  """
  parameters = dict(inspect.signature(factory).parameters)
  return {
    k: p for k, p in parameters.items() if 'parent' not in parameters or k not in ('parent', 'name')
  }


def path_of(section: str) -> str:
  """'config.objective' for 'objective', 'config' for the top level."""
  return f'config.{section}' if section else 'config'


def check_names(where: str, given: typing.Iterable[str], allowed: typing.Iterable[str]) -> None:
  """Raises ValueError for the first name in `given` that is not in `allowed`, with the nearest that
  is.
  """
  allowed = sorted(allowed)
  for name in given:
    if name not in allowed:
      raise ValueError(
        f'{where}.{name} is not an option{nearest(name, allowed)}; allowed: {", ".join(allowed)}.'
      )


def coerce(where: str, value: typing.Any, hint: typing.Any) -> typing.Any:
  """Returns `value` as the annotation `hint` wants it (int to float, list to tuple), or raises
  TypeError.
  """
  origin = typing.get_origin(hint)
  if hint is typing.Any:
    return value
  if origin in (typing.Union, types.UnionType):
    for option in typing.get_args(hint):
      try:
        return coerce(where, value, option)
      except TypeError:
        continue
  elif origin is tuple or hint is tuple:
    if isinstance(value, (list, tuple)):
      return tuple(value)
  elif hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  elif origin is not None and isinstance(origin, type):
    if isinstance(value, origin):
      return value
  elif not isinstance(hint, type) or (
    isinstance(value, hint) and not (hint is int and isinstance(value, bool))
  ):
    return value
  raise TypeError(
    f'{where}={value!r} is of type {type(value).__name__}; it must be '
    f'{getattr(hint, "__name__", hint)}.'
  )


def nearest(name: str, known: typing.Iterable[str]) -> str:
  """A half sentence with the nearest known name, or nothing when none is near."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f' (did you mean {close[0]!r}?)' if close else ''
