"""Apache Parquet tables: one record per row, one row group read at a time."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

from llm_jax.data.sources import _paths, _record

SUFFIXES = ('.parquet',)


class Table:
  """The rows of Parquet files as they are; the last row group is kept.

  Args:
    path: as that of `Source`.
    names: the columns that are read; None for all.
  """

  def __init__(self, path: str, names: Sequence[str] | None = None):
    import pyarrow
    import pyarrow.parquet

    self.files, self._names = _paths.find(path, SUFFIXES), names
    self.headers: list[list[str]] = []
    self._groups: list[tuple[int, int]] = []  # (file, row group)
    counts = []
    for file, name in enumerate(self.files):
      try:
        with pyarrow.parquet.ParquetFile(name) as table:
          metadata, columns = table.metadata, table.schema_arrow.names
      except pyarrow.ArrowInvalid as error:
        raise ValueError(f'{name}: not a Parquet file ({error}).') from error
      self.headers.append(columns)
      self._groups += [(file, group) for group in range(metadata.num_row_groups)]
      counts += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    self._starts = list(itertools.accumulate(counts, initial=0))
    if not len(self):
      raise ValueError(f'path={path!r} is an empty corpus: {len(self.files)} files without a row.')
    self._held: tuple[int, Any] = (-1, None)

  def __len__(self) -> int:
    return self._starts[-1]

  def columns(self) -> list[str]:
    return list(dict.fromkeys(itertools.chain(*self.headers)))

  def values(self, index: int) -> dict[str, Any]:
    """The columns of one row."""
    group, row = self._position(index)
    table = self._read(group)
    return {name: table[name][row].as_py() for name in table.column_names}

  def where(self, index: int) -> str:
    """File, row group and row of a record."""
    group, row = self._position(index)
    file, number = self._groups[group]
    return f'{self.files[file]}, row group {number}, row {row}'

  def _position(self, index: int) -> tuple[int, int]:
    index = range(len(self))[index]
    group = bisect.bisect_right(self._starts, index) - 1
    return group, index - self._starts[group]

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_held': (-1, None)}

  def _read(self, group: int) -> Any:
    import pyarrow.parquet

    held, table = self._held
    if held != group:
      file, number = self._groups[group]
      with pyarrow.parquet.ParquetFile(self.files[file]) as parquet:
        # Without threads, for they do not survive a fork.
        table = parquet.read_row_group(number, columns=self._names, use_threads=False)
      self._held = (group, table)
    return table


class Source(Table):
  """The rows of Parquet files as records; only the columns that are asked for are read, and the
  last row group is kept.

  Args:
    path: a file, a folder (.parquet at any depth), a glob, or several with commas between them.
    text: name of the column with the text; '' where there is none.
    pair: name of the column with the second text, if there is one.
    label: name of the column with the label, if there is one: string, integer or boolean (a class),
      float, or list of strings.
    fields: names of further columns that the objective reads.
    target: name of the field with the text that a model is to give, if there is one.

  Raises:
    ValueError: nothing matches the path, a file is not Parquet, a column is not there, or there is
      no row.
  """

  def __init__(
    self,
    path: str,
    text: str = 'text',
    pair: str | None = None,
    label: str | None = None,
    fields: tuple[str, ...] = (),
    target: str | None = None,
  ):
    self.fields = _record.Fields(text, pair, label, fields, target)
    super().__init__(path, self.fields.names)
    for name, columns in zip(self.files, self.headers, strict=True):
      self.fields.check(name, columns)
    self.fingerprint = _paths.fingerprint(self.files, 'parquet', *self.fields.key)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.fields.record(self.values(index), self.where(index))
