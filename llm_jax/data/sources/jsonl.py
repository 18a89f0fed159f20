"""JSON Lines: one object per line; plain or gzip."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.data.sources import _paths, _record

SUFFIXES = ('.jsonl', '.jsonl.gz')


class Source:
  """The objects of JSON Lines files as records, by index over byte offsets; blank lines are none.

  Args:
    path: a file, a folder (.jsonl, .jsonl.gz at any depth), a glob, or several with commas between
      them.
    text: name of the field with the text; '' where there is none.
    pair: name of the field with the second text, if there is one.
    label: name of the field with the label, if there is one: a string, integer or boolean (a
      class), a float, or a list of strings.
    fields: names of further fields that the objective reads.

  Raises:
    ValueError: nothing matches the path, or the files hold no line; when a record is read: a
      malformed line or a missing field, with file and line number.
  """

  def __init__(
    self,
    path: str,
    text: str = 'text',
    pair: str | None = None,
    label: str | None = None,
    fields: tuple[str, ...] = (),
  ):
    self.path = path
    self.fields = _record.Fields(text, pair, label, fields)
    self.files = _paths.find(path, SUFFIXES)
    self.fingerprint = _paths.fingerprint(self.files, 'jsonl', *self.fields.key)

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.fields.record(self.values(index), self.where(index))

  def values(self, index: int) -> dict[str, Any]:
    """All fields of one line as they are; ValueError for a line that is no object."""
    file, _, start, stop = (int(value) for value in self._index[index])
    data = _paths.read(self.files[file], start, stop)
    try:
      values = json.loads(data.decode('utf-8-sig'))
    except ValueError as error:
      raise ValueError(f'{self.where(index)}: not a JSON object in UTF-8 ({error}).') from error
    if not isinstance(values, dict):
      raise ValueError(
        f'{self.where(index)}: a {type(values).__name__}, not a JSON object; each line must be '
        f'like {{"{self.fields.names[0]}": "..."}}.'
      )
    return values

  def where(self, index: int) -> str:
    """File and line of a record."""
    file, line, _, _ = (int(value) for value in self._index[index])
    return f'{self.files[file]}:{line}'

  @functools.cached_property
  def _index(self) -> np.ndarray:
    """[records, 4] int64: which file, line number from 1, first byte, byte after the last."""
    index = np.fromiter(self._scan(), np.dtype((np.int64, 4)))
    if not len(index):
      raise ValueError(
        f'path={self.path!r} is an empty corpus: {len(self.files)} files without a line; give JSON '
        'lines.'
      )
    return index

  def _scan(self) -> Iterator[tuple[int, int, int, int]]:
    for file, path in enumerate(self.files):
      offset = 0
      for number, line in enumerate(_paths.lines(path), 1):
        if line.strip():
          yield file, number, offset, offset + len(line)
        offset += len(line)
