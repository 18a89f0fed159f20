"""The config as the program reads it: one dataclass for the top level, plain dictionaries for the
sections that plug-ins define.

A section is a constructor call: `config.model` holds the keyword arguments of the model, and so on.
Whoever makes the plug-in checks its section against the signature. This module checks the top
level, and says what may change between two runs of one workdir.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from llm_jax.core import plugins, recipes
from llm_jax.core.tree import PyTree

# What a resumed run must share with the run that it continues; steps, intervals, rates and mesh may
# change.
IDENTITY = (
  'model',
  'data',
  'validation',
  'tokenizer',
  'objective',
  'adapter',
  'base_weights',
  'compress',
  'distill',
  'seq_len',
  'seed',
  'folds',
  'fold',
  'fold_groups',
  'optimizer.name',
)
NOT_IDENTITY = (
  'data.cache',
  'data.workers',
  'model.dtype',
  'model.remat',
  'model.unroll',
  'model.attention',
  'model.cache_dtype',
)

# Sections that name documents of their own, beside `data`.
SPLITS = ('validation', 'test')
# Options of a source that may change, since the documents themselves are compared.
LOCATIONS = ('path', 'data_dir')
# Options that may change, but not to or from the value that leaves out a part of the optimizer,
# whose state would then be another: option -> (default, that value).
SWITCHES = {
  'optimizer.clip_norm': (1.0, 0.0),
  'optimizer.layer_decay': (1.0, 1.0),
  'optimizer.ema_decay': (0.0, 0.0),
}

_INIT_FROM = ', or --config.init_from=FOLDER, the folder of a run or of a Hugging Face model'


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Which checkpoints there are.

  Attributes:
    every: steps between two of them; the last step is always saved.
    keep: how many of the newest are kept beside the best one.
  """

  every: int = 1000
  keep: int = 2


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What happens at an evaluation.

  Attributes:
    rows: how many rows of the validation set to use; 0 for all.
    patience: after how many evaluations without a better loss to stop; 0 for never.
    samples: how many texts a decoder writes, into the log and samples.txt; 0 for none.
    slices: fields of the records; a classifier's answers are also scored per value of each. A flag
      gives them with commas between them.
  """

  rows: int = 512
  patience: int = 0
  samples: int = 2
  slices: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    names = tuple(name for part in self.slices for name in part.split(','))
    object.__setattr__(self, 'slices', names)


@dataclasses.dataclass(frozen=True)
class Logging:
  """Where numbers go besides metrics.jsonl.

  Attributes:
    tensorboard: whether TensorBoard events are written.
    wandb: a Weights & Biases project (extra `wandb`); None for none.
  """

  tensorboard: bool = True
  wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class Profile:
  """Which steps are traced.

  Attributes:
    start: how many steps of the whole run come first.
    steps: how many are traced; 0 for none.
  """

  start: int = 0
  steps: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """The top level of a config file.

  Attributes:
    steps: optimizer steps of the whole run; where `epochs` is given, they follow from it.
    batch_size: sequences per optimizer step, over all hosts and micro-batches.
    tokenizer, model, objective: sections, each with the `name` of its plug-in.
    data, optimizer: likewise (`data`: the `source`); {} where nothing is read or trained.
    validation, test: a source each, for documents that are given beside those of `data`: what a
      section leaves open is as in `data`; {} for none.
    epochs: passes over the training rows, in place of steps.
    seq_len: tokens of a row. Where `init_from` is given, it and the sections without a name are
      filled in from there.
    seed: of parameters, data order and dropout.
    micro_batches: in how many parts a batch is run; None for as few as keep memory moderate.
    folds: in how many parts the documents are dealt out for a cross-validation; None for none.
    fold_groups: a field of the records; those with the same value are all in one fold.
    fold: which of them a run holds out, from 1 on; None for one run after the other for each.
    log_every, eval_every: steps between two log lines, and between two evaluations (0: an epoch).
    init_from: the folder of a run or of a Hugging Face model whose parameters the run starts from.
    teacher: the folder of a run or of a Hugging Face model, whose answers the run learns too.
    distill: what it learns of them, and how (`objectives.shared.distilled.Options`).
    reinit_layers: how many of the layers from the top start anew all the same.
    mesh: sizes of the mesh axes, and the name of the sharding rules.
    adapter: what is trained beside a frozen base; {} trains all parameters.
    base_weights: the form of the frozen kernels, 'int8'; '' for as they are.
    compress: the method that makes the model smaller, in `--mode=compress`; in training, how it
      gets used to that; {}: none.
    adversarial: how texts are moved to learn from them; {}: they are not.
    evaluators: sections by name, or by any key with a `name` in the section (a dotted one, say);
      {} for those that the objective names.
    hooks: likewise.
  """

  steps: int
  batch_size: int
  tokenizer: dict
  model: dict
  objective: dict
  data: dict = dataclasses.field(default_factory=dict)
  optimizer: dict = dataclasses.field(default_factory=dict)
  validation: dict = dataclasses.field(default_factory=dict)
  test: dict = dataclasses.field(default_factory=dict)
  epochs: float | None = None
  seq_len: int | None = None
  seed: int = 0
  micro_batches: int | None = None
  folds: int | None = None
  fold: int | None = None
  fold_groups: str | None = None
  log_every: int = 10
  eval_every: int = 500
  init_from: str | None = None
  teacher: str | None = None
  distill: dict = dataclasses.field(default_factory=dict)
  reinit_layers: int = 0
  mesh: dict = dataclasses.field(default_factory=dict)
  adapter: dict = dataclasses.field(default_factory=dict)
  base_weights: str = ''
  compress: dict = dataclasses.field(default_factory=dict)
  adversarial: dict = dataclasses.field(default_factory=dict)
  evaluators: dict = dataclasses.field(default_factory=dict)
  hooks: dict = dataclasses.field(default_factory=dict)
  checkpoint: Checkpoint = Checkpoint()
  evaluation: Evaluation = Evaluation()
  logging: Logging = Logging()
  profile: Profile = Profile()

  def __post_init__(self) -> None:
    _check_positive(self)
    _check_names(self)
    _check_batch(self)
    _check_data(self)
    _check_folds(self)
    _check_not_negative(self)


def parse(tree: Mapping[str, Any]) -> Config:
  """A checked Config from nested dictionaries, such as `ConfigDict.to_dict()` or config.json."""
  tree = recipes.chosen(tree, ())
  sections = {
    'checkpoint': Checkpoint,
    'evaluation': Evaluation,
    'logging': Logging,
    'profile': Profile,
  }
  for name, section in sections.items():
    if name in tree:
      tree[name] = plugins.construct(name, section, tree[name])
  held_out = given(tree.get('validation') or {}) or tree.get('folds')
  if held_out and tree.get('data'):
    tree['data'] = dict(tree['data']) | {'validation': 0.0}  # no share of the data then
  return plugins.construct('', Config, tree)


def to_json(config: Config) -> str:
  """The config as JSON, without the options that are None."""
  return json.dumps(_without_none(dataclasses.asdict(config)), indent=2, sort_keys=True)


def from_json(text: str) -> Config:
  """Reads what `to_json` wrote, in this revision or an earlier one."""
  return parse(json.loads(text))


def differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
  """Keys in which two configs differ: those that make it another run, and those that may change on
  resuming.

  Each entry reads 'model.dim: 128 -> 256'. Tuples and lists are the same thing, as in JSON.
  """
  before = dict(_leaves(json.loads(to_json(old))))
  after = dict(_leaves(json.loads(to_json(new))))
  forbidden, allowed = [], []
  for path in sorted(before.keys() | after.keys()):
    if before.get(path) == after.get(path):
      continue
    line = f'{path}: {before.get(path)!r} -> {after.get(path)!r}'
    if _switched(path, before, after):
      forbidden.append(f'{line} (the state of the optimizer would be another)')
    elif _under(path, IDENTITY) and not _may_change(path):
      forbidden.append(line)
    else:
      allowed.append(line)
  return forbidden, allowed


def _may_change(path: str) -> bool:
  section, _, option = path.rpartition('.')
  located = _under(section, ('data', *SPLITS)) and option in LOCATIONS
  return located or _under(path, NOT_IDENTITY)


def _switched(path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
  if path not in SWITCHES:
    return False
  default, off = SWITCHES[path]
  return bool(before.get(path, default) == off) != bool(after.get(path, default) == off)


def _check_positive(config: Config) -> None:
  for name in ('steps', 'batch_size', 'seq_len', 'micro_batches', 'log_every'):
    value = getattr(config, name)
    if value is not None and value < 1:
      raise ValueError(f'config.{name}={value} must be at least 1.')
  if config.epochs is not None and not 0 < config.epochs < math.inf:
    raise ValueError(f'config.epochs={config.epochs} must be a number of passes, above 0.')
  if config.checkpoint.every < 1 or config.checkpoint.keep < 1:
    raise ValueError(
      f'config.checkpoint needs every and keep of at least 1, not {config.checkpoint}.'
    )


def _check_names(config: Config) -> None:
  """A run that starts from another folder takes from there what it does not name itself."""
  if config.init_from:
    return
  for section in ('tokenizer', 'model', 'objective'):
    if not getattr(config, section).get('name'):
      raise ValueError(f"config.{section} needs a 'name'{_INIT_FROM}.")
  if config.seq_len is None:
    raise ValueError(f'config.seq_len must be given, the tokens of a row{_INIT_FROM}.')


def given(section: Mapping[str, Any]) -> dict[str, Any]:
  """The options of a section that are set."""
  return {key: value for key, value in section.items() if value is not None}


def validates(config: Config) -> bool:
  """Whether there are validation documents: given ones, a share of the data, or a fold."""
  return bool(given(config.validation) or config.data.get('validation') or config.folds)


def require(config: Config, *sections: str) -> None:
  """Raises ValueError unless the sections `data` or `optimizer`, which not every use of a config
  needs, name a source or an optimizer.
  """
  for section in sections:
    key = 'source' if section == 'data' else 'name'
    if not getattr(config, section).get(key):
      raise ValueError(f'config.{section} needs a {key!r}.')


def _check_batch(config: Config) -> None:
  size, parts = config.batch_size, config.micro_batches
  if parts and size % parts:
    raise ValueError(
      f'config.batch_size={size} must divide by micro_batches={parts}; '
      f'try {-(-size // parts) * parts}.'
    )


def _check_data(config: Config) -> None:
  if not config.data:
    return
  workers = config.data.get('workers') or 0
  if workers < 0:
    raise ValueError(
      f'config.data.workers={workers} must be at least 1, or 0 for one process per core.'
    )
  share = config.data.get('validation')
  if not isinstance(share, int | float) or not 0 <= share < 1:
    raise ValueError(
      f'config.data.validation={share} must be the share of the documents to hold out, at least 0 '
      'and below 1.'
    )


def _check_folds(config: Config) -> None:
  folds, fold = config.folds, config.fold
  if folds is None and fold is not None:
    raise ValueError(f'config.fold={fold} is one of config.folds; give their number too.')
  if folds is None and config.fold_groups is not None:
    raise ValueError(
      f'config.fold_groups={config.fold_groups!r} keeps documents in one fold; give config.folds '
      'too.'
    )
  if folds is not None and folds < 2:
    raise ValueError(f'config.folds={folds} must be at least 2, or None for no cross-validation.')
  if folds is not None and fold is not None and not 1 <= fold <= folds:
    raise ValueError(f'config.fold={fold} must be from 1 to {folds}, the number of config.folds.')
  if folds is not None and given(config.validation):
    raise ValueError(
      f'config.folds={folds} holds out parts of the documents, and config.validation names others; '
      'leave one of them out.'
    )


def _check_not_negative(config: Config) -> None:
  numbers = (config.evaluation.rows, config.evaluation.patience, config.evaluation.samples)
  if config.reinit_layers < 0 or (config.reinit_layers and not config.init_from):
    raise ValueError(
      f'config.reinit_layers={config.reinit_layers} is a number from 0 on of layers that start '
      'anew where config.init_from is given.'
    )
  if config.reinit_layers and config.adapter.get('name'):
    raise ValueError(
      f'config.reinit_layers={config.reinit_layers} makes layers that must be trained, and the '
      f'adapter {config.adapter["name"]!r} stands beside a frozen base; leave one of them out.'
    )
  if min(config.seed, config.eval_every, *numbers) < 0:
    raise ValueError(
      f'config.seed={config.seed}, config.eval_every={config.eval_every} and {config.evaluation} '
      'must not be negative.'
    )
  if min(config.profile.start, config.profile.steps) < 0:
    raise ValueError(
      f'config.profile needs start and steps of at least 0, not {config.profile}; steps=0 is for '
      'no profile.'
    )


def _under(path: str, keys: tuple[str, ...]) -> bool:
  return any(path == key or path.startswith(f'{key}.') for key in keys)


def _leaves(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _without_none(tree: PyTree) -> Any:
  if isinstance(tree, Mapping):
    return {k: _without_none(v) for k, v in tree.items() if v is not None}
  return tree
