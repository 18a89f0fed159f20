"""Tables of text, CSV and TSV: a header line, then rows; plain or gzip."""

import csv
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from llm_jax.data.sources import _lines, _paths, _record

SUFFIXES = ('.csv', '.csv.gz', '.tsv', '.tsv.gz')
csv.field_size_limit(2**31 - 1)  # Python's default refuses a text of more than 128 KiB


class Table(_lines.Lines):
  """The rows of CSV and TSV files as they are; one that is malformed is an error when it is read.

  Args:
    path: as that of `Source`.
    delimiter: likewise.
  """

  strict = False  # whether a malformed row is an error as soon as rows are asked for

  def __init__(self, path: str, delimiter: str | None = None):
    delimiter = '\t' if delimiter == r'\t' else delimiter  # as a shell hands it over
    if delimiter is not None and len(delimiter) != 1:
      raise ValueError(f'delimiter={delimiter!r} must be one character, such as "," or ";".')
    super().__init__(path, SUFFIXES)
    self.delimiter = delimiter
    self.headers = [self._header(file) for file in self.files]

  def columns(self) -> list[str]:
    return list(dict.fromkeys(itertools.chain(*self.headers)))

  def values(self, index: int) -> dict[str, Any]:
    """The columns of one row as strings; ValueError for a row that is malformed."""
    file, line, _, _ = (int(value) for value in self._index[index])
    row, *_ = next(self._rows(self.files[file], [self.data(index)], line - 1))
    return dict(zip(self.headers[file], self._checked(row, file, line), strict=True))

  def _header(self, path: str) -> list[str]:
    header, *_ = next(self._rows(path, _paths.lines(path)), ([], 0, 0, 0))
    if isinstance(header, ValueError):
      raise header
    if not header:
      raise ValueError(f'{path} is empty; its first line must name the columns.')
    return header

  def _scan(self) -> Iterator[tuple[int, int, int, int]]:
    for file, path in enumerate(self.files):
      for row, line, start, stop in itertools.islice(self._rows(path, _paths.lines(path)), 1, None):
        if self.strict:
          self._checked(row, file, line)
        yield file, line, start, stop

  def _checked(self, row: list[str] | ValueError, file: int, line: int) -> list[str]:
    if isinstance(row, ValueError):
      raise row
    wanted = len(self.headers[file])
    if len(row) != wanted:
      raise ValueError(
        f'{self.files[file]}:{line}: {len(row)} fields where the header has {wanted}; check quotes '
        'and delimiter.'
      )
    return row

  def _rows(
    self, path: str, lines: Iterable[bytes], number: int = 0
  ) -> Iterator[tuple[list[str] | ValueError, int, int, int]]:
    """Yields the fields of each record that is not blank, or what is wrong with it, its first
    line's number, first byte, and the byte after the last; `number` lines stand before them.
    """
    offset, fault = 0, None  # bytes so far

    def decoded() -> Iterator[str]:
      nonlocal offset, number, fault
      for line in lines:
        offset += len(line)
        number += 1
        encoding = 'utf-8-sig' if number == 1 else 'utf-8'
        try:
          yield line.decode(encoding)
        except UnicodeDecodeError as error:
          fault = ValueError(f'{path}:{number}: not UTF-8 ({error.reason}); {_paths.TO_UTF8}.')
          yield line.decode(encoding, 'replace')

    reader = csv.reader(decoded(), **self._dialect(path))
    while True:
      start, first, fault = offset, number + 1, None
      try:
        row = next(reader, None)
      except csv.Error as error:
        row = ValueError(f'{path}:{first}: malformed record ({error}).')
      if row is None:
        return
      if row:
        yield fault or row, first, start, offset

  def _dialect(self, path: str) -> dict[str, Any]:
    tsv = path.removesuffix('.gz').endswith('.tsv')
    delimiter = self.delimiter or ('\t' if tsv else ',')
    quoting = csv.QUOTE_NONE if delimiter == '\t' else csv.QUOTE_MINIMAL
    return dict(delimiter=delimiter, strict=True, quoting=quoting)


class Source(Table):
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
    target: name of the field with the text that a model is to give, if there is one.

  Raises:
    ValueError: nothing matches the path, a column that a header does not have, a delimiter of
      another length; when the records are first asked for: a malformed record, with file and line
      number, or no record at all.
  """

  strict = True

  def __init__(
    self,
    path: str,
    text: str = 'text',
    pair: str | None = None,
    label: str | None = None,
    fields: tuple[str, ...] = (),
    target: str | None = None,
    delimiter: str | None = None,
  ):
    super().__init__(path, delimiter)
    self.fields = _record.Fields(text, pair, label, fields, target)
    for file, header in zip(self.files, self.headers, strict=True):
      _check_delimiter(file, header, self.fields.names)
      self.fields.check(f'{file}, header', header)
      for column in self.fields.names:
        if header.count(column) > 1:
          raise ValueError(
            f'{file}, header: {header.count(column)} columns are named {column!r}; rename all but '
            'one.'
          )
    self.fingerprint = _paths.fingerprint(self.files, 'csv', *self.fields.key, self.delimiter)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.fields.record(self.values(index), self.where(index))


def _check_delimiter(file: str, header: list[str], wanted: list[str]) -> None:
  """Raises ValueError for a header that another delimiter cuts."""
  if len(header) != 1 or header[0] in wanted:
    return
  for sign in ';\t|,':
    if sign in header[0]:
      raise ValueError(
        f'{file}, header: one column, {header[0]!r}; where {sign!r} separates columns, set the '
        f'option delimiter={sign!r}.'
      )
