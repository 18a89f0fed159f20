"""The token cache: a corpus encoded once, in parallel processes, into memory-mapped files; read by
every later run.

One directory per corpus, named by a hash of what its content depends on: source, tokenizer, and the
objectives' `encode`. Columns are raw little files, so that building needs no more memory than a few
chunks:

| file | entries | meaning |
|---|---|---|
| NAME.values.bin | entries of all arrays | the arrays `NAME` of all documents, end to end |
| NAME.offsets.bin | documents + 1 | where each of them begins |
| NAME.jsonl | documents | other values `NAME`, as JSON; null where a document has none |
| hashes.bin | documents | uint64 of the text and its pair: the validation split |
| bytes.bin | documents | UTF-8 bytes of the text and its pair |
| meta.json | | counts, types, and the size and checksum that each file must have |

Ids (`tokens`, `pair_tokens`) are stored in the smallest type that holds the vocabulary.
"""

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from absl import logging

from llm_jax.core.contracts import Record, Source, Tokenizer
from llm_jax.data import cache_writer, encoding
from llm_jax.data.documents import Arrays, Ragged

MOST_CHECKED = 1 << 31  # bytes of a cache that is read at each start to see whether it is whole
FORMAT = 2  # 1: texts, pairs and labels only
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build(
  source: Source,
  tokenizer: Tokenizer,
  encoder: encoding.Encoder,
  directory: str,
  workers: int = 0,
) -> 'Corpus':
  """Opens the encoded corpus in `directory`; encodes it first if it is not there or is damaged.

  A second process that wants the same corpus waits for the first. The cache appears under its name
  only when it is whole.

  Args:
    source: the records; sent to the worker processes, so it must pickle.
    tokenizer: likewise.
    encoder: how the objectives that will read the corpus encode a record; likewise.
    directory: where caches are kept (`config.data.cache`); created if need be.
    workers: processes to encode with; 0 takes one per core.

  Raises:
    ValueError: no documents, no tokens in any of them, ids outside the vocabulary, what the
      contract does not let `encode` give, a negative `workers`.
    OSError: the disk is full; what was written is removed, and the message says how much is needed.
  """
  if workers < 0:
    raise ValueError(f'workers={workers} must be at least 1, or 0 for one process per core.')
  key = [source.fingerprint, tokenizer.fingerprint, FORMAT, encoder.identity]
  name = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
  final = os.path.join(directory, name)
  where = getattr(source, 'where', None)
  if os.path.isdir(final) and not _damage(final):
    return Corpus(final, where)
  os.makedirs(directory, exist_ok=True)
  with open(f'{final}.lock', 'w') as lock:
    # The kernel releases it when the process dies, however it dies.
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.path.isdir(final):
      damage = _damage(final)
      if not damage:
        return Corpus(final, where)
      logging.warning('The token cache %s is damaged (%s); it is built again.', final, damage)
      shutil.rmtree(final)
    job = cache_writer.Job(source, tokenizer, encoder)
    _build(job, final, workers or os.cpu_count() or 1)
  return Corpus(final, where)


def held_out(record: Record, share: float) -> bool:
  """Whether a record belongs to the share that is held out: the rule of `Corpus.split`, before
  there is a corpus.
  """
  value = np.frombuffer(encoding.digest(record), np.uint64)[0]
  return bool(value < _threshold(share))


class Corpus:
  """An encoded corpus on disk.

  Args:
    directory: where it is.
    where: says where a record of its source stands.

  Attributes:
    fingerprint: changes whenever a document or its ids could.
    names: the arrays.
    arrays: by name, memory-mapped.
    tokens_total: ids of all documents (entries of all arrays, where none holds ids).
    bytes_total: UTF-8 bytes of their texts and pairs.
    hashes: [documents] uint64.
    bytes: [documents] int64.
  """

  def __init__(self, directory: str, where: Callable[[int], str] | None = None):
    self.where = where or 'document {}'.format
    with open(os.path.join(directory, 'meta.json')) as file:
      self._meta = meta = json.load(file)
    self.directory = directory
    self.fingerprint = os.path.basename(directory)
    self.tokens_total: int = meta['tokens']
    self.bytes_total: int = meta['bytes']
    self.names = frozenset(meta['arrays'])
    self.arrays = Arrays()
    for name, dtype in meta['arrays'].items():
      entries = _column(directory, f'{name}.values.bin', dtype)
      offsets = _column(directory, f'{name}.offsets.bin', np.int64)
      self.arrays[name] = Ragged(entries, offsets)
    self.hashes = _column(directory, 'hashes.bin', np.uint64)
    self.bytes = _column(directory, 'bytes.bin', np.int64)
    self._values: dict[str, list[Any]] = {}

  def __len__(self) -> int:
    return len(self.hashes)

  def values(self, name: str) -> list[Any] | None:
    """Per document what `encode` gave under `name` that is no array; None where none has it."""
    if name not in self._meta['values']:
      return None
    if name not in self._values:
      with open(os.path.join(self.directory, f'{name}.jsonl')) as file:
        self._values[name] = [json.loads(line) for line in file]
    return self._values[name]

  @functools.cached_property
  def content(self) -> str:
    """A hash of what the documents say, in order, and of their labels, wherever the files lie and
    whenever they were written.

    Text, pair and label are hashed themselves; what other `encode` functions give is, too.
    Checkpoints keep this: it must never change.
    """
    digest = hashlib.blake2b(self.hashes.tobytes(), digest_size=16)
    if 'label' in self._meta['values']:
      with open(os.path.join(self.directory, 'label.jsonl'), 'rb') as file:
        digest.update(file.read())
    for name, of_file in sorted(self._meta['digests'].items()):
      digest.update(f'{name} {of_file}'.encode())
    return digest.hexdigest()

  def split(self, validation: float) -> tuple['Split', 'Split']:
    """Training and validation documents; a document is in validation when its hash, as a fraction,
    is below `validation`.

    So a document never changes sides when others are added or removed, and copies of it are all on
    the same side.

    Raises:
      ValueError: `validation` is not in [0, 1), or (when it is above 0) one side is left without a
        token.
    """
    if not 0 <= validation < 1:
      raise ValueError(f'validation={validation} must be a share of the documents in [0, 1).')
    held = self.hashes < _threshold(validation)
    train = Split(self, np.flatnonzero(~held))
    other = Split(self, np.flatnonzero(held))
    if validation and not (train.tokens_total and other.tokens_total):
      raise ValueError(
        f'validation={validation} leaves {len(train)} documents ({train.tokens_total} tokens) for '
        f'training and {len(other)} ({other.tokens_total} tokens) for validation, of {len(self)}; '
        "both need some. Cut the corpus into more documents (unit='line' or unit='block' of text "
        'files), change the share, or set it to 0 for no validation.'
      )
    return train, other


