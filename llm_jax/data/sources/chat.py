"""Conversations and instructions: JSON Lines, or JSON with a list of objects; plain or gzip."""

import functools
import json
from typing import Any

from llm_jax.data.conversations import FIELDS
from llm_jax.data.sources import _paths, jsonl

SUFFIXES = ('.json', '.json.gz')


class Source:
  """The objects as records, of their fields those that make a conversation (`data.conversations`).

  Lines are read by byte offsets; a .json file is held in memory.

  Args:
    path: a file, a folder (.jsonl, .json, gzipped or not, at any depth), a glob, or several with
      commas between them.
    fields: names of further fields.

  Raises:
    ValueError: nothing matches the path, a file of another form, or no record; when a record is
      read: a further field that it has not; with file and number.
  """

  def __init__(self, path: str, fields: tuple[str, ...] = ()):
    self.files = _paths.find(path, (*jsonl.SUFFIXES, *SUFFIXES))
    self.more = tuple(name for name in fields if name not in FIELDS)
    lines = [file for file in self.files if file.endswith(jsonl.SUFFIXES)]
    self._lines = [jsonl.Table(file) for file in lines]
    self._whole = [file for file in self.files if file not in lines]
    self.fingerprint = _paths.fingerprint(self.files, 'chat', *self.more)
    if not len(self):
      raise ValueError(f'path={path!r} is an empty corpus: {len(self.files)} files of no record.')

  def __len__(self) -> int:
    return sum(map(len, self._parts))

  def __getitem__(self, index: int) -> dict[str, Any]:
    values, where = self._values(index), self.where(index)
    missing = [name for name in self.more if name not in values]
    if missing:
      raise ValueError(f'{where}: no field {missing[0]!r}; there are: {", ".join(values)}.')
    return {name: values[name] for name in (*FIELDS, *self.more) if name in values}

  def where(self, index: int) -> str:
    """File, and line or number."""
    part, number = self._find(index)
    if part < len(self._lines):
      return self._lines[part].where(number)
    return f'{self._whole[part - len(self._lines)]}: record {number}'

  def columns(self) -> list[str]:
    """The fields of the first record."""
    return list(self[0])

  def _values(self, index: int) -> dict[str, Any]:
    part, number = self._find(index)
    if part < len(self._lines):
      return self._lines[part].values(number)
    found = self._parts[part][number]
    if not isinstance(found, dict):
      raise ValueError(f'{self.where(index)}: a {type(found).__name__}, not a JSON object.')
    return found

  def _find(self, index: int) -> tuple[int, int]:
    index = range(len(self))[index]
    for part, records in enumerate(self._parts):
      if index < len(records):
        return part, index
      index -= len(records)
    raise IndexError(index)

  @functools.cached_property
  def _parts(self) -> list[Any]:
    return [*self._lines, *map(_read, self._whole)]

  def __getstate__(self) -> dict[str, Any]:
    """Other processes read the files themselves."""
    return {key: x for key, x in self.__dict__.items() if key != '_parts'}


def _read(path: str) -> list[Any]:
  with _paths.stream(path) as file:
    try:
      content = json.loads(file.read())
    except (ValueError, EOFError, OSError, RecursionError) as error:
      raise ValueError(f'{path}: not JSON in UTF-8 ({error}).') from error
  if not isinstance(content, list):
    raise ValueError(
      f'{path}: a {type(content).__name__}, not a list of conversations; one object per line goes '
      'into a .jsonl file.'
    )
  return content
