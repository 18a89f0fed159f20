"""Families of Hugging Face's models that ours hold, one file per family.

A file defines `MODEL`, the name of our model, and `FAMILIES`, a `family.Family` by `model_type`.
A model of the user's own has such a dictionary, `HF_FAMILIES`, in its own module.
"""

import functools
import importlib
import pkgutil
import types

from llm_jax.hf.family import Families, Family


def known(
  model_name: str | None = None, module: types.ModuleType | None = None
) -> dict[str, tuple[str, Family]]:
  """What each `model_type` is, in the order of rank: (our model's name, family).

  Args:
    model_name: the name in the config of a model of the user's own.
    module: its module. The families in its `HF_FAMILIES`, if it has any, are held by this model,
      even where a shipped family has the same `model_type`.
  """
  found = dict(_shipped())
  if module is not None:
    name = model_name or module.__name__
    own: dict[str, Family] = getattr(module, 'HF_FAMILIES', {})
    found |= {kind: (name, family) for kind, family in own.items()}
  return dict(sorted(found.items(), key=lambda item: (item[1][1].rank, item[0])))


@functools.cache
def _shipped() -> Families:
  found: dict[str, tuple[str, Family]] = {}
  for file in pkgutil.iter_modules(__path__):
    if not file.name.startswith('_'):
      module = importlib.import_module(f'{__name__}.{file.name}')
      found |= {kind: (module.MODEL, family) for kind, family in module.FAMILIES.items()}
  return found
