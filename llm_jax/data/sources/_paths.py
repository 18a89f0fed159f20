"""Files of a source: which ones a path means, what identifies them, and reading a byte range of
one, gzip or plain.
"""

import glob
import gzip
import hashlib
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

TO_UTF8 = 'convert the file, say with iconv -f latin1 -t utf-8'
_LOCAL = threading.local()  # the gzip stream that this thread read last


def find(path: str, suffixes: tuple[str, ...]) -> list[str]:
  """Absolute names of the files that `path` means, without duplicates.

  Args:
    path: a file, a folder (searched to any depth for `suffixes`), a glob (`**` goes deep), or
      several of these with commas between them. A file that is named, or matched by a glob, is
      taken whatever its suffix.
    suffixes: which files of a folder count, for example ('.txt', '.md').

  Raises:
    ValueError: `path`, or one of the entries in it, matches nothing.
  """
  whole = os.path.exists(os.path.expanduser(path))
  entries = [path] if whole else [entry.strip() for entry in path.split(',') if entry.strip()]
  found: dict[str, None] = {}
  for entry in entries or [path]:
    matched = [name for hit in _hits(entry) for name in _files(hit, suffixes)]
    if not matched:
      raise ValueError(
        f'path={entry!r} matches no file{_why(entry)}; give a file, a folder with '
        f'{" ".join(suffixes)} files, a glob such as /data/**/*.txt, or several of these with '
        'commas between them.'
      )
    found.update(dict.fromkeys(matched))
  return list(found)


def fingerprint(paths: Sequence[str], *options: object) -> str:
  """Hash of the files' names (from their common folder on), of what the file system says of them,
  and of `options`; reads no content, which takes long for a large corpus.

  Beside size and modification time, which a copy or an archive can bring along, it is the time of
  the last change of the file itself (ctime) that tells another content: no program can set it.
  """
  base = os.path.commonpath([os.path.dirname(path) for path in paths])
  files = []
  for path in paths:
    stat = os.stat(path)
    times = stat.st_mtime_ns, stat.st_ctime_ns
    files.append((os.path.relpath(path, base), stat.st_size, *times))
  return hashlib.sha256(repr((files, options)).encode()).hexdigest()


def stream(path: str) -> BinaryIO:
  """Opens a file for reading bytes; a name that ends in .gz is decompressed on the way."""
  return gzip.open(path, 'rb') if path.endswith('.gz') else open(path, 'rb')


def lines(path: str) -> Iterator[bytes]:
  """The lines of a file with their ends; ValueError for a .gz file that does not decompress."""
  with stream(path) as file:
    try:
      yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise broken_gzip(path, error) from error


def broken_gzip(path: str, error: Exception) -> ValueError:
  """The error for a .gz file that does not decompress to its end."""
  return ValueError(
    f'{path}: not a whole gzip file ({error}); make it anew or take it out of the path.'
  )


def read(path: str, start: int, stop: int) -> bytes:
  """Bytes [start, stop) of a file's (decompressed) content.

  Plain files are read by seeking. A gzip stream stays open between calls of one thread, so that
  reading ranges in order decompresses the file once; a step back starts it again.

  Raises:
    ValueError: the file has become shorter than `stop`.
  """
  if path.endswith('.gz'):
    data = _read(_gzip_stream(path), start, stop)
  else:
    with open(path, 'rb') as file:
      data = _read(file, start, stop)
  if len(data) != stop - start:
    raise ValueError(
      f'{path} ends before byte {stop}: it changed after it was indexed; start again.'
    )
  return data


def _read(file: BinaryIO, start: int, stop: int) -> bytes:
  file.seek(start)
  return file.read(stop - start)


def _gzip_stream(path: str) -> BinaryIO:
  # The process is part of the key: a forked one would share the file's offset.
  key = os.getpid(), path, os.stat(path).st_mtime_ns
  if getattr(_LOCAL, 'key', None) != key:
    if hasattr(_LOCAL, 'file'):
      _LOCAL.file.close()
    _LOCAL.file, _LOCAL.key = gzip.open(path, 'rb'), key
  return _LOCAL.file


def _hits(entry: str) -> list[str]:
  entry = os.path.expanduser(entry)
  return [entry] if os.path.exists(entry) else sorted(glob.glob(entry, recursive=True))


def _files(path: str, suffixes: tuple[str, ...]) -> list[str]:
  path = os.path.abspath(path)
  if not os.path.isdir(path):
    return [path]
  found = []
  for folder, _, files in os.walk(path):
    found += [os.path.join(folder, name) for name in files if name.endswith(suffixes)]
  return sorted(found)


def _why(entry: str) -> str:
  entry = os.path.expanduser(entry)
  if os.path.isdir(entry):
    return ' (the folder has none with a known suffix)'
  return '' if glob.has_magic(entry) else ' (it does not exist)'
