"""Files whose records are whole lines, by index over byte offsets; plain or gzip."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.data.sources import _paths


class Lines:
  """The records of some files.

  Args:
    path: a file, a folder (searched for `suffixes`), a glob, or several with commas between them.
    suffixes: which files of a folder count.

  Raises:
    ValueError: nothing matches the path; when the records are first asked for: there is none.
  """

  def __init__(self, path: str, suffixes: tuple[str, ...]):
    self.path, self.files = path, _paths.find(path, suffixes)

  def __len__(self) -> int:
    return len(self._index)

  def values(self, index: int) -> dict[str, Any]:
    """All fields of one record as they are; ValueError for one that cannot be read."""
    raise NotImplementedError

  def columns(self) -> Sequence[str] | None:
    """The names of the fields, where the files say them before their records."""
    return None

  def where(self, index: int) -> str:
    """File and line of a record."""
    file, line, _, _ = (int(value) for value in self._index[index])
    return f'{self.files[file]}:{line}'

  def data(self, index: int) -> bytes:
    """The bytes of a record, with their line ends."""
    file, _, start, stop = (int(value) for value in self._index[index])
    return _paths.read(self.files[file], start, stop)

  @functools.cached_property
  def _index(self) -> np.ndarray:
    """[records, 4] int64: which file, line number from 1, first byte, byte after the last."""
    index = np.fromiter(self._scan(), np.dtype((np.int64, 4)))
    if not len(index):
      raise ValueError(
        f'path={self.path!r} is an empty corpus: {len(self.files)} files without a record.'
      )
    return index

  def _scan(self) -> Iterator[tuple[int, int, int, int]]:
    for file, path in enumerate(self.files):
      offset = 0
      for number, line in enumerate(_paths.lines(path), 1):
        if self._counts(line):
          yield file, number, offset, offset + len(line)
        offset += len(line)

  def _counts(self, line: bytes) -> bool:
    """Whether a line is a record."""
    del line
    return True
