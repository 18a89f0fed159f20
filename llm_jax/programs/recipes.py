"""Which of a config's two recipes a run takes: the one for weights that it starts from, or the one
from scratch.

A config file sets the recipe from scratch in its sections. What it sets otherwise for pretrained
weights stands in a section `pretrained` with the same keys, which is laid over the others where
`config.init_from` is given. Flags go before both.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from absl import logging

from llm_jax.core.config import Config
from llm_jax.programs import assemble

AUTO = 'auto'
# AdamW's rate for fine-tuning: 1e-4 at the width of MiniLM (arXiv:2002.10957), 3e-5 at that of
# BERT-base and 2e-5 at that of BERT-large (arXiv:1810.04805, appendix A.3), and a power between.
RATE, WIDTH, POWER, LEAST = 1e-4, 384, 1.6, 2e-5


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
  if not settings.get('init_from'):
    logging.info('Recipe: from scratch, for config.init_from is not set.')
    return settings
  taken = {path: value for path, value in _leaves(recipe) if path not in overrides}
  for path, value in taken.items():
    _put(settings, path.split('.'), value)
  shown = ', '.join(f'{path}={value}' for path, value in taken.items() if value is not None)
  logging.info('Recipe: for pretrained weights (%s), for config.init_from is set.', shown)
  return settings


def with_rate(config: Config) -> Config:
  """The config with `optimizer.learning_rate='auto'` decided by the width of its model.

  Raises:
    ValueError: the model does not say how wide it is.
  """
  if config.optimizer.get('learning_rate') != AUTO:
    return config
  dim = assemble.model_options(config, 1).get('dim')
  if dim is None:
    raise ValueError(
      "config.optimizer.learning_rate='auto' goes by config.model.dim, which this model does not "
      'have; give a number.'
    )
  rate = float(f'{max(LEAST, RATE * (WIDTH / dim) ** POWER):.1e}')
  logging.info('Learning rate: %g, for a model that is %d wide.', rate, dim)
  return dataclasses.replace(config, optimizer=config.optimizer | {'learning_rate': rate})


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
