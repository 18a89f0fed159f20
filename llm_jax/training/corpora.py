"""Everything between a config and the first batch: the tokenizer in its folder, and the tokenized
corpora.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from llm_jax.core import config as config_lib
from llm_jax.core.config import Config
from llm_jax.core.contracts import Documents, Source, Tokenizer
from llm_jax.data import cache
from llm_jax.parallel import hosts
from llm_jax.programs import build, pretrained
from llm_jax.programs import workdir as runs


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run reads.

  Attributes:
    config: the config with model shape and class names filled in.
    tokenizer: made the ids.
    splits: the documents.
  """

  config: Config
  tokenizer: Tokenizer
  splits: 'Splits'


@dataclasses.dataclass(frozen=True)
class Splits:
  """Training and validation documents of each source, the sources' weights, and a hash of what the
  documents say.
  """

  train: Sequence[Documents]
  validation: Sequence[Documents]
  weights: Sequence[float]
  fingerprint: str


def load(config: Config, workdir: pathlib.Path) -> Data:
  """Tokenizes what is not in the cache yet, and gives the splits; of several processes, process 0
  goes first.

  Raises:
    ValueError: an unusable source, an empty corpus, a label that is not one, a config that the
      workdir's run cannot go on with, processes that were given different configs or read different
      documents.
  """
  saved = runs.read_config(workdir) if hosts.agree(lambda: runs.has_checkpoints(workdir)) else None
  config = _absolute(pretrained.complete(config, workdir))
  hosts.check_same('a config', config_lib.to_json(config))
  if saved:
    config = dataclasses.replace(config, tokenizer=saved.tokenizer)
    _check_same(
      build.resolve(config, saved.model['vocab_size'], build.class_names(saved)), saved, workdir
    )
  if config.data['source'] in ('stdlib', 'docstrings'):
    logging.warning(
      'EMBEDDED CORPUS: this run reads the source and documentation of the Python standard '
      'library. Your own text '
      "is one flag: --config.data.source=text --config.data.path='/data/*.txt'"
    )
  tokenizer = _tokenizer(config, workdir, bool(saved))
  splits = documents(config, tokenizer)
  classes = build.class_names(saved or config) or build.collect_classes(
    config, _labels(splits.train)
  )
  return Data(build.resolve(config, tokenizer.vocab_size, classes), tokenizer, splits)


def documents(config: Config, tokenizer: Tokenizer) -> Splits:
  """The documents of the config's data, tokenized; by process 0 first, for the cache may be on a
  disk that all share.
  """
  sources, weights = build.sources(config)
  folder = str(cache_directory(config) / 'tokens')
  corpora = hosts.first(
    lambda: [
      cache.build(source, tokenizer, folder, config.data.get('workers') or 0) for source in sources
    ]
  )
  train, validation = zip(
    *(corpus.split(config.data['validation']) for corpus in corpora), strict=True
  )
  fingerprint = ' '.join(corpus.content for corpus in corpora)
  hosts.check_same('documents of config.data', fingerprint)
  return Splits(train, validation, weights, fingerprint)


def cache_directory(config: Config) -> pathlib.Path:
  """Where tokenizers and tokens are kept between runs: config.data.cache, or the user's cache
  folder.
  """
  default = (
    pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'llm_jax'
  )
  folder = pathlib.Path(config.data.get('cache') or default).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'config.data.cache={folder} cannot be used ({error.strerror}); name a folder that can be '
      'written to.'
    ) from error
  return folder


def _absolute(config: Config) -> Config:
  """The config with its paths made whole, so that a run can be used from any folder."""
  whole = lambda path: (
    path and ','.join(os.path.abspath(os.path.expanduser(part)) for part in path.split(','))
  )
  section = lambda part: (
    part | {key: whole(part[key]) for key in ('path', 'data_dir') if part.get(key)}
  )
  data = section(config.data)
  if data.get('parts'):
    data['parts'] = {name: section(part) for name, part in data['parts'].items()}
  return dataclasses.replace(config, data=data, init_from=whole(config.init_from))


def _check_same(config: Config, saved: Config, workdir: pathlib.Path) -> None:
  forbidden, allowed = config_lib.differences(saved, config)
  if forbidden:
    raise ValueError(
      f'{workdir} holds a run of another config:\n  '
      + '\n  '.join(forbidden)
      + '\nGive this one a --workdir of its own, or the config it was started with.'
    )
  for line in allowed:
    logging.warning('changed since the last start: %s', line)


def _tokenizer(config: Config, workdir: pathlib.Path, resuming: bool) -> Tokenizer:
  if resuming:
    return runs.load_tokenizer(config, workdir)
  hosts.agree(lambda: runs.save_tokenizer(_new_tokenizer(config), workdir))
  return build.load_tokenizer(config, str(workdir / 'tokenizer'))


def _new_tokenizer(config: Config) -> Tokenizer:
  if config.init_from:
    return pretrained.load_tokenizer(config)  # it comes along with the weights
  sources, _ = build.sources(config)
  texts = functools.partial(_training_texts, sources, config.data['validation'])
  fingerprint = ' '.join(
    [*(source.fingerprint for source in sources), str(config.data['validation'])]
  )
  return build.create_tokenizer(
    config, texts, fingerprint, str(cache_directory(config) / 'tokenizers')
  )


def _labels(splits: Sequence[Documents]) -> Iterator[Any]:
  return itertools.chain.from_iterable(split.labels or () for split in splits)


def _training_texts(sources: Sequence[Source], validation: float) -> Iterator[str]:
  documents = itertools.chain.from_iterable(
    (source[i] for i in range(len(source))) for source in sources
  )
  for document in documents:
    if not cache.held_out(document, validation):
      yield document['text']
      if 'pair' in document:
        yield document['pair']
