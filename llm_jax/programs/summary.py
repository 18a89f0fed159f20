"""What a training set looks like. A run keeps it as `data.json` in its folder, so that a service
can tell whether what it is asked still looks like that.

Lengths and classes are those of all documents. The share of unknown tokens is that of the first
`SAMPLE` documents, of each the first `SAMPLE_TOKENS` tokens: a large corpus is not read for it.
"""

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core import files
from llm_jax.core.contracts import Documents, Encoded, Tokenizer
from llm_jax.data import encoding

FILE = 'data.json'
BOUNDS = tuple(2**n for n in range(17))  # of the lengths that are counted together
SAMPLE, SAMPLE_TOKENS = 10_000, 4096
MOST_CLASSES = 100  # with more of them, shares of single classes say little
WRITTEN = ('target_tokens',)  # arrays of ids that a model is to write, and is not given


class Summary(NamedTuple):
  """A training set in a few numbers.

  Attributes:
    documents: how many there are.
    lengths: by a number of tokens, the share of the documents that have no more; none where they
      have no tokens.
    unknown_share: of the tokens; None where the tokenizer has no token for what it cannot spell.
    sampled: documents that this share is of.
    classes: the share of each class among all labels, or of each tag among all tags; none where
      there are none, or more than `MOST_CLASSES`.
  """

  documents: int
  lengths: dict[int, float]
  unknown_share: float | None
  sampled: int
  classes: dict[str, float]


def of(documents: Sequence[Documents], tokenizer: Tokenizer, classes: Sequence[str]) -> Summary:
  """The summary of a training set.

  Args:
    documents: of each corpus.
    tokenizer: made their ids.
    classes: that a document can be of.
  """
  lengths = np.concatenate([_lengths(split) for split in documents])
  counts = np.bincount(np.searchsorted(BOUNDS, lengths), minlength=len(BOUNDS) + 1)
  below = np.cumsum(counts[: len(BOUNDS)]) / max(len(lengths), 1)
  shown = dict(zip(BOUNDS, below.tolist(), strict=True)) if lengths.any() else {}
  sampled, share = _unknown(documents, unknown_id(tokenizer))
  shares = {}
  if 0 < len(classes) <= MOST_CLASSES:
    given = collections.Counter(name for split in documents for name in _labels(split))
    total = sum(given.values())
    shares = {name: given[name] / total for name in classes} if total else {}
  return Summary(len(lengths), shown, share, sampled, shares)


def write(folder: pathlib.Path, summary: Summary) -> None:
  """Writes `data.json`, whole or not at all."""
  with files.whole_file(folder / FILE) as file:
    json.dump(summary._asdict(), file, indent=2, ensure_ascii=False)
    file.write('\n')


def read(folder: pathlib.Path) -> Summary | None:
  """The summary that a run keeps; None where it keeps none.

  Raises:
    ValueError: the file is none that `write` wrote.
  """
  path = folder / FILE
  if not path.is_file():
    return None
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    found['lengths'] = {int(bound): share for bound, share in found['lengths'].items()}
    return Summary(**found)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f'{path} does not describe a training set ({error}); remove it.') from error


def unknown_id(tokenizer: Tokenizer) -> int | None:
  """The id of what the vocabulary cannot spell; None where that is another special token, which
  stands for something else.
  """
  others = {'pad_id', 'cls_id', 'sep_id', 'mask_id', 'bos_id', 'eos_id'}
  taken = {getattr(tokenizer, name) for name in others}
  return None if tokenizer.unk_id in taken else tokenizer.unk_id


def ids(encoded: Encoded) -> np.ndarray:
  """The ids of a record that a model is given, [n]."""
  found = [encoded[name] for name in _read(encoded)]
  return np.concatenate(found) if found else np.zeros(0, np.int32)


def labels(found: Mapping[str, Any]) -> list[str]:
  """The classes that a record has, or that an answer gives: a label, several, or tags."""
  label = found.get('label', found.get('tags'))
  if label is None:
    return []
  return [str(one) for one in label] if isinstance(label, list | tuple) else [str(label)]


def _read(names: Iterable[str]) -> list[str]:
  return [name for name in sorted(names) if encoding.holds_ids(name) and name not in WRITTEN]


def _lengths(documents: Documents) -> np.ndarray:
  found = np.zeros(len(documents), np.int64)
  for name in _read(documents.names):
    found = found + documents.lengths(name)
  return found


def _unknown(documents: Sequence[Documents], number: int | None) -> tuple[int, float | None]:
  """How many documents were looked at, and the share of this id among their tokens."""
  places = ((split, index) for split in documents for index in range(min(len(split), SAMPLE)))
  sampled = tokens = unknown = 0
  for split, index in places if number is not None else ():
    if sampled == SAMPLE:
      break
    sampled += 1
    for name in _read(split.names):
      found = split.array(name, index, 0, SAMPLE_TOKENS)
      tokens += len(found)
      unknown += int((found == number).sum())
  return sampled, unknown / tokens if tokens else None


def _labels(documents: Documents) -> Iterable[str]:
  for name in ('label', 'tags'):
    for value in documents.values(name) or ():
      yield from labels({name: value})
