"""Everything between a config and the first batch: the tokenizer in its folder, the tokenized
documents, and the objective that reads them.
"""

import dataclasses
import errno
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from llm_jax.core import config as config_lib
from llm_jax.core import files, progress
from llm_jax.core.config import Config
from llm_jax.core.contracts import Documents, Objective, Source, Tokenizer
from llm_jax.data import augmentation, cache
from llm_jax.parallel import hosts
from llm_jax.programs import assemble, pretrained, teachers, workdir
from llm_jax.training import folds

EMBEDDED = ('stdlib', 'docstrings', 'headings')  # sources that come with Python


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run reads.

  Attributes:
    config: the config with the model's shape and the derived options filled in.
    tokenizer: made the ids.
    objective: lays documents out in rows.
    splits: the documents.
  """

  config: Config
  tokenizer: Tokenizer
  objective: Objective
  splits: 'Splits'


@dataclasses.dataclass(frozen=True)
class Splits:
  """The documents of a run.

  Attributes:
    train: of each source.
    validation: of each source, or those that are given; none where nothing is held out.
    weights: of the sources.
    fingerprint: a hash of what training and validation documents say.
    test: those that are given.
  """

  train: Sequence[Documents]
  validation: Sequence[Documents]
  weights: Sequence[float]
  fingerprint: str
  test: Sequence[Documents] = ()


def load(config: Config, folder: pathlib.Path) -> Data:
  """Tokenizes what is not in the cache yet, and gives the splits; process 0 goes first.

  Args:
    config: with the sections that a run starts from filled in (`pretrained.fill_in`).
    folder: the workdir.

  Raises:
    ValueError: an unusable source, an empty corpus, a label that is not one, a config that the
      workdir's run cannot continue with, processes that were given different configs or read
      different documents.
  """
  has_run = hosts.agree(lambda: workdir.has_checkpoints(folder))
  saved = workdir.read_config(folder) if has_run else None
  config = _with_absolute_paths(config)
  hosts.check_same('a config', config_lib.to_json(config))
  if saved is not None:
    config = _continued(config, saved, folder)
  if config.data['source'] in EMBEDDED:
    logging.warning(
      'EMBEDDED CORPUS: this run reads the source and documentation of the Python standard '
      'library. Your own text is one flag: --config.data.source=text '
      "--config.data.path='/data/*.txt'"
    )
  if not config_lib.validates(config):
    logging.warning(
      'NO VALIDATION: config.data.validation is 0 and config.validation is not given, so nothing '
      'is evaluated, and the last checkpoint stands for the best.'
    )
  tokenizer = _tokenizer(config, folder, saved is not None)
  splits = documents(config, tokenizer)
  # In a cross-validation all folds have the same classes.
  config = assemble.derive(config, splits.train, splits.validation if config.folds else ())
  config = assemble.resolve(config, tokenizer.vocab_size)
  hosts.check_same('options that the data decide', config_lib.to_json(config))
  objective = assemble.create_objective(config, tokenizer)
  return Data(config, tokenizer, teachers.beside(config, objective, tokenizer), splits)


def documents(config: Config, tokenizer: Tokenizer) -> Splits:
  """The documents of the config's data, tokenized; by process 0 first, for the cache may be on a
  disk that all share.
  """
  config_lib.require(config, 'data')
  sources, weights = assemble.sources(config)
  rules = assemble.augmentation(config)
  if rules is not None:
    sources = [augmentation.Augmented(source, rules) for source in sources]
  given = {name: assemble.split_source(config, name) for name in config_lib.SPLITS}
  encoder = assemble.encoder(config)
  folder = str(cache_directory(config) / 'tokens')
  workers = config.data.get('workers') or 0

  def build(sources: Sequence[Source]) -> list[cache.Corpus]:
    return [cache.build(source, tokenizer, encoder, folder, workers) for source in sources]

  corpora = hosts.first(lambda: build(sources))
  others = {
    name: hosts.first(lambda source=source: build([source]))
    for name, source in given.items()
    if source
  }
  share = config.data['validation']
  if config.folds:
    train, validation = folds.split(corpora, tokenizer, config)
  elif rules is not None:
    pairs = zip(corpora, sources, strict=True)
    parts = (augmentation.split(corpus, source, share) for corpus, source in pairs)
    train, validation = zip(*parts, strict=True)
  else:
    train, validation = zip(*(corpus.split(share) for corpus in corpora), strict=True)
  splits = {name: [corpus.split(0)[0] for corpus in found] for name, found in others.items()}
  validation = splits.get('validation', validation if share or config.folds else ())
  _warn_of_copies(train, splits)
  fingerprint = ' '.join(corpus.content for corpus in [*corpora, *others.get('validation', ())])
  tested = ' '.join(corpus.content for corpus in others.get('test', ()))
  hosts.check_same('documents of config.data', f'{fingerprint} {tested}')
  return Splits(train, validation, weights, fingerprint, splits.get('test', ()))


def _warn_of_copies(
  train: Sequence[cache.Split], splits: Mapping[str, Sequence[cache.Split]]
) -> None:
  """Says how many of the documents that are given for a measurement are trained on too."""
  for name, parts in splits.items():
    seen = np.concatenate([split.hashes for split in train])
    copies = sum(int(np.isin(part.hashes, seen).sum()) for part in parts)
    if copies:
      logging.warning(
        '%d of the %d documents of config.%s are among the training documents, word for word.',
        copies,
        sum(map(len, parts)),
        name,
      )


def cache_directory(config: Config) -> pathlib.Path:
  """Where tokenizers and tokens are kept between runs: config.data.cache, or the user's cache."""
  home = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  folder = files.local('config.data.cache', config.data.get('cache')) or home / 'llm_jax'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as error:
    raise ValueError(
      f'config.data.cache={folder} cannot be used ({error.strerror}); name a folder that can be '
      'written to.'
    ) from error
  return folder