class Split:
  """Some documents of a corpus, by index; implements `contracts.Documents`.

  Attributes:
    ids: [documents] int64, the index of each document in the source.
    names: the arrays.
    bytes: UTF-8 bytes of all texts and pairs.
    tokens_total: as the corpus counts them.
  """

  def __init__(self, corpus: Corpus, ids: np.ndarray):
    self.corpus = corpus
    self.ids = ids
    self.names = corpus.names
    self.bytes = int(corpus.bytes[ids].sum())
    self._arrays = corpus.arrays
    self._lengths: dict[str, np.ndarray] = {}
    self._values: dict[str, list[Any]] = {}

  def __len__(self) -> int:
    return len(self.ids)

  @property
  def hashes(self) -> np.ndarray:
    """[documents] uint64, of the text and pair of each document."""
    return self.corpus.hashes[self.ids]

  @functools.cached_property
  def tokens_total(self) -> int:
    return sum(int(self.lengths(name).sum()) for name in encoding.counted(self.names))

  def lengths(self, name: str) -> np.ndarray:
    """See the contract."""
    if name not in self._lengths:
      self._lengths[name] = np.diff(self._arrays[name].offsets)[self.ids]
    return self._lengths[name]

  def array(self, name: str, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """See the contract."""
    return self._arrays[name].part(self.ids[index], start, stop)

  def values(self, name: str) -> list[Any] | None:
    """See the contract."""
    whole = self.corpus.values(name)
    if whole is None:
      return None
    if name not in self._values:
      self._values[name] = [whole[i] for i in self.ids.tolist()]
    return self._values[name]

  def where(self, index: int) -> str:
    """See the contract."""
    return self.corpus.where(int(self.ids[index]))


def _threshold(share: float) -> np.uint64:
  return np.uint64(int(share * 2**64))


def _column(directory: str, name: str, dtype: npt.DTypeLike) -> np.ndarray:
  path = os.path.join(directory, name)
  if not os.path.getsize(path):  # an empty file cannot be mapped
    return np.zeros(0, dtype)
  mapped = np.memmap(path, dtype, mode='r')
  return mapped.view(np.ndarray)  # plain arrays slice several times faster


def _damage(directory: str) -> str:
  """What is wrong with a cache, or an empty string. Of one above `MOST_CHECKED` bytes only the
  sizes are looked at, for reading it would take longer than starting.
  """
  try:
    with open(os.path.join(directory, 'meta.json')) as file:
      meta = json.load(file)
    sizes, checksums = meta['files'], meta.get('checksums', {})
    found = {name: os.path.getsize(os.path.join(directory, name)) for name in sizes}
  except (FileNotFoundError, ValueError, KeyError) as error:
    return f'{type(error).__name__}: {error}'
  for name, size in sizes.items():
    if found[name] != size:
      return f'{name} has {found[name]} bytes, not {size}'
  if sum(sizes.values()) > MOST_CHECKED:
    return ''
  for name, value in checksums.items():
    if cache_writer.checksum(os.path.join(directory, name)) != value:
      return f'{name} is not what was written'
  return ''


def _build(job: cache_writer.Job, final: str, workers: int) -> None:
  """Encodes into a sibling directory and renames it to `final`; a failure leaves nothing behind."""
  partial = f'{final}.building-{socket.gethostname()}'
  shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed: its lock is ours now
  os.mkdir(partial)
  counts = cache_writer.Counts()
  try:
    cache_writer.write(job, partial, workers, counts, FORMAT)
    _rename(partial, final)
  except OSError as error:
    if error.errno not in DISK_FULL:
      raise
    shutil.rmtree(partial)
    needed = counts.size * len(job.source) // max(counts.documents, 1)
    raise _disk_full(error, os.path.dirname(final), needed) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: str, final: str) -> None:
  try:
    os.rename(partial, final)
  except OSError:
    # Locks do not reach across hosts on every shared disk: another host may have finished the same
    # corpus meanwhile.
    if not os.path.isdir(final) or _damage(final):
      raise


def _disk_full(error: OSError, directory: str, needed: int) -> OSError:
  return OSError(
    error.errno,
    f'{error.strerror} while the token cache was written to {directory}: it needs about {needed} '
    f'bytes, {shutil.disk_usage(directory).free} are free now that the unfinished build is '
    'removed. Make room, or set config.data.cache to a directory on another disk',
  )
