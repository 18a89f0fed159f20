"""From the sections of a config to the objects that they name. Allocates no array.

The only module that looks plug-ins up by name.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging

from llm_jax.core import config as config_lib
from llm_jax.core import plugins
from llm_jax.core.config import Config
from llm_jax.core.contracts import (
  SOURCE,
  Adapter,
  Compression,
  Documents,
  Evaluator,
  Example,
  Hook,
  Objective,
  Ported,
  Source,
  Tokenizer,
)
from llm_jax.data import augmentation as augmentation_lib
from llm_jax.data import documents as documents_lib
from llm_jax.data import encoding
from llm_jax.data.prompted import Prompted
from llm_jax.evaluators import loss
from llm_jax.parallel import sharding

# Options of config.data; the others belong to the source.
DATA_OPTIONS = ('source', 'validation', 'cache', 'workers', 'parts', 'augment')
# By section, options of which only one can be set.
ALTERNATIVES = {'optimizer': ('warmup_steps', 'warmup_fraction')}
# What a source of validation or test documents shares with another kind of source in `data`.
FIELDS = ('text', 'pair', 'label', 'target', 'fields')
# The most tokens of a micro-batch on a device: a BERT-base then stays within a few GiB.
# Options of config.compress that are those of the mode, whatever the method.
OF_ALL_METHODS = ('rows', 'tolerance')
TOKENS_AT_ONCE = {'cpu': 2048, 'accelerator': 8192}
T5_SENTINELS = 100

Section = Mapping[str, Any]


def check(config: Config, devices: Sequence[jax.Device] | None = None) -> None:
  """Raises for an unknown name, an option that its constructor does not take, or a wrong value.

  Reads no data: what only the data can tell (size of the vocabulary, class names) has stand-ins.

  Args:
    config: with the sections that a run starts from filled in.
    devices: those of the mesh, all by default.
  """
  for section, options in data_parts(config):
    _check_source(section, options)
  for name in config_lib.SPLITS if config.data else ():
    if (options := split_section(config, name)) is not None:
      _check_source(name, options)
  augmentation(config)
  _check_section('tokenizer', config.tokenizer, 'create', ('texts', 'texts_fingerprint', 'cache'))
  _check_section('model', {'vocab_size': 1} | config_lib.given(config.model), 'Model')
  for path, part in _objective_sections(config.objective):
    _check_section(
      'objective', part, 'Objective', ('tokenizer', 'causal', 'parts'), f'objective{path}'
    )
  layout = create_layout(config, devices)
  micro_batches(config, layout.mesh)
  tokenizer = byte_tokenizer(config)
  config = with_stand_ins(resolve(config, 1), tokenizer)
  config = with_compute_type(config, layout.platform)
  model = create_model(config)
  adapter = create_adapter(config)
  before = 0 if adapter is None else adapter.positions
  if config.seq_len + before > model.max_len:
    way_out = 'lower it' if config.init_from else 'lower it, or raise max_len'
    beside = ''
    if before:
      beside, way_out = f', less {before} positions of the adapter', f'{way_out}, or the latter'
    raise ValueError(
      f'config.seq_len={config.seq_len} is more than config.model.max_len={model.max_len}{beside}; '
      f'{way_out}.'
    )
  objective = create_objective(config, tokenizer)
  objective.check(model)
  objective.heads(model)
  if model.reads_source() and f'{SOURCE}tokens' not in template(config, objective, tokenizer):
    raise ValueError(
      f'the model {config.model["name"]} reads two rows, and the objective '
      f'{config.objective["name"]} makes one; config.objective.name=seq2seq makes both.'
    )
  evaluators = create_evaluators(config, objective)
  for evaluator in evaluators.values():
    if hasattr(evaluator, 'check'):
      evaluator.check(objective, model)
  _check_patience(config, evaluators)
  _check_slices(config, objective, evaluators)
  for key, section in config.hooks.items():
    factory, options = _named('hook', key, section, 'Hook')
    plugins.check(f'hooks.{key}', factory, options, ('run', 'log'))


def without_replaced_options(
  settings: Mapping[str, Any],
  overrides: Collection[str],
  takes: Mapping[str, Callable[[str], Collection[str]]],
) -> dict[str, Any]:
  """The settings without options that belong to a plug-in which a flag has replaced.

  Where a flag names another plug-in than the config file does, what the file sets for the old one
  and the new one does not take is dropped, and said. Where a flag sets one of two options of which
  only one can be set, the file's other is dropped.

  Args:
    settings: the config as nested dictionaries, flags included.
    overrides: the options that flags set: 'tokenizer.name'.
    takes: section -> a function from a name to the options that what it names takes; for sections
      that name no plug-in.

  Raises:
    ValueError: a name that is not known.
  """
  settings = dict(settings)
  takes = {
    **{
      kind: functools.partial(_plugin_options, kind) for kind in ('tokenizer', 'model', 'objective')
    },
    'data': _data_options,
    **takes,
  }
  for kind, options_of in takes.items():
    key, section = 'source' if kind == 'data' else 'name', settings.get(kind) or {}
    if f'{kind}.{key}' not in overrides or not section.get(key):
      continue
    taken = {key, 'variant', 'parts', *options_of(section[key])}
    said = {key for key in section if f'{kind}.{key}' in overrides}
    dropped = sorted(key for key in config_lib.given(section) if key not in taken | said)
    if dropped:
      names = ', '.join(f'config.{kind}.{key}' for key in dropped)
      logging.info(
        '%s: not an option of %s; what the config file says is dropped.', names, section[key]
      )
    settings[kind] = _without(section, *dropped)
  _settle(settings, overrides)
  for section, options in ALTERNATIVES.items():
    given = config_lib.given(settings.get(section) or {})
    said = [option for option in options if option in given and f'{section}.{option}' in overrides]
    if said:
      settings[section] = _without(settings[section], *(set(options) - set(said)))
  return settings


def data_parts(config: Config) -> list[tuple[str, dict[str, Any]]]:
  """The path in the config and the section of each source; several for `data.source=mixture`."""
  if not config.data:
    return []
  if config.data['source'] != 'mixture':
    return [('data', config.data)]
  if not config.data.get('parts'):
    raise ValueError(
      "config.data.source='mixture' needs config.data.parts: a section for each source, with its "
      'weight.'
    )
  return [(f'data.parts.{name}', part) for name, part in config.data['parts'].items()]


def sources(config: Config) -> tuple[list[Source], list[float]]:
  """The sources of the data, and their weights in the mixture."""
  made, weights = [], []
  for section, part in data_parts(config):
    factory = plugins.load('source', part['source']).Source
    made.append(plugins.construct(section, factory, _without(part, *DATA_OPTIONS, 'weight')))
    weights.append(float(part.get('weight', 1.0)))
  return made, weights


def augmentation(config: Config) -> augmentation_lib.Rules | None:
  """How copies of the training records are made; None where there are none.

  Raises:
    ValueError: rules that are not possible, a part of a mixture with its own, an objective that
      reads more of a record than its texts, folds.
  """
  for path, part in data_parts(config):
    if path != 'data' and part.get('augment'):
      raise ValueError(f'config.{path}.augment: copies are made of all parts; set data.augment.')
  section = config_lib.given(config.data.get('augment') or {})
  if not section:
    return None
  if encoder(config).identity != (encoding.TEXT,):
    raise ValueError(
      'config.data.augment changes the words of texts, and the objective '
      f'{config.objective.get("name")} reads more of a record than text, pair and label; leave it '
      'out.'
    )
  if config.folds:
    raise ValueError(
      'config.data.augment makes copies that one fold could not hold out of another; leave it '
      f'out, or config.folds={config.folds}.'
    )
  return plugins.construct('data.augment', augmentation_lib.Rules, section)


def without_copies(config: Config) -> Config:
  """The config of a corpus in which each record stands once, as it is."""
  return dataclasses.replace(config, data=_without(config.data, 'augment'))


def split_section(config: Config, name: str) -> dict[str, Any] | None:
  """The section of the source of `config.validation` or `config.test`; None where none is given.

  What it leaves open is as in `config.data`: everything where it reads the same kind of source,
  else the names of fields.

  Raises:
    ValueError: no source can be meant, or just the documents of `config.data`.
  """
  given = config_lib.given(getattr(config, name))
  if not given:
    return None
  data = config_lib.given(config.data)
  kind = given.get('source') or data.get('source')
  if kind in (None, 'mixture'):
    raise ValueError(f"config.{name} needs a 'source', since config.data names no single one.")
  takes = set(plugins.signature(plugins.load('source', kind).Source))
  shared = takes if kind == data.get('source') else takes.intersection(FIELDS)
  section = {key: data[key] for key in sorted(shared & data.keys())} | given | {'source': kind}
  if kind == data.get('source') and all(
    section[key] == data.get(key) for key in shared & given.keys()
  ):
    raise ValueError(
      f'config.{name} names the documents that config.data trains on; give it a path, name or '
      'split of its own.'
    )
  return section


def split_source(config: Config, name: str) -> Source | None:
  """The source of `config.validation` or `config.test`; None where none is given."""
  section = split_section(config, name)
  if section is None:
    return None
  factory = plugins.load('source', section['source']).Source
  return plugins.construct(name, factory, _without(section, *DATA_OPTIONS))


def create_tokenizer(
  config: Config, texts: Callable[[], Iterator[str]], fingerprint: str, cache: str
) -> Tokenizer:
  """The tokenizer of the config, trained on `texts` where it is one that is trained.

  Args:
    config: the config.
    texts: gives a fresh iterator over the training texts at each call.
    fingerprint: of those texts, the key under which `cache` keeps a trained tokenizer.
    cache: a folder.
  """
  module = plugins.load('tokenizer', config.tokenizer['name'])
  options = _without(config.tokenizer, 'name')
  given = dict(texts=texts, texts_fingerprint=fingerprint, cache=cache)
  return _prompted(config, plugins.construct('tokenizer', module.create, options, **given))


def load_tokenizer(config: Config, directory: str) -> Tokenizer:
  """The tokenizer that was saved in a folder."""
  return _prompted(config, plugins.load('tokenizer', config.tokenizer['name']).load(directory))


def _prompted(config: Config, tokenizer: Tokenizer) -> Tokenizer:
  """The tokenizer with the virtual tokens of the adapter, if it has any."""
  adapter = create_adapter(config)
  if adapter is None or not adapter.tokens:
    return tokenizer
  first = model_options(config, tokenizer.vocab_size)['vocab_size']
  return Prompted(tokenizer, first, adapter.tokens)


def byte_tokenizer(config: Config) -> Tokenizer:
  """A tokenizer that needs no data, in place of the config's; with as many sentinels, or where a
  folder has them, those of T5.
  """
  given = config_lib.given(config.tokenizer)
  sentinels = given.get('sentinels', T5_SENTINELS if given.get('path') else 0)
  added = given.get('added', ())
  return plugins.load('tokenizer', 'byte').create(added=tuple(added), sentinels=sentinels)


def model_module(name: str) -> types.ModuleType:
  """The module of a model by its name."""
  return plugins.load('model', name)


def with_compute_type(config: Config, platform: str) -> Config:
  """The config with `model.dtype='auto'` decided: bfloat16 on TPUs and GPUs, float32 on CPUs."""
  if config.model.get('dtype') != 'auto':
    return config
  dtype = 'float32' if platform == 'cpu' else 'bfloat16'
  return dataclasses.replace(config, model=config.model | {'dtype': dtype})


def create_model(config: Config) -> nn.Module:
  """The model of a resolved config."""
  options = _without(config.model, 'name', 'variant')
  return plugins.construct('model', model_module(config.model['name']).Model, options)


def create_objective(config: Config, tokenizer: Tokenizer) -> Objective:
  """The objective of a resolved config; a mix gets its parts ready made, and one that asks for
  `causal` whether the model is.
  """
  section = config.objective
  given = dict(tokenizer=tokenizer, causal=model_module(config.model['name']).Model.causal)
  parts = {}
  for name, part in (section.get('parts') or {}).items():
    parts[name] = _objective(f'objective.parts.{name}', {'name': name} | part, **given)
  return _objective('objective', _without(section, 'parts'), **given, parts=parts)


def create_adapter(config: Config) -> Adapter | None:
  """The adapter of the config; None where there is none.

  Raises:
    ValueError: options without a name; whatever `plugins.construct` raises.
  """
  if not config.adapter.get('name'):
    if given := sorted(config_lib.given(config.adapter)):
      raise ValueError(
        f'config.adapter.{given[0]} is set, and config.adapter.name is not; known: '
        f'{", ".join(plugins.names("adapter"))}.'
      )
    return None
  factory = plugins.load('adapter', config.adapter['name']).Adapter
  options = _without(config.adapter, 'name')
  return plugins.construct('adapter', factory, options, steps=config.steps)


def create_compression(config: Config) -> Compression | None:
  """The method of `config.compress`; None where there is none.

  Raises:
    ValueError: options without a name; whatever `plugins.construct` raises.
  """
  if not config.compress.get('name'):
    if given := sorted(config_lib.given(config.compress)):
      raise ValueError(
        f'config.compress.{given[0]} is set, and config.compress.name is not; known: '
        f'{", ".join(plugins.names("compress"))}.'
      )
    return None
  factory = plugins.load('compress', config.compress['name']).Compression
  options = _without(config.compress, 'name', *OF_ALL_METHODS)
  return plugins.construct('compress', factory, options, steps=config.steps)


def ported_adapter(settings: Mapping[str, Any], steps: int) -> tuple[dict[str, Any], Ported]:
  """The section of an adapter, without targets, from an adapter_config.json of the library peft,
  and what the adapter is there.

  Args:
    settings: the adapter_config.json.
    steps: of the run that it would be trained in.

  Raises:
    ValueError: a method that no adapter is, or a setting that it cannot have.
  """
  modules = {name: plugins.load('adapter', name) for name in plugins.names('adapter')}
  known = {kind: name for name, m in modules.items() for kind in getattr(m, 'PEFT_TYPES', ())}
  kind = settings['peft_type']
  if kind not in known:
    raise ValueError(
      f'peft_type={kind!r} cannot be read; known: {", ".join(known)}. Merge it by peft '
      '(merge_and_unload), where it can be, and open the result.'
    )
  factory = modules[known[kind]].Adapter
  options = factory.ported_options(settings)
  made = plugins.construct('adapter', factory, options, steps=steps)
  return {'name': known[kind]} | options, made.ported()


def create_evaluators(config: Config, objective: Objective) -> dict[str, Evaluator]:
  """The evaluators that the config names, or else those of the objective, by name."""
  sections = config.evaluators or {name: {} for name in objective.evaluators}
  made = {}
  for key, section in sections.items():
    factory, options = _named('evaluator', key, section, 'Evaluator')
    made[key] = plugins.construct(f'evaluators.{key}', factory, options)
  return made


def create_hook(config: Config, key: str, **given: Any) -> Hook:
  """One of the hooks that the config names.

  Args:
    config: the config.
    key: of its section in `config.hooks`.
    **given: what a hook may ask for by the name of an argument: `run`, `log`.
  """
  factory, options = _named('hook', key, config.hooks[key], 'Hook')
  return plugins.construct(f'hooks.{key}', factory, options, **given)


def encoder(config: Config) -> encoding.Encoder:
  """How the objective of a config, and each of its parts, encode a record."""
  leaves = [part for _, part in _leaf_sections(config.objective)]
  functions = [_objective_class(part).encoding(_without(part, 'name')) for part in leaves]
  return encoding.Encoder(functions)


def objective_options(name: str) -> Collection[str]:
  """The options that an objective takes."""
  return _plugin_options('objective', name)


def text_fields(config: Config) -> tuple[str, ...]:
  """The fields of a record with a text that hold texts, as the objective and its parts say."""
  leaves = [_objective_class(part) for _, part in _leaf_sections(config.objective)]
  return tuple(dict.fromkeys(name for leaf in leaves for name in leaf.text_fields))


def derive(
  config: Config, documents: Sequence[Documents], held_out: Sequence[Documents] = ()
) -> Config:
  """The config with the options that only the training documents decide filled in.

  Args:
    config: the config.
    documents: those of training.
    held_out: those that a cross-validation holds out: they have a say too, so that all its runs
      have the same classes, but for `Objective.from_training`.
  """

  def derived(path: str, part: Section) -> dict[str, Any]:
    del path
    factory, options = _objective_class(part), _without(part, 'name')
    found = factory.derive(options, [*documents, *held_out])
    again = found.keys() & set(factory.from_training)
    if held_out and again:
      others = {name: value for name, value in found.items() if name not in again}
      alone = factory.derive(options | others, documents)
      found |= {name: alone[name] for name in again}
    return found

  return _with_objective_options(config, derived)


def with_derived(config: Config, saved: Config) -> Config:
  """The config with the derived options of an earlier run filled in where it leaves them open."""
  known = dict(_objective_sections(saved.objective))

  def derived(path: str, part: Section) -> dict[str, Any]:
    names = _objective_class(part).derived
    earlier = known.get(path, {})
    return {name: earlier[name] for name in names if earlier.get(name) is not None}

  return _with_objective_options(config, derived)


def with_stand_ins(config: Config, tokenizer: Tokenizer) -> Config:
  """The config with derived options taken from made-up records where they are still open."""
  with _unlogged():
    return derive(config, [_sample_documents(config, tokenizer)])


def template(config: Config, objective: Objective, tokenizer: Tokenizer) -> Example:
  """One row as the objective makes it of made-up records: the shapes of every row."""
  rng = np.random.default_rng(0)
  with _unlogged():
    rows = objective.rows(_sample_documents(config, tokenizer), config.seq_len)
  return objective.transform(rows.example(0, rng), rng)


def resolve(config: Config, vocab_size: int) -> Config:
  """The config with the model's full shape filled in."""
  return dataclasses.replace(config, model=model_options(config, vocab_size))


