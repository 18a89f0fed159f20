"""Writing the files of a token cache (`data.cache` says which): records are encoded in chunks, by
worker processes if it takes longer than a moment, and appended to one file per column.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import time
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from absl import logging

from llm_jax.core import progress
from llm_jax.core.contracts import Encoded, Record, Source, Tokenizer
from llm_jax.data import encoding

IN_PROCESS_SECONDS = 2.0  # a corpus that is encoded sooner is not worth starting processes for
CHUNK_SECONDS = 0.1
CHUNK_DOCUMENTS = 256  # at most, whatever their speed: later ones may be far longer than the first


class Job(NamedTuple):
  """What is encoded and how; sent to worker processes."""

  source: Source
  tokenizer: Tokenizer
  encoder: encoding.Encoder


class Chunk(NamedTuple):
  """Consecutive documents, encoded.

  Attributes:
    arrays: by name: entries of all arrays end to end, and [documents] int64, their lengths.
    values: by name: a line of JSON per document.
    hashes: [documents] uint64.
    bytes: [documents] int64.
  """

  arrays: dict[str, tuple[np.ndarray, np.ndarray]]
  values: dict[str, list[str]]
  hashes: np.ndarray
  bytes: np.ndarray


@dataclasses.dataclass
class Counts:
  """What has been written so far.

  Attributes:
    documents: how many.
    entries: of each array.
    bytes: UTF-8 bytes of texts and pairs.
    size: bytes on disk.
  """

  documents: int = 0
  entries: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  bytes: int = 0
  size: int = 0

  @property
  def tokens(self) -> int:
    """Entries of the arrays that are counted as tokens."""
    return sum(self.entries[name] for name in encoding.counted(self.entries))

  def add(self, chunk: Chunk) -> None:
    """Counts a chunk."""
    self.documents += len(chunk.hashes)
    self.bytes += int(chunk.bytes.sum())
    self.size += chunk.hashes.nbytes + chunk.bytes.nbytes
    for name, (entries, lengths) in chunk.arrays.items():
      self.entries[name] += len(entries)
      self.size += entries.nbytes + lengths.nbytes
    for lines in chunk.values.values():
      self.size += sum(map(len, lines)) + len(lines)


def write(job: Job, directory: str, workers: int, counts: Counts, version: int) -> None:
  """Encodes all documents into the files of `directory`, the description last.

  Args:
    job: what to encode.
    directory: an empty folder.
    workers: processes.
    counts: is kept up to date, so that a caller knows how far an attempt came.
    version: of the format.
  """
  began = time.monotonic()
  with contextlib.ExitStack() as stack:
    files = _Files(directory, stack)
    bar = stack.enter_context(progress.Progress('Tokenizing', len(job.source), 'documents'))
    for chunk in _chunks(job, workers):
      before = counts.documents
      counts.add(chunk)
      files.write(chunk, before)
      bar.advance(len(chunk.hashes))
  if not any(counts.entries.values()):
    raise ValueError(
      f'empty corpus: {counts.documents} documents with {counts.bytes} bytes of text hold no '
      'token; check what config.data points at.'
    )
  meta = {'format': version} | _described(job, directory, files, counts)
  with open(os.path.join(directory, 'meta.json'), 'w') as file:
    json.dump(meta, file, indent=2)
  seconds = time.monotonic() - began
  logging.info(
    'Tokenized %d documents: %d tokens of %d bytes in %.1f s, %.0f tokens/s.',
    counts.documents,
    counts.tokens,
    counts.bytes,
    seconds,
    counts.tokens / seconds,
  )


def encode(job: Job, start: int, stop: int) -> Chunk:
  """Documents `start` to `stop` of the source, encoded."""
  encoded, hashes, sizes = [], [], []
  for index in range(start, stop):
    try:
      record = job.source[index]
      found = _encoded(job, index, record)
      parts, side = encoding.spelled(record), encoding.digest(record)
      for name, value in found.items():
        if not isinstance(value, np.ndarray):
          found[name] = json.dumps(value)
    except Exception as error:
      error.add_note(f'while tokenizing document {index}')
      raise
    encoded.append(found)
    hashes.append(side)
    sizes.append(sum(map(len, parts)))
  arrays, values = encoding.columns(encoded, job.tokenizer.vocab_size, start)
  lines = {name: [line or 'null' for line in column] for name, column in values.items()}
  joined = np.frombuffer(b''.join(hashes), np.uint64)
  return Chunk(arrays, lines, joined, np.asarray(sizes, np.int64))


def _encoded(job: Job, index: int, record: Record) -> Encoded:
  """What `encode` makes of a record; its error names file and line where the source knows them."""
  try:
    return job.encoder(record, job.tokenizer)
  except ValueError as error:
    if not hasattr(job.source, 'where'):
      raise
    raise ValueError(f'{job.source.where(index)}: {error}') from error


class _Files:
  """The files of a cache while they are written.

  A name may turn up late (the first document that has a pair): its column then begins with as many
  empty entries as there are documents before.
  """

  def __init__(self, directory: str, stack: contextlib.ExitStack):
    self.directory, self.stack = directory, stack
    self.arrays: dict[str, _Array] = {}
    self.values: dict[str, BinaryIO] = {}
    self.hashes, self.bytes = self._open('hashes.bin'), self._open('bytes.bin')

  def write(self, chunk: Chunk, before: int) -> None:
    """Appends a chunk that `before` documents come before."""
    count = len(chunk.hashes)
    for name in sorted(chunk.arrays.keys() - self.arrays.keys()):
      self.arrays[name] = _Array(
        self._open(f'{name}.values.bin'), self._open(f'{name}.offsets.bin'), before
      )
    for name in sorted(chunk.values.keys() - self.values.keys()):
      self.values[name] = self._open(f'{name}.jsonl')
      self.values[name].write(b'null\n' * before)
    for name in self.arrays.keys() & self.values.keys():
      raise ValueError(
        f'`encode` gives {name!r} as an array for some documents and as something else for others; '
        f'one or the other is needed (found in documents {before} to {before + count - 1}).'
      )
    nothing = np.zeros(0, np.int64), np.zeros(count, np.int64)
    for name, array in self.arrays.items():
      array.write(*chunk.arrays.get(name, nothing))
    for name, file in self.values.items():
      lines = chunk.values.get(name) or ['null'] * count
      file.write(''.join(f'{line}\n' for line in lines).encode())
    self.hashes.write(chunk.hashes.tobytes())
    self.bytes.write(chunk.bytes.tobytes())

  def _open(self, name: str) -> BinaryIO:
    return self.stack.enter_context(open(os.path.join(self.directory, name), 'wb'))


class _Array:
  """The two files of one array column; `before` documents without entries come first."""

  def __init__(self, values: BinaryIO, offsets: BinaryIO, before: int):
    self.values, self.offsets, self.end = values, offsets, 0
    offsets.write(np.zeros(before + 1, np.int64).tobytes())

  def write(self, entries: np.ndarray, lengths: np.ndarray) -> None:
    self.values.write(entries.tobytes())
    self.offsets.write((self.end + np.cumsum(lengths)).tobytes())
    self.end += len(entries)


def _described(job: Job, directory: str, files: _Files, counts: Counts) -> dict[str, Any]:
  """What `meta.json` says of the files, when they are written to the end."""
  names = sorted(os.listdir(directory))
  vocab_size = job.tokenizer.vocab_size
  return dict(
    documents=counts.documents,
    tokens=counts.tokens,
    bytes=counts.bytes,
    encoders=job.encoder.identity,
    arrays={name: encoding.dtype(name, vocab_size).name for name in files.arrays},
    values=sorted(files.values),
    digests=_digests(directory, names, job.encoder),
    files={name: os.path.getsize(os.path.join(directory, name)) for name in names},
    checksums={name: checksum(os.path.join(directory, name)) for name in names},
  )


def checksum(path: str) -> int:
  """CRC-32 of a file."""
  value = 0
  with open(path, 'rb') as file:
    while block := file.read(1 << 22):
      value = zlib.crc32(block, value)
  return value


def _digests(directory: str, names: list[str], encoder: encoding.Encoder) -> dict[str, str]:
  """Hashes of the columns by file name, where it is not text, pair and label alone that decide."""
  if encoder.identity == (encoding.TEXT,):
    return {}
  digests = {}
  for name in names:
    if name in ('hashes.bin', 'bytes.bin', 'label.jsonl'):
      continue
    with open(os.path.join(directory, name), 'rb') as file:
      digests[name] = hashlib.file_digest(file, 'blake2b').hexdigest()
  return digests


def _chunks(job: Job, workers: int) -> Iterator[Chunk]:
  """All documents in order, in chunks of about CHUNK_SECONDS; processes are started only when it
  takes longer than a moment.
  """
  total, done, size = len(job.source), 0, 16
  if not total:
    raise ValueError('empty corpus: the source has no documents; check what config.data points at.')
  began = time.monotonic()
  while done < total and (workers == 1 or time.monotonic() - began < IN_PROCESS_SECONDS):
    stop = min(done + size, total)
    yield encode(job, done, stop)
    done = stop
    speed = done / (time.monotonic() - began)
    size = min(max(int(speed * CHUNK_SECONDS), 1), CHUNK_DOCUMENTS)
  if done < total:
    yield from _parallel(job, range(done, total, size), workers)


def _parallel(job: Job, starts: range, workers: int) -> Iterator[Chunk]:
  """Chunks in order, with only a few in flight, so that one slow document cannot pile up the others
  in memory.
  """
  pending: collections.deque[concurrent.futures.Future] = collections.deque()
  pool = concurrent.futures.ProcessPoolExecutor(
    workers,
    multiprocessing.get_context('spawn'),
    initializer=_start_worker,
    initargs=(job,),
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


_worker: list[Any] = []  # the job, in a worker process only


def _start_worker(job: Job) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
  _worker[:] = [job]


def _work(start: int, stop: int) -> Chunk:
  return encode(_worker[0], start, stop)
