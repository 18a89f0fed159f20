"""Which of a config's two recipes a run takes: the one for weights that it starts from, or the one
from scratch.

A config file sets the recipe from scratch in its sections. What it sets otherwise for pretrained
weights stands in a section `pretrained` with the same keys, which is laid over the others where
`config.init_from` is given. A run that was trained by the optimizer of the recipe from scratch goes
on by that one: weights that Muon trained, AdamW fine-tunes badly. Flags go before all of them.
"""

import json
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from absl import logging


def chosen(settings: Mapping[str, Any], overrides: Collection[str]) -> dict[str, Any]:
  """The settings with the recipe that the run takes, and without the section `pretrained`.

  Args:
    settings: the config as nested dictionaries, flags included.
    overrides: the options that flags set: 'optimizer.name'.
  """
  settings = dict(settings)
  recipe = settings.pop('pretrained', None)
  if not recipe:
    return settings
  why_not = _from_scratch(settings)
  if why_not:
    logging.info('Recipe: from scratch, for %s.', why_not)
    return settings
  taken = {path: value for path, value in _leaves(recipe) if path not in overrides}
  for path, value in taken.items():
    _put(settings, path.split('.'), value)
  shown = ', '.join(f'{path}={value}' for path, value in taken.items() if value is not None)
  logging.info('Recipe: for pretrained weights (%s), for config.init_from is set.', shown)
  return settings


def _from_scratch(settings: Mapping[str, Any]) -> str:
  """Why the recipe from scratch is the right one; an empty string where it is not."""
  if not settings.get('init_from'):
    return 'config.init_from is not set'
  path = pathlib.Path(settings['init_from']).expanduser() / 'config.json'
  try:
    origin = json.loads(path.read_text())['optimizer']['name']
  except (OSError, ValueError, KeyError):  # no run: whoever reads the folder says what is wrong
    return ''
  ours = settings['optimizer'].get('name')
  return (
    f'the run of config.init_from was trained by its optimizer, {ours}' if origin == ours else ''
  )


def _leaves(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _put(settings: dict[str, Any], keys: list[str], value: Any) -> None:
  *sections, last = keys
  for key in sections:
    inner = settings[key] = dict(settings[key])
    settings = inner
  settings[last] = value