def model_options(config: Config, vocab_size: int) -> dict[str, Any]:
  """The model section with its variant's published shape; what the section says goes first."""
  section = config_lib.given(config.model)
  variants = getattr(model_module(section['name']), 'VARIANTS', {})
  variant = section.get('variant')
  if variant is not None and variant not in variants:
    raise ValueError(
      f'config.model.variant={variant!r} is not known{plugins.nearest(variant, variants)}; known: '
      f'{", ".join(variants)}.'
    )
  options = dict(variants.get(variant, {})) | section
  if options.setdefault('vocab_size', vocab_size) < vocab_size:
    raise ValueError(
      f"config.model.vocab_size={options['vocab_size']} is smaller than the tokenizer's "
      f'{vocab_size}; leave it unset.'
    )
  return options


def create_layout(config: Config, devices: Sequence[jax.Device] | None = None) -> sharding.Layout:
  """The mesh of the config and how arrays lie on it."""
  layout = plugins.construct('mesh', sharding.create_layout, config.mesh, devices=devices)
  parts = layout.mesh.shape['sequence']
  if config.seq_len % parts:
    raise ValueError(
      f'config.seq_len={config.seq_len} must divide by config.mesh.sequence={parts}.'
    )
  return layout


def micro_batches(config: Config, mesh: jax.sharding.Mesh) -> int:
  """config.micro_batches, or as few as keep the tokens of a device at once moderate.

  Raises:
    ValueError: the batch does not divide by the rows of the mesh times the micro-batches.
  """
  shards = sharding.row_shards(mesh)
  count = config.micro_batches or _fewest_micro_batches(config, mesh)
  if config.batch_size % (shards * count):
    larger = -(-config.batch_size // (shards * count)) * shards * count
    raise ValueError(
      f'config.batch_size={config.batch_size} must divide by {shards * count} (data and fsdp axes '
      f'{shards} x micro_batches {count}); try {larger}.'
    )
  return count


def _fewest_micro_batches(config: Config, mesh: jax.sharding.Mesh) -> int:
  shards, platform = sharding.row_shards(mesh), mesh.devices.flat[0].platform
  most = TOKENS_AT_ONCE['cpu' if platform == 'cpu' else 'accelerator']
  for count in range(1, config.batch_size // shards + 1):
    if config.batch_size % (count * shards):
      continue
    rows = config.batch_size // (count * shards)
    if rows * config.seq_len <= most or rows == 1:
      return count
  return 1


def _settle(settings: dict[str, Any], overrides: Collection[str]) -> None:
  """Drops the number of passes where a flag gives that of steps.

  Raises:
    ValueError: flags give both, or two validation sets.
  """
  if 'steps' in overrides and settings.get('epochs') is not None:
    if 'epochs' in overrides:
      raise ValueError('config.steps and config.epochs both say how long to train; give one.')
    settings['epochs'] = None
  given = sorted(option for option in overrides if option.startswith('validation.'))
  if given and 'data.validation' in overrides and settings['data']['validation']:
    raise ValueError(
      f'config.{given[0]} gives validation documents and config.data.validation holds some of the '
      'training documents out; give one of the two.'
    )


def _check_source(section: str, options: Section) -> None:
  factory = plugins.load('source', options['source']).Source
  plugins.check(section, factory, _without(options, *DATA_OPTIONS, 'weight'))
  if options.get('weight', 1.0) <= 0:
    raise ValueError(
      f'config.{section}.weight={options["weight"]} must be above 0; leave out a source that is '
      'not wanted.'
    )


def _check_patience(config: Config, evaluators: Mapping[str, Evaluator]) -> None:
  if config.evaluation.patience and config.data and not config_lib.validates(config):
    raise ValueError(
      f'config.evaluation.patience={config.evaluation.patience} waits for a better validation '
      'loss, and there are no validation documents; set config.data.validation or '
      'config.validation.'
    )
  has_loss = any(isinstance(evaluator, loss.Evaluator) for evaluator in evaluators.values())
  if config.evaluation.patience and not has_loss:
    raise ValueError(
      f'config.evaluation.patience={config.evaluation.patience} waits for a better loss, which '
      f'none of the evaluators {", ".join(evaluators)} gives; add config.evaluators.loss, or set '
      'patience to 0.'
    )


def _check_slices(
  config: Config, objective: Objective, evaluators: Mapping[str, Evaluator]
) -> None:
  measured = config_lib.validates(config) or config_lib.given(config.test)
  if config.evaluation.slices and config.data and not measured:
    raise ValueError(
      f'config.evaluation.slices={config.evaluation.slices} are groups of validation and test '
      'texts, and there are none; set config.data.validation, config.validation or config.test.'
    )
  if config.evaluation.slices and objective.predictor is None:
    raise ValueError(
      f'config.evaluation.slices={config.evaluation.slices} are groups of texts that are answered, '
      f'and the objective {config.objective["name"]} gives no answers; leave it empty.'
    )
  read = any(getattr(evaluator, 'slices', False) for evaluator in evaluators.values())
  if config.evaluation.slices and not read:
    raise ValueError(
      f'config.evaluation.slices={config.evaluation.slices} are groups that none of the evaluators '
      f'{", ".join(evaluators)} scores; leave it empty.'
    )


def _check_section(
  kind: str, options: Section, factory: str, given: Sequence[str] = (), section: str = ''
) -> None:
  module = plugins.load(kind, options['name'])
  options = _without(options, 'name', 'variant', 'parts')
  plugins.check(section or kind, getattr(module, factory), options, given)


def _plugin_options(kind: str, name: str) -> Collection[str]:
  return plugins.signature(getattr(plugins.load(kind, name), plugins.KINDS[kind][1]))


def _data_options(source: str) -> Collection[str]:
  """The options of `config.data` with a source; those of a mixture stand in its parts."""
  own = () if source == 'mixture' else _plugin_options('source', source)
  return (*DATA_OPTIONS, *own)


def _named(
  kind: str, key: str, section: Section | None, defines: str
) -> tuple[Callable[..., Any], dict[str, Any]]:
  """The plug-in of a section that is found by its key, and its options.

  Its `name`, or else the key: a key of a config file has no dots.
  """
  options = {'name': key} | (section or {})
  return getattr(plugins.load(kind, options['name']), defines), _without(options, 'name')


def _sample_documents(config: Config, tokenizer: Tokenizer) -> Documents:
  records: list[dict[str, Any]] = []
  for _, part in _leaf_sections(config.objective):
    new = _objective_class(part).sample_records(_without(part, 'name'))
    records = [a | b for a, b in zip(records, new, strict=False)] or list(new)
  if config.data.get('pair') is not None:
    records = [record | {'pair': record['text']} for record in records]
  return documents_lib.Memory(records, encoder(config), tokenizer)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
  """What is said of made-up records would be taken for the data's."""
  logger = logging.get_absl_logger()
  before = logger.level
  logger.setLevel('ERROR')
  try:
    yield
  finally:
    logger.setLevel(before)


def _objective_sections(section: Section) -> list[tuple[str, Section]]:
  """The objective's section and those of its parts, with their paths below it."""
  parts = section.get('parts') or {}
  return [
    ('', section),
    *((f'.parts.{name}', {'name': name} | part) for name, part in parts.items()),
  ]


def _leaf_sections(section: Section) -> list[tuple[str, Section]]:
  """The same without the section of a mix, which only holds its parts."""
  found = _objective_sections(section)
  return found[1:] or found


def _objective_class(section: Section) -> type[Objective]:
  return plugins.load('objective', section['name']).Objective


def _with_objective_options(
  config: Config, options: Callable[[str, Section], dict[str, Any]]
) -> Config:
  """The config with further options in the sections of the objective that leave them open."""
  sections = dict(_objective_sections(config.objective))
  new = {path: options(path, part) for path, part in sections.items()}
  if not any(new.values()):
    return config
  filled = {path: new[path] | config_lib.given(part) for path, part in sections.items()}
  objective = filled.pop('')
  if filled:
    objective['parts'] = {path.removeprefix('.parts.'): part for path, part in filled.items()}
  return dataclasses.replace(config, objective=objective)


def _objective(section: str, options: Section, **given: Any) -> Objective:
  factory = _objective_class(options)
  return plugins.construct(section, factory, _without(options, 'name'), **given)


def _without(options: Section, *keys: str) -> dict[str, Any]:
  return {key: value for key, value in options.items() if key not in keys}
