"""The config as the program reads it: one dataclass for the top level, plain dictionaries for the
sections.

A section is a constructor call: `config.model` is the keyword arguments of the model, and so on;
  `llm_jax.programs.build` checks each
against the signature it is meant for. This module checks the top level, and what may change between
two runs of one workdir.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from llm_jax.core import plugins

# What a resumed run must share with the run that it continues. The rest (steps, intervals, rates,
# mesh) may change.
IDENTITY = ('model', 'data', 'tokenizer', 'objective', 'seq_len', 'seed', 'optimizer.name')
# which says it all
INIT_FROM = ', or --config.init_from=FOLDER, the folder of a run or of a Hugging Face model'
NOT_IDENTITY = (
  'data.cache',
  'data.workers',
  'model.dtype',
  'model.remat',
  'model.unroll',
  'model.attention',
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """When to save (every so many steps, and at the end) and how many of the newest to keep beside
  the best one.
  """

  every: int = 1000
  keep: int = 2


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What happens at an evaluation.

  Attributes:
    rows: how many rows of the validation set to use; 0 for all.
    patience: after how many evaluations without a better loss to stop; 0 for never.
    samples: how many texts a decoder shows, in the log and in samples.txt; 0 for none.
  """

  rows: int = 512
  patience: int = 0
  samples: int = 2


@dataclasses.dataclass(frozen=True)
class Logging:
  """Where numbers go besides metrics.jsonl: TensorBoard events, and a Weights & Biases project
  (extra `wandb`).
  """

  tensorboard: bool = True
  wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class Profile:
  """What is traced: `steps` steps (0 for none), after the first `start` of the whole run."""

  start: int = 0
  steps: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """The top level of a config file. `batch_size` is global: sequences an optimizer step, over all
  hosts and micro-batches.

  Where `init_from` is given, `pretrained.complete` fills in `seq_len` and the sections without a
  name.
  """

  steps: int
  batch_size: int
  data: dict
  tokenizer: dict
  model: dict
  objective: dict
  optimizer: dict
  seq_len: int | None = None
  seed: int = 0
  micro_batches: int | None = None
  log_every: int = 10
  eval_every: int = 500
  init_from: str | None = None
  mesh: dict = dataclasses.field(default_factory=dict)
  checkpoint: Checkpoint = Checkpoint()
  evaluation: Evaluation = Evaluation()
  logging: Logging = Logging()
  profile: Profile = Profile()

  def __post_init__(self):
    for name in ('steps', 'batch_size', 'seq_len', 'micro_batches', 'log_every', 'eval_every'):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ValueError(f'config.{name}={getattr(self, name)} must be at least 1.')
    if self.checkpoint.every < 1 or self.checkpoint.keep < 1:
      raise ValueError(
        f'config.checkpoint needs every and keep of at least 1, not {self.checkpoint}.'
      )
    for section in (
      'data',
      'optimizer',
      *(() if self.init_from else ('tokenizer', 'model', 'objective')),
    ):
      need = 'source' if section == 'data' else 'name'
      if not getattr(self, section).get(need):
        raise ValueError(
          f'config.{section} needs a {need!r}'
          + INIT_FROM * (section not in ('data', 'optimizer'))
          + '.'
        )
    if self.seq_len is None and not self.init_from:
      raise ValueError(f'config.seq_len must be given, the tokens of a row{INIT_FROM}.')
    if self.micro_batches and self.batch_size % self.micro_batches:
      raise ValueError(
        f'config.batch_size={self.batch_size} must divide by micro_batches={self.micro_batches}; '
        f'try {-(-self.batch_size // self.micro_batches) * self.micro_batches}.'
      )
    if (self.data.get('workers') or 0) < 0:
      raise ValueError(
        f'config.data.workers={self.data["workers"]} must be at least 1, or 0 for one process a '
        'core.'
      )
    share = self.data.get('validation')
    if not isinstance(share, int | float) or not 0 <= share < 1:
      raise ValueError(
        f'config.data.validation={share} must be the share of the documents to hold out, at least '
        '0 and below 1.'
      )
    if (
      self.seed < 0
      or min(self.evaluation.rows, self.evaluation.patience, self.evaluation.samples) < 0
    ):
      raise ValueError(f'config.seed={self.seed} and {self.evaluation} must not be negative.')
    if min(self.profile.start, self.profile.steps) < 0:
      raise ValueError(
        f'config.profile needs start and steps of at least 0, not {self.profile}; steps=0 is for '
        'no profile.'
      )


def parse(tree: Mapping[str, Any]) -> Config:
  """Makes a Config of nested dictionaries (an ml_collections ConfigDict's `to_dict()`, or
  `config.json`), checked.
  """
  tree = dict(tree)
  for name, section in (
    ('checkpoint', Checkpoint),
    ('evaluation', Evaluation),
    ('logging', Logging),
    ('profile', Profile),
  ):
    if name in tree:
      tree[name] = plugins.construct(name, section, tree[name])
  return plugins.construct('', Config, tree)


def to_json(config: Config) -> str:
  """The config as JSON, options that are None left out."""
  return json.dumps(_without_none(dataclasses.asdict(config)), indent=2, sort_keys=True)


def from_json(text: str) -> Config:
  """Reads what `to_json` wrote."""
  return parse(json.loads(text))


def differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
  """Keys in which two configs differ: those that make it another run, and those that may change on
  resuming.

  Each entry reads 'model.dim: 128 -> 256'. Tuples and lists are the same thing, as JSON has it.
  """
  before, after = (
    {path: value for path, value in _leaves(json.loads(to_json(c)))} for c in (old, new)
  )
  forbidden, allowed = [], []
  for path in sorted(before.keys() | after.keys()):
    if before.get(path) == after.get(path):
      continue
    matters = _under(path, IDENTITY) and not _under(path, NOT_IDENTITY)
    (forbidden if matters else allowed).append(
      f'{path}: {before.get(path)!r} -> {after.get(path)!r}'
    )
  return forbidden, allowed


def _under(path: str, keys: tuple[str, ...]) -> bool:
  return any(path == key or path.startswith(f'{key}.') for key in keys)


def _leaves(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _without_none(tree: Any) -> Any:
  if isinstance(tree, Mapping):
    return {k: _without_none(v) for k, v in tree.items() if v is not None}
  return tree
