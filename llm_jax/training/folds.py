"""Cross-validation: `config.folds` runs, each of which holds out another part of the documents, and
one report of all.

Which documents are in a fold is decided by scikit-learn's StratifiedGroupKFold: each fold has the
classes in about the shares of the whole, and documents that say the same, but for case, signs and
spaces, are all in one; so are those whose records have the same value in the field
`config.fold_groups` (a patient, an author).
"""

import collections
import json
import math
import pathlib
import statistics
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from scipy import sparse

from llm_jax.core import files
from llm_jax.core.config import Config
from llm_jax.core.contracts import Documents, Tokenizer
from llm_jax.data import cache, encoding
from llm_jax.parallel import hosts
from llm_jax.training import held_out

NUMBERS, REPORT = 'folds.json', 'folds.txt'
BINS = 5  # of labels that are numbers


def folder(workdir: pathlib.Path, fold: int) -> pathlib.Path:
  """The workdir of one run of a cross-validation."""
  return workdir / f'fold_{fold}'


def split(
  corpora: Sequence[cache.Corpus], tokenizer: Tokenizer, config: Config
) -> tuple[list[cache.Split], list[cache.Split]]:
  """Training and validation documents of each corpus, for the fold `config.fold`.

  Raises:
    ValueError: too few documents or groups for so many folds, a field that records do not have.
  """
  wholes = [corpus.split(0)[0] for corpus in corpora]
  keys = [key for whole in wholes for key in normalized(whole, tokenizer)]
  labels = [label for whole in wholes for label in strata(whole)]
  if config.fold_groups:
    keys = joined(keys, groups(wholes, config))
  number = assigned(labels, keys, config.folds, config.seed)
  train, validation, start = [], [], 0
  for corpus, whole in zip(corpora, wholes, strict=True):
    held = number[start : start + len(whole)] == config.fold - 1
    start += len(whole)
    train.append(cache.Split(corpus, np.flatnonzero(~held)))
    validation.append(cache.Split(corpus, np.flatnonzero(held)))
  return train, validation


def normalized(documents: Documents, tokenizer: Tokenizer) -> list[str]:
  """What each document says, without case, signs and spaces."""
  names = [name for name in sorted(documents.names) if encoding.holds_ids(name)]
  found = []
  for index in range(len(documents)):
    texts = (tokenizer.decode(documents.array(name, index).tolist()) for name in names)
    found.append('\0'.join(map(_letters, texts)))
  return found


def groups(wholes: Sequence[Documents], config: Config) -> list[str | None]:
  """The value of each document's field `config.fold_groups`; None where a record has none."""
  field, found = config.fold_groups, []
  try:
    sources = held_out.sources(config, 'data', (field,))
  except ValueError as error:
    raise ValueError(
      f'config.fold_groups={field!r} names a field of the records: {error}'
    ) from error
  for whole, source in zip(wholes, sources, strict=True):
    values = (source[int(index)].get(field) for index in whole.ids)
    found += [None if value in (None, '') else str(value) for value in values]
  known = len(set(found) - {None})
  if known < config.folds:
    raise ValueError(
      f'config.folds={config.folds} needs as many groups of documents, and the field '
      f'{field!r} of config.fold_groups has {known} different values.'
    )
  logging.info('Folds: %d groups of documents by the field %r.', known, field)
  return found


def joined(keys: Sequence[str], others: Sequence[str | None]) -> list[str]:
  """A key for each document, equal where documents hang together: by an equal key or an equal other
  one, or by a chain of such; no other one hangs together with nothing.
  """
  count = len(keys)
  nodes: dict[tuple[int, str], int] = {}
  pairs = []
  for index, named in enumerate(zip(keys, others, strict=True)):
    for kind, name in enumerate(named):
      if name is not None:
        pairs.append((index, count + nodes.setdefault((kind, name), len(nodes))))
  rows, columns = np.array(pairs).T
  size = count + len(nodes)
  graph = sparse.coo_array((np.ones(len(pairs)), (rows, columns)), (size, size))
  _, component = sparse.csgraph.connected_components(graph, directed=False)
  return [str(number) for number in component[:count]]


