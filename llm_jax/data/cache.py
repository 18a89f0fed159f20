"""The token cache: a corpus tokenized once, in parallel processes, into memory-mapped files; read
by every later run.

One directory a corpus, named by a hash of the source's and the tokenizer's fingerprints. Columns
are raw little files, an entry a document (a token for `tokens` and `pair_tokens`), so that building
needs no more memory than a few chunks:

| file | entries | meaning |
|---|---|---|
| tokens.bin, offsets.bin | tokens; documents + 1 | ids of all texts end to end, in the smallest type; where each begins |
| pair_tokens.bin, pair_offsets.bin | likewise | the second texts, empty where a document has none |
| hashes.bin | documents | uint64 of the text and its pair: the validation split |
| bytes.bin | documents | UTF-8 bytes of the text and its pair |
| labels.jsonl | documents | JSON, null where a document has none |
| meta.json | | counts, types, and the size that each file must have |
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from absl import logging

from llm_jax.core.contracts import Source, Tokenizer

FORMAT = 1
IN_PROCESS_SECONDS = (
  2.0  # a corpus that is tokenized sooner than this is not worth starting processes for
)
CHUNK_SECONDS = 0.1
CHUNK_DOCUMENTS = (
  256  # at most, whatever their speed: later documents may be far longer than the first
)
LOG_SECONDS = 10.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build(source: Source, tokenizer: Tokenizer, directory: str, workers: int = 0) -> 'Corpus':
  """Opens the tokenized corpus in `directory`, tokenizing it first where it is not there or is
  damaged.

  A second process that wants the same corpus waits for the first. The cache appears under its name
  only when it is whole.

  Args:
    source: the documents; sent to the worker processes, so it must pickle.
    tokenizer: likewise.
    directory: where caches are kept (`config.data.cache`); created if need be.
    workers: processes to tokenize with; 0 takes one a core.

  Raises:
    ValueError: no documents, no tokens in any of them, ids outside the vocabulary, a negative
      `workers`.
    OSError: the disk is full; what was written is removed, and the message says how much is needed.
  """
  if workers < 0:
    raise ValueError(f'workers={workers} must be at least 1, or 0 for one process a core.')
  fingerprint = _digest(
    json.dumps([source.fingerprint, tokenizer.fingerprint, FORMAT]).encode(), size=16
  ).hex()
  final = os.path.join(directory, fingerprint)
  if os.path.isdir(final) and not _damage(final):
    return Corpus(final)
  os.makedirs(directory, exist_ok=True)
  with open(f'{final}.lock', 'w') as lock:
    fcntl.flock(
      lock, fcntl.LOCK_EX
    )  # released by the kernel when the process dies, however it dies
    if os.path.isdir(final):
      damage = _damage(final)
      if not damage:
        return Corpus(final)
      logging.warning('The token cache %s is damaged (%s); it is built again.', final, damage)
      shutil.rmtree(final)
    _build(source, tokenizer, final, workers or os.cpu_count() or 1)
  return Corpus(final)


def held_out(document: Mapping[str, Any], validation: float) -> bool:
  """Whether a document is one of the share `validation`, by its hash: the rule of `Corpus.split`,
  before there is a corpus.
  """
  return bool(np.frombuffer(_hash(document), np.uint64)[0] < _threshold(validation))


class Corpus:
  """A tokenized corpus on disk.

  Attributes:
    fingerprint: changes whenever a document or its ids could.
    tokens_total: tokens of all texts and pairs.
    bytes_total: their UTF-8 bytes.
    offsets, pair_offsets: [documents + 1] int64.
    tokens, pair_tokens: [tokens] unsigned ids, memory-mapped.
    hashes: [documents] uint64.
    bytes: [documents] int64.
  """

  def __init__(self, directory: str):
    with open(os.path.join(directory, 'meta.json')) as file:
      meta = json.load(file)
    self.directory = directory
    self.fingerprint: str = os.path.basename(directory)
    self.tokens_total: int = meta['tokens']
    self.bytes_total: int = meta['bytes']
    self.has_pairs: bool = meta['has_pairs']
    self.has_labels: bool = meta['has_labels']
    self.tokens = _column(directory, 'tokens.bin', meta['dtype'])
    self.offsets = _column(directory, 'offsets.bin', np.int64)
    self.pair_tokens = _column(directory, 'pair_tokens.bin', meta['dtype'])
    self.pair_offsets = _column(directory, 'pair_offsets.bin', np.int64)
    self.hashes = _column(directory, 'hashes.bin', np.uint64)
    self.bytes = _column(directory, 'bytes.bin', np.int64)

  def __len__(self) -> int:
    return len(self.hashes)

  @functools.cached_property
  def labels(self) -> list[Any] | None:
    """One a document (None where it has none), or None where no document has one."""
    if not self.has_labels:
      return None
    with open(os.path.join(self.directory, 'labels.jsonl')) as file:
      return [json.loads(line) for line in file]

  @functools.cached_property
  def content(self) -> str:
    """A hash of what the documents say, in order, and of their labels, wherever the files lie and
    whenever they were written.
    """
    digest = hashlib.blake2b(self.hashes.tobytes(), digest_size=16)
    with open(os.path.join(self.directory, 'labels.jsonl'), 'rb') as file:
      digest.update(file.read())
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
    sides = Split(self, np.flatnonzero(~held)), Split(self, np.flatnonzero(held))
    if validation and not all(side.tokens_total for side in sides):
      raise ValueError(
        f'validation={validation} leaves {len(sides[0])} documents ({sides[0].tokens_total} '
        'tokens) for training and '
        f'{len(sides[1])} ({sides[1].tokens_total} tokens) for validation, of {len(self)}; both '
        'need some. '
        "Cut the corpus into more documents (unit='line' or unit='block' of text files), change "
        'the share, '
        'or set it to 0 for no validation.'
      )
    return sides


class Split:
  """Some documents of a corpus, by index; the contract `Documents`.

  Attributes:
    ids: [documents] int64, the index of each document in the source.
    lengths, pair_lengths, labels: see the contract.
    bytes: UTF-8 bytes of all texts and pairs.
    tokens_total: their tokens.
  """

  def __init__(self, corpus: Corpus, ids: np.ndarray):
    self.corpus = corpus
    self.ids = ids
    self.lengths = np.diff(corpus.offsets)[ids]
    self.pair_lengths = np.diff(corpus.pair_offsets)[ids] if corpus.has_pairs else None
    self.bytes = int(corpus.bytes[ids].sum())
    self.tokens_total = int(self.lengths.sum()) + (
      int(self.pair_lengths.sum()) if corpus.has_pairs else 0
    )

  def __len__(self) -> int:
    return len(self.ids)

  @functools.cached_property
  def labels(self) -> Sequence[Any] | None:
    labels = self.corpus.labels
    return None if labels is None else [labels[i] for i in self.ids.tolist()]

  def text(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """[stop - start] int32 ids of a part of one text; both ends are cut to the text, as in a Python
    slice.
    """
    return _document(self.corpus.tokens, self.corpus.offsets, self.ids[index])[start:stop].astype(
      np.int32
    )

  def pair(self, index: int) -> np.ndarray:
    """[n] int32 ids of the second text, empty where the document has none."""
    return _document(self.corpus.pair_tokens, self.corpus.pair_offsets, self.ids[index]).astype(
      np.int32
    )


class _Chunk(NamedTuple):
  """Consecutive documents, tokenized."""

  tokens: np.ndarray
  lengths: np.ndarray
  pair_tokens: np.ndarray
  pair_lengths: np.ndarray
  hashes: np.ndarray
  bytes: np.ndarray
  labels: list[Any]
  has_pairs: bool


@dataclasses.dataclass
class _Counts:
  documents: int = 0
  tokens: int = 0
  pair_tokens: int = 0
  bytes: int = 0
  has_pairs: bool = False
  has_labels: bool = False

  def add(self, chunk: _Chunk) -> None:
    self.documents += len(chunk.lengths)
    self.tokens += len(chunk.tokens)
    self.pair_tokens += len(chunk.pair_tokens)
    self.bytes += int(chunk.bytes.sum())
    self.has_pairs |= chunk.has_pairs
    self.has_labels |= any(label is not None for label in chunk.labels)


def _document(tokens: np.ndarray, offsets: np.ndarray, index: int) -> np.ndarray:
  return tokens[offsets[index] : offsets[index + 1]]


def _threshold(validation: float) -> np.uint64:
  return np.uint64(int(validation * 2**64))


def _hash(document: Mapping[str, Any]) -> bytes:
  return _digest(
    b'\0'.join((document['text'].encode(), (document.get('pair') or '').encode())), size=8
  )


def _digest(data: bytes, size: int) -> bytes:
  return hashlib.blake2b(data, digest_size=size).digest()


def _column(directory: str, name: str, dtype: Any) -> np.ndarray:
  path = os.path.join(directory, name)
  if not os.path.getsize(path):  # an empty file cannot be mapped
    return np.zeros(0, dtype)
  return np.memmap(path, dtype, mode='r').view(
    np.ndarray
  )  # plain arrays slice several times faster


def _damage(directory: str) -> str:
  """What is wrong with a cache, or an empty string."""
  try:
    with open(os.path.join(directory, 'meta.json')) as file:
      sizes = json.load(file)['files']
    found = {name: os.path.getsize(os.path.join(directory, name)) for name in sizes}
  except (FileNotFoundError, ValueError, KeyError) as error:
    return f'{type(error).__name__}: {error}'
  return '; '.join(
    f'{name} has {found[name]} bytes, not {size}'
    for name, size in sizes.items()
    if found[name] != size
  )


def _build(source: Source, tokenizer: Tokenizer, final: str, workers: int) -> None:
  """Tokenizes into a sibling directory and renames it to `final`; leaves nothing behind when that
  fails.
  """
  partial = f'{final}.building-{socket.gethostname()}'
  shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed: its lock is ours now
  os.mkdir(partial)
  counts = _Counts()
  try:
    _write(source, tokenizer, partial, workers, counts)
    _rename(partial, final)
  except OSError as error:
    if error.errno not in DISK_FULL:
      raise
    shutil.rmtree(partial)
    raise _disk_full(
      error, os.path.dirname(final), counts, len(source), _dtype(tokenizer).itemsize
    ) from error
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


def _disk_full(
  error: OSError, directory: str, counts: _Counts, documents: int, itemsize: int
) -> OSError:
  each = ((counts.tokens + counts.pair_tokens) * itemsize + counts.documents * 32) / max(
    counts.documents, 1
  )
  return OSError(
    error.errno,
    f'{error.strerror} while the token cache was written to {directory}: it needs about '
    f'{int(each * documents)} bytes, {shutil.disk_usage(directory).free} are free now that the '
    'unfinished build is '
    'removed. Make room, or set config.data.cache to a directory on another disk',
  )


def _dtype(tokenizer: Tokenizer) -> np.dtype:
  return np.min_scalar_type(tokenizer.vocab_size - 1)


def _write(
  source: Source, tokenizer: Tokenizer, directory: str, workers: int, counts: _Counts
) -> None:
  """Tokenizes all documents into the files of `directory`, the description last."""
  began = time.monotonic()
  names = (
    'tokens.bin',
    'offsets.bin',
    'pair_tokens.bin',
    'pair_offsets.bin',
    'hashes.bin',
    'bytes.bin',
    'labels.jsonl',
  )
  with contextlib.ExitStack() as stack:
    files = {name: stack.enter_context(open(os.path.join(directory, name), 'wb')) for name in names}
    for name in ('offsets.bin', 'pair_offsets.bin'):
      files[name].write(np.zeros(1, np.int64).tobytes())
    for chunk in _shown(_chunks(source, tokenizer, workers), len(source), counts):
      ends = (
        counts.tokens + np.cumsum(chunk.lengths),
        counts.pair_tokens + np.cumsum(chunk.pair_lengths),
      )
      labels = ''.join(json.dumps(label) + '\n' for label in chunk.labels).encode()
      counts.add(chunk)
      columns = chunk.tokens, ends[0], chunk.pair_tokens, ends[1], chunk.hashes, chunk.bytes
      for name, data in zip(names, [c.tobytes() for c in columns] + [labels], strict=True):
        files[name].write(data)
  if not counts.tokens + counts.pair_tokens:
    raise ValueError(
      f'empty corpus: {counts.documents} documents with {counts.bytes} bytes of text hold no '
      'token; '
      'check what config.data points at.'
    )
  if not counts.has_labels:
    open(os.path.join(directory, 'labels.jsonl'), 'wb').close()
  meta = dict(
    format=FORMAT,
    documents=counts.documents,
    tokens=counts.tokens + counts.pair_tokens,
    bytes=counts.bytes,
    dtype=_dtype(tokenizer).name,
    has_pairs=counts.has_pairs,
    has_labels=counts.has_labels,
    files={name: os.path.getsize(os.path.join(directory, name)) for name in names},
  )
  with open(os.path.join(directory, 'meta.json'), 'w') as file:
    json.dump(meta, file, indent=2)
  seconds = time.monotonic() - began
  logging.info(
    'Tokenized %d documents: %d tokens of %d bytes in %.1f s, %.0f tokens/s.',
    counts.documents,
    meta['tokens'],
    counts.bytes,
    seconds,
    meta['tokens'] / seconds,
  )


def _shown(chunks: Iterator[_Chunk], documents: int, counts: _Counts) -> Iterator[_Chunk]:
  """The same chunks, with a progress bar on a terminal and a log line now and then where there is
  none.
  """
  logged = time.monotonic()
  with tqdm.tqdm(
    total=documents, desc='tokenizing', unit='doc', disable=not sys.stderr.isatty()
  ) as bar:
    for chunk in chunks:
      yield chunk
      bar.update(len(chunk.lengths))
      bar.set_postfix_str(f'{counts.tokens:,} tokens', refresh=False)
      if bar.disable and time.monotonic() - logged > LOG_SECONDS:
        logged = time.monotonic()
        logging.info(
          'Tokenizing: %d of %d documents, %d tokens.', counts.documents, documents, counts.tokens
        )


def _chunks(source: Source, tokenizer: Tokenizer, workers: int) -> Iterator[_Chunk]:
  """All documents in order, in chunks of about CHUNK_SECONDS; processes are started only when it
  takes longer than a moment.
  """
  total, done, began, size = len(source), 0, time.monotonic(), 16
  if not total:
    raise ValueError('empty corpus: the source has no documents; check what config.data points at.')
  while done < total and (workers == 1 or time.monotonic() - began < IN_PROCESS_SECONDS):
    stop = min(done + size, total)
    yield _encode(source, tokenizer, done, stop)
    done = stop
    size = min(max(int(done * CHUNK_SECONDS / (time.monotonic() - began)), 1), CHUNK_DOCUMENTS)
  if done < total:
    yield from _parallel(source, tokenizer, range(done, total, size), workers)


def _parallel(
  source: Source, tokenizer: Tokenizer, starts: range, workers: int
) -> Iterator[_Chunk]:
  """Chunks in order, with only a few in flight, so that one slow document cannot pile up the others
  in memory.
  """
  pending: collections.deque[concurrent.futures.Future] = collections.deque()
  pool = concurrent.futures.ProcessPoolExecutor(
    workers,
    multiprocessing.get_context('spawn'),
    initializer=_start_worker,
    initargs=(source, tokenizer),
  )
  try:
    for start in starts:
      pending.append(pool.submit(_work, start, min(start + starts.step, starts.stop)))
      if len(pending) > 4 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  except concurrent.futures.BrokenExecutor as error:
    error.add_note(
      'A process that tokenizes was killed, most often for want of memory: fewer workers need less.'
    )
    raise
  finally:
    pool.shutdown(cancel_futures=True)


_worker: list[Any] = []  # source and tokenizer, in a worker process only


def _start_worker(source: Source, tokenizer: Tokenizer) -> None:
  _worker[:] = source, tokenizer


def _work(start: int, stop: int) -> _Chunk:
  return _encode(*_worker, start, stop)


def _encode(source: Source, tokenizer: Tokenizer, start: int, stop: int) -> _Chunk:
  """Documents `start` to `stop` of the source, tokenized."""
  texts, pairs, hashes, sizes, labels, has_pairs = [], [], [], [], [], False
  for index in range(start, stop):
    try:
      document = source[index]
      text, pair = document['text'], document.get('pair')
      texts.append(tokenizer.encode(text))
      pairs.append([] if pair is None else tokenizer.encode(pair))
    except Exception as error:
      error.add_note(f'while tokenizing document {index}')
      raise
    hashes.append(_hash(document))
    sizes.append(len(text.encode()) + len((pair or '').encode()))
    labels.append(document.get('label'))
    has_pairs |= pair is not None
  return _Chunk(
    _narrow(texts, tokenizer, start),
    _lengths(texts),
    _narrow(pairs, tokenizer, start),
    _lengths(pairs),
    np.frombuffer(b''.join(hashes), np.uint64),
    np.asarray(sizes, np.int64),
    labels,
    has_pairs,
  )


def _lengths(texts: list[Any]) -> np.ndarray:
  return np.asarray([len(t) for t in texts], np.int64)


def _narrow(texts: list[Any], tokenizer: Tokenizer, start: int) -> np.ndarray:
  """Ids end to end in the cache's type."""
  ids = np.concatenate([np.asarray(t, np.int64) for t in texts])
  if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
    raise ValueError(
      f'the tokenizer gives ids {ids.min()} to {ids.max()} in documents {start} to '
      f'{start + len(texts) - 1}; '
      f'they must be from 0 to {tokenizer.vocab_size - 1}.'
    )
  return ids.astype(_dtype(tokenizer))
