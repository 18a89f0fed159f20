"""Tables of text, CSV and TSV: a header line, then rows; plain or gzip."""

import csv
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.data.sources import _paths, _record

SUFFIXES = ('.csv', '.csv.gz', '.tsv', '.tsv.gz')
csv.field_size_limit(2**31 - 1)  # Python's default refuses a text of more than 128 KiB


class Source:
  """The rows of CSV and TSV files as records, by index over byte offsets.

  Fields of a comma-separated file may be quoted with " and then hold line ends; in a tab-separated
  one (by its delimiter) a quote is a character like any other, as in GLUE. All labels are strings.

  Args:
    path: a file, a folder (.csv, .tsv, and these with .gz, at any depth), a glob, or several with
      commas between them.
    text: name of the column with the text; '' where there is none.
    pair: name of the column with the second text, if there is one.
    label: name of the column with the label, if there is one.
    fields: names of further columns that the objective reads, as strings.
    delimiter: one character; tab for .tsv files and a comma for others if not given.

  Raises:
    ValueError: nothing matches the path, a column that a header does not have, a delimiter of
      another length; when the records are first asked for: a malformed record, with file and line
      number, or no record at all.
  """

  def __init__(
    self,
    path: str,
    text: str = 'text',
    pair: str | None = None,
    label: str | None = None,
    fields: tuple[str, ...] = (),
    delimiter: str | None = None,
  ):
    delimiter = '\t' if delimiter == r'\t' else delimiter  # as a shell hands it over
    if delimiter is not None and len(delimiter) != 1:
      raise ValueError(f'delimiter={delimiter!r} must be one character, such as "," or ";".')
    self.path, self.delimiter = path, delimiter
    self.fields = _record.Fields(text, pair, label, fields)
    self.files = _paths.find(path, SUFFIXES)
    self.headers = [next((row for row, *_ in self._records(file)), []) for file in self.files]
    for file, header in zip(self.files, self.headers, strict=True):
      self.fields.check(f'{file}, header', header)
      for column in self.fields.names:
        if header.count(column) > 1:
          raise ValueError(
            f'{file}, header: {header.count(column)} columns are named {column!r}; rename all but '
            'one.'
          )
    self.fingerprint = _paths.fingerprint(self.files, 'csv', *self.fields.key, delimiter)

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, index: int) -> dict[str, Any]:
    file, _, start, stop = (int(value) for value in self._index[index])
    text = _paths.read(self.files[file], start, stop).decode('utf-8')
    row = next(csv.reader([text], **self._dialect(self.files[file])))
    values = dict(zip(self.headers[file], row, strict=True))
    return self.fields.record(values, self.where(index))

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
        f'path={self.path!r} is an empty corpus: {len(self.files)} files without a record below '
        'their header.'
      )
    return index

  def _scan(self) -> Iterator[tuple[int, int, int, int]]:
    for file, (path, header) in enumerate(zip(self.files, self.headers, strict=True)):
      for row, line, start, stop in itertools.islice(self._records(path), 1, None):
        if len(row) != len(header):
          raise ValueError(
            f'{path}:{line}: {len(row)} fields where the header has {len(header)}; check quotes '
            'and delimiter.'
          )
        yield file, line, start, stop

  def _records(self, path: str) -> Iterator[tuple[list[str], int, int, int]]:
    """Yields the fields of each record that is not blank, its first line's number, first byte, and
    the byte after the last.
    """
    offset, number = 0, 0  # bytes and lines so far

    def decoded() -> Iterator[str]:
      nonlocal offset, number
      for line in _paths.lines(path):
        offset += len(line)
        number += 1
        try:
          yield line.decode('utf-8-sig' if number == 1 else 'utf-8')
        except UnicodeDecodeError as error:
          raise ValueError(f'{path}:{number}: not UTF-8 ({error.reason}).') from error

    reader = csv.reader(decoded(), **self._dialect(path))
    while True:
      start, first = offset, number + 1
      try:
        row = next(reader, None)
      except csv.Error as error:
        raise ValueError(f'{path}:{first}: malformed record ({error}).') from error
      if row is None:
        return
      if row:
        yield row, first, start, offset

  def _dialect(self, path: str) -> dict[str, Any]:
    tsv = path.removesuffix('.gz').endswith('.tsv')
    delimiter = self.delimiter or ('\t' if tsv else ',')
    quoting = csv.QUOTE_NONE if delimiter == '\t' else csv.QUOTE_MINIMAL
    return dict(delimiter=delimiter, strict=True, quoting=quoting)