def strata(documents: Documents) -> list[str]:
  """The class of each document, several classes as one name; of numbers, which fifth of them."""
  labels = documents.values('label')
  if labels is None:
    return [''] * len(documents)
  numbers = [label for label in labels if isinstance(label, float)]
  if not numbers:
    return [json.dumps(sorted(x) if isinstance(x, list) else x) for x in labels]
  bounds = np.quantile(numbers, np.arange(1, BINS) / BINS)
  return ['' if x is None else str(np.searchsorted(bounds, float(x))) for x in labels]


def assigned(labels: Sequence[str], keys: Sequence[str], folds: int, seed: int) -> np.ndarray:
  """[documents]: the fold of each, from 0.

  Args:
    labels: the class of each document.
    keys: documents with equal ones are all in one fold.
    folds: how many there are.
    seed: of the order in which documents are dealt out.

  Raises:
    ValueError: fewer keys than folds.
  """
  from sklearn.model_selection import StratifiedGroupKFold

  different = len(set(keys))
  if different < folds:
    raise ValueError(
      f'config.folds={folds} needs as many documents that have nothing in common, and there are '
      f'{different}.'
    )
  if different < len(keys):
    logging.info(
      'Folds: %d of %d documents say the same as an earlier one, or are of its group, and are in '
      'its fold.',
      len(keys) - different,
      len(keys),
    )
  number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
  groups = np.array([number[key] for key in keys])
  rare = [name for name, count in collections.Counter(labels).items() if count < folds]
  if rare:
    logging.warning(
      'Folds: %d classes have fewer than %d documents, such as %s; some folds have none of them.',
      len(rare),
      folds,
      rare[0],
    )
  # Its own check counts documents of the most frequent class; one class of all passes always.
  codes = np.unique(labels, return_inverse=True)[1]
  if np.max(np.bincount(codes)) < folds:
    codes = np.zeros_like(codes)
  splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
  found = np.zeros(len(keys), np.int64)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # it says of rare classes what has just been said
    for fold, (_, held) in enumerate(splitter.split(codes, codes, groups)):
      found[held] = fold
  return found


def report(workdir: pathlib.Path, numbers: Sequence[Mapping[str, float]]) -> None:
  """Writes `folds.json` and `folds.txt`, and logs the means.

  Args:
    workdir: of the cross-validation.
    numbers: of each fold, by name.
  """
  names = [name for name in numbers[0] if all(name in each for each in numbers)]
  columns = {name: [float(each[name]) for each in numbers] for name in names}
  mean = {name: statistics.fmean(column) for name, column in columns.items()}
  deviation = {name: statistics.stdev(column) for name, column in columns.items()}
  lines = [f'{"":>24}{"mean":>12}{"deviation":>12}' + _cells(range(1, len(numbers) + 1), 'd')]
  for name in names:
    lines.append(f'{name:>24}' + _cells([mean[name], deviation[name], *columns[name]], '.4f'))
  if hosts.primary():
    with files.whole_file(workdir / NUMBERS) as file:
      json.dump({'mean': mean, 'deviation': deviation, 'folds': list(numbers)}, file, indent=2)
    (workdir / REPORT).write_text('\n'.join(lines) + '\n')
  shown = '  '.join(f'{name} {mean[name]:.4f} +- {deviation[name]:.4f}' for name in names)
  logging.info(
    '%d folds, mean and deviation: %s. Also in %s.', len(numbers), shown, workdir / REPORT
  )


def best(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """The numbers of the evaluation with the lowest loss, among lines of metrics.jsonl."""
  found = [line for line in lines if line.get('split') == 'validation' and 'loss' in line]
  line = min(found, key=lambda line: line['loss'] if math.isfinite(line['loss']) else math.inf)
  numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
  return {name: value for name, value in numbers.items() if name != 'step'}


def _letters(text: str) -> str:
  folded = unicodedata.normalize('NFKC', text).casefold()
  return ''.join(sign for sign in folded if sign.isalnum()) or folded


def _cells(values: Sequence[Any], form: str) -> str:
  return ''.join(f'{format(value, form):>12}' for value in values)
