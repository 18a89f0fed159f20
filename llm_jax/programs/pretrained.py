"""What a run starts from, `config.init_from`: another run's folder, or a Hugging Face folder.

Such a folder says what its model is, so a config need not: `complete` fills in what the config
  leaves open.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from llm_jax.core.config import Config
from llm_jax.core.contracts import Tokenizer
from llm_jax.hf import folders as hf
from llm_jax.hf.family import NUMBERS
from llm_jax.parallel import hosts
from llm_jax.programs import build
from llm_jax.programs import checkpoints as checkpoint
from llm_jax.programs import workdir as runs
from llm_jax.programs.build import Program
from llm_jax.programs.checkpoints import Loaded

SEQ_LEN = 512  # where neither the config nor the model's own limit says less
OBJECTIVES = {'encoder': 'mlm', 'decoder': 'clm'}


def complete(config: Config, workdir: pathlib.Path | None = None) -> Config:
  """The config with what `init_from` decides filled in.

  A Hugging Face folder decides the model's shape: a variant that the config names gives way to it,
  an option that the config sets to something else is an error. A run's folder fills a model section
  without a name. Both bring their tokenizer, fill an objective without a name, and a row length
  that is not set.

  Args:
    config: as it is read from a file.
    workdir: where to train. A run that goes on there has all of this itself, and its `init_from`
      may be gone.

  Raises:
    ValueError: a folder that is neither; an option that contradicts it.
  """
  if config.init_from:
    folder = pathlib.Path(config.init_from).expanduser().absolute()
    config = dataclasses.replace(config, init_from=str(folder))
    if workdir is not None and hosts.agree(lambda: runs.has_checkpoints(workdir)):
      config = _going_on(config, runs.read_config(workdir))
    else:
      config = _from_hf(config, folder) if hf.is_folder(folder) else _from_run(config, folder)
  if config.seq_len is None:
    config = dataclasses.replace(
      config, seq_len=min(SEQ_LEN, config.model.get('max_len') or SEQ_LEN)
    )
  return config


def load_tokenizer(config: Config) -> Tokenizer:
  """The tokenizer that belongs to the weights of `init_from`.

  Raises:
    ValueError: none there, or one with more ids than the model has rows.
  """
  folder = pathlib.Path(config.init_from)
  if not hf.is_folder(folder):
    tokenizer = build.load_tokenizer(config, str(folder / 'tokenizer'))
  else:
    tokenizer = build.create_tokenizer(config, lambda: iter(()), '', '')
    if tokenizer.vocab_size > config.model['vocab_size']:
      raise ValueError(
        f'the tokenizer of {folder} has {tokenizer.vocab_size:,} ids, and the model only '
        f'{config.model["vocab_size"]:,} (vocab_size of its config.json): they do not belong '
        'together.'
      )
  logging.info('Tokenizer: that of %s, %s ids.', folder, f'{tokenizer.vocab_size:,}')
  return tokenizer


def load_params(program: Program, folder: pathlib.Path) -> Loaded:
  """The parameters in a folder that the program wants too, on its mesh; of a run, those of its best
  checkpoint.

  Raises:
    ValueError: nothing to load there, a parameter of another shape.
  """
  if hf.is_folder(folder):
    found = hf.load(folder, families(), program.state.params)
    return Loaded(params=found.params, new=found.new, unused=found.unused, step=None)
  return checkpoint.restore_params(folder / 'checkpoints', program.state.params)


def families() -> dict[str, tuple[str, Any]]:
  """Hugging Face's model types: the name of the model of ours that holds each, and how."""
  return {
    kind: (name, family)
    for name, module in build.model_modules().items()
    for kind, family in getattr(module, 'HF', {}).items()
  }


def _from_hf(config: Config, folder: pathlib.Path) -> Config:
  found = hf.model_options(folder, families())
  given = {key: value for key, value in config.model.items() if value is not None}
  for key in NUMBERS:
    if key in given and key in found and given[key] != found[key]:
      raise ValueError(
        f'config.model.{key}={given[key]!r} is not what {folder} has, {found[key]!r}; leave it '
        'unset.'
      )
  kept = {
    key: value
    for key, value in given.items()
    if key not in NUMBERS and key not in ('name', 'variant')
  }
  objective = (
    config.objective
    if config.objective.get('name')
    else _objective(folder, found['name']) | _set(config.objective)
  )
  return dataclasses.replace(
    config, model=found | kept, objective=objective, tokenizer={'name': 'hf', 'path': str(folder)}
  )


def _going_on(config: Config, saved: Config) -> Config:
  """The config of a run that goes on; what it sets otherwise than the run did is left in it, to be
  refused or taken.
  """
  given = _set(config.model)
  if 'variant' not in saved.model:  # it had given way to a Hugging Face folder, or there was none
    given = saved.model | {key: value for key, value in given.items() if key != 'variant'}
  return dataclasses.replace(
    config,
    model=given if given.get('name') else saved.model | given,
    tokenizer=saved.tokenizer,
    seq_len=config.seq_len or saved.seq_len,
    objective=config.objective if config.objective.get('name') else saved.objective,
  )


def _from_run(config: Config, folder: pathlib.Path) -> Config:
  if not (folder / 'config.json').exists() and not runs.has_checkpoints(folder):
    raise ValueError(
      f'config.init_from={folder} is the folder neither of a run nor of a Hugging Face model: no '
      'config.json.'
    )
  saved = runs.read_config(folder)
  return dataclasses.replace(
    config,
    tokenizer=saved.tokenizer,
    seq_len=config.seq_len or saved.seq_len,
    model=config.model if config.model.get('name') else saved.model | _set(config.model),
    objective=config.objective
    if config.objective.get('name')
    else saved.objective | _set(config.objective),
  )


def _objective(folder: pathlib.Path, model: str) -> dict[str, Any]:
  """The objective that the class of a Hugging Face checkpoint was trained for; by the model where
  it has no head.
  """
  labels = hf.labels(folder)
  if labels is None:
    return {'name': OBJECTIVES[model]}
  pool = 'cls' if model == 'encoder' else 'last'
  if len(labels) == 1:
    return {'name': 'classify', 'task': 'regression', 'pool': pool}
  several = hf.read_config(folder).get('problem_type') == 'multi_label_classification'
  return {
    'name': 'classify',
    'task': 'multilabel' if several else 'multiclass',
    'classes': labels,
    'pool': pool,
  }


def _set(section: Mapping[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in section.items() if value is not None}
