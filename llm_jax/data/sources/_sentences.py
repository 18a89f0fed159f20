"""Files with a word per line and a blank line after each sentence; plain or gzip."""

from collections.abc import Iterator
from typing import Any

from llm_jax.data.sources import _lines, _paths


class Sentences(_lines.Lines):
  """The sentences of some files; arguments and errors as for `_lines.Lines`."""

  def lines(self, index: int) -> Iterator[tuple[str, str]]:
    """Each line of a sentence without its end, and file and number of the line.

    Raises:
      ValueError: the file is not UTF-8.
    """
    file, first, _, _ = (int(value) for value in self._index[index])
    data = self.data(index).removesuffix(b'\n')
    for number, line in enumerate(data.split(b'\n'), first):
      where = f'{self.files[file]}:{number}'
      try:
        yield line.removesuffix(b'\r').decode('utf-8-sig' if number == 1 else 'utf-8'), where
      except UnicodeDecodeError as error:
        raise ValueError(f'{where}: not UTF-8 ({error.reason}); {_paths.TO_UTF8}.') from error

  def values(self, index: int) -> dict[str, Any]:
    """A record."""
    return self[index]

  def __getitem__(self, index: int) -> dict[str, Any]:
    raise NotImplementedError

  def _scan(self) -> Iterator[tuple[int, int, int, int]]:
    for file, path in enumerate(self.files):
      offset = number = 0
      first = start = 0
      stop = -1  # after the last line that counts; below `start` outside of a sentence
      for line in _paths.lines(path):
        number += 1
        blank = not line.strip(b' \t\r\n')
        if self._counts(line) and not blank:
          if stop < 0:
            first, start = number, offset
          stop = offset + len(line)
        elif blank and stop >= 0:
          yield file, first, start, stop
          stop = -1
        offset += len(line)
      if stop >= 0:
        yield file, first, start, stop
