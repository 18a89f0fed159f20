"""Plain text files, with a record for each file, line, or block of lines between blank lines."""

import codecs
import functools
import gzip
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from llm_jax.data.sources import _lines, _paths

SUFFIXES = ('.txt', '.md', '.py', '.gz')
UNITS = ('file', 'line', 'block')
_FRAGMENT = 1 << 20  # most bytes of one line held while scanning


class Source:
  """Records of text files, found by one scan and then read by their byte range.

  Line ends inside a text stay as they are in the file, CRLF too; the one that ends a line or a
  block is not part of it, and neither is a byte order mark. Texts of white space alone are left
  out. A file with invalid UTF-8 or NUL bytes is skipped whole; skipped files are counted and logged
  with the names of the first few.

  Args:
    path: a file, a folder (.txt, .md, .py, .gz at any depth), a glob, or several with commas
      between them.
    unit: what a record is: 'file', 'line', or 'block' (lines between blank lines).
    max_document_bytes: a longer text is cut in pieces of at most this size, at a line end where
      there is one and else between two characters; pieces are records of their own, counted and
      logged.

  Raises:
    ValueError: nothing matches the path, or an unknown unit; when the records are first asked
      for: a broken gzip file, or an empty corpus.
  """

  def __init__(self, path: str, unit: str = 'file', max_document_bytes: int = 16 << 20):
    if unit not in UNITS:
      raise ValueError(f'unit={unit!r} is not known; allowed: {", ".join(UNITS)}.')
    if max_document_bytes < 1024:
      raise ValueError(f'max_document_bytes={max_document_bytes} is too small; give at least 1024.')
    self.unit = unit
    self.max_document_bytes = max_document_bytes
    self.path = path
    self.files = _paths.find(path, SUFFIXES)
    self.fingerprint = _paths.fingerprint(self.files, 'text', unit, max_document_bytes)

  def __len__(self) -> int:
    return len(self._index[0])

  def __getitem__(self, index: int) -> dict[str, Any]:
    file, start, stop = (int(column[index]) for column in self._index)
    return {'text': _paths.read(self.files[file], start, stop).decode('utf-8')}

  @functools.cached_property
  def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each record: which file (int32), first byte, byte after the last (int64)."""
    files, starts, stops, skipped, cuts = [], [], [], [], 0
    for number, path in enumerate(self.files):
      try:
        ranges = self._scan_file(path)
      except UnicodeDecodeError as error:
        skipped.append(f'{path} ({error.reason})')
        continue
      files.append(np.full(len(ranges), number, np.int32))
      starts.append(ranges[:, 0])
      stops.append(ranges[:, 1])
      cuts += int(ranges[:, 2].sum())
    if skipped:
      logging.warning(
        '%d of %d files are not UTF-8 text and were skipped: %s%s',
        len(skipped),
        len(self.files),
        ', '.join(skipped[:5]),
        ', ...' if len(skipped) > 5 else '',
      )
    if cuts:
      logging.warning(
        'Texts longer than max_document_bytes=%d were cut at %d points.',
        self.max_document_bytes,
        cuts,
      )
    if not sum(map(len, files)):
      raise ValueError(
        f'path={self.path!r} is an empty corpus: {len(self.files)} files, {len(skipped)} of them '
        'not UTF-8 text, hold no record; give files with text in them.'
      )
    return np.concatenate(files), np.concatenate(starts), np.concatenate(stops)

  def _scan_file(self, path: str) -> np.ndarray:
    with _paths.stream(path) as file:
      try:
        return np.fromiter(scan(file, self.unit, self.max_document_bytes), np.dtype((np.int64, 3)))
      except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _paths.broken_gzip(path, error) from error


class Table(_lines.Lines):
  """Every line of text files as a text, those of white space too.

  Args:
    path: as that of `Source`.
  """

  def __init__(self, path: str):
    super().__init__(path, SUFFIXES)

  def columns(self) -> list[str]:
    return ['text']

  def values(self, index: int) -> dict[str, Any]:
    data = self.data(index).removesuffix(b'\n').removesuffix(b'\r')
    try:
      return {'text': data.decode('utf-8-sig' if self._index[index][1] == 1 else 'utf-8')}
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{self.where(index)}: not UTF-8 ({error.reason}); {_paths.TO_UTF8}.'
      ) from error


def scan(file: BinaryIO, unit: str, limit: int) -> Iterator[tuple[int, int, bool]]:
  """Yields (first byte, byte after the last, cut) of each record, holding one line, or 1 MiB of it,
  at a time.

  `cut` says that the text goes on in the next range because it is longer than `limit`.

  Raises:
    UnicodeDecodeError: the bytes are not UTF-8, or one is NUL; only the whole scan says that they
      are.
  """
  decoder = codecs.getincrementaldecoder('utf-8')()
  offset = 0  # bytes scanned
  start = 0  # where the record begins
  line = 0  # where the line begins
  end = 0  # where the record ends, without its line end
  filled = False  # whether the record holds more than white space
  while fragment := file.readline(min(_FRAGMENT, limit // 2)):
    partial = len(decoder.getstate()[0])  # bytes of a character that the fragment before began
    _check(decoder, fragment)
    if offset == 0 and fragment.startswith(codecs.BOM_UTF8):
      offset = start = line = len(codecs.BOM_UTF8)
      fragment = fragment[offset:]
    stop = offset + len(fragment)
    if unit == 'block' and offset == line and not fragment.strip():
      if filled:
        yield start, end, False
      start, filled = stop, False
    while stop - start > limit:
      cut = line if line > start else offset - partial
      yield start, cut, True
      start = cut
    filled = filled or bool(fragment.strip())
    end = offset + len(fragment.rstrip(b'\r\n'))
    offset = stop
    if fragment.endswith(b'\n'):
      line = offset
      if unit == 'line':
        if filled:
          yield start, end, False
        start, filled = offset, False
  decoder.decode(b'', final=True)
  if filled:
    yield start, offset if unit == 'file' else end, False


def _check(decoder: codecs.IncrementalDecoder, fragment: bytes) -> None:
  zero = fragment.find(b'\0')
  if zero >= 0:
    raise UnicodeDecodeError('utf-8', fragment[zero : zero + 1], 0, 1, 'NUL byte')
  decoder.decode(fragment)