def _continued(config: Config, saved: Config, folder: pathlib.Path) -> Config:
  """The config of a run that continues.

  Raises:
    ValueError: it would make it another run.
  """
  config = dataclasses.replace(config, tokenizer=saved.tokenizer)
  config = assemble.with_derived(config, saved)
  if config.epochs and config.epochs == saved.epochs:
    config = dataclasses.replace(config, steps=saved.steps)  # as they follow from the data
  resolved = assemble.resolve(config, saved.model['vocab_size'])
  forbidden, allowed = config_lib.differences(saved, resolved)
  if forbidden:
    raise ValueError(
      f'{folder} holds a run of another config:\n  '
      + '\n  '.join(forbidden)
      + '\nGive this one a --workdir of its own, or the config it was started with.'
    )
  for line in allowed:
    logging.warning('changed since the last start: %s', line)
  return config


def _with_absolute_paths(config: Config) -> Config:
  """The config with its paths made absolute, so that a run can be used from any folder."""
  data = _absolute_section('data', config.data)
  if data.get('parts'):
    data['parts'] = {name: _absolute_section('data', part) for name, part in data['parts'].items()}
  if (data.get('augment') or {}).get('synonyms'):
    data['augment'] = data['augment'] | {'synonyms': _absolute(data['augment']['synonyms'])}
  splits = {name: _absolute_section(name, getattr(config, name)) for name in config_lib.SPLITS}
  return dataclasses.replace(config, data=data, init_from=_absolute(config.init_from), **splits)


def _absolute_section(name: str, section: dict[str, Any]) -> dict[str, Any]:
  paths = {key: section[key] for key in config_lib.LOCATIONS if section.get(key)}
  for key, value in paths.items():
    for part in value.split(','):
      files.local(f'config.{name}.{key}', part.strip())
  return section | {key: _absolute(path) for key, path in paths.items()}


def _absolute(path: str | None) -> str | None:
  if not path:
    return path
  return ','.join(os.path.abspath(os.path.expanduser(part)) for part in path.split(','))


def _tokenizer(config: Config, folder: pathlib.Path, resuming: bool) -> Tokenizer:
  if resuming:
    return workdir.load_tokenizer(config, folder)
  hosts.agree(lambda: workdir.save_tokenizer(_new_tokenizer(config), folder))
  return assemble.load_tokenizer(config, str(folder / 'tokenizer'))


def _new_tokenizer(config: Config) -> Tokenizer:
  if config.init_from:
    return pretrained.load_tokenizer(config)  # it comes along with the weights
  sources, _ = assemble.sources(config)
  share = config.data['validation']
  fields = assemble.text_fields(config)
  texts = functools.partial(_training_texts, sources, share, fields)
  further = () if fields == Objective.text_fields else fields  # as it always was
  fingerprint = ' '.join([*(source.fingerprint for source in sources), str(share), *further])
  folder = str(cache_directory(config) / 'tokenizers')
  return assemble.create_tokenizer(config, texts, fingerprint, folder)


def _training_texts(
  sources: Sequence[Source], validation: float, fields: Sequence[str]
) -> Iterator[str]:
  """Every string of every training record, those in lists too; of a record with a text, those in
  `fields`; of one with words, these with spaces between them.
  """
  for source in sources:
    indices = range(len(source))
    for index in progress.shown(indices, 'Reading for the tokenizer', len(source), 'records'):
      record = source[index]
      if not cache.held_out(record, validation):
        yield from _strings(record, fields)


def _strings(record: dict[str, Any], fields: Sequence[str]) -> Iterator[str]:
  if 'text' in record:
    record = {name: record[name] for name in fields if name in record}
  words = record.get('words')
  if isinstance(words, list) and all(isinstance(word, str) for word in words):
    yield ' '.join(words)  # as they run in a text; `tags` are no text
    return
  for value in record.values():
    parts = value if isinstance(value, list) else [value]
    yield from (part for part in parts if isinstance(part, str))
