"""Records of a file in, their answers to a file out.

A record that cannot be read costs itself alone: it has `error` in place of an answer. All modes
that answer the records of a file, and the test set of a run, come here.
"""

import collections
import csv
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from absl import logging
from tqdm import tqdm

from llm_jax.core import files, plugins
from llm_jax.data.sources import _record, jsonl, parquet, text
from llm_jax.data.sources import csv as tables
from llm_jax.training import logs

TEXT_SUFFIXES = ('.txt', '.txt.gz')
SUFFIXES = (*jsonl.SUFFIXES, *tables.SUFFIXES, *parquet.SUFFIXES, *TEXT_SUFFIXES)
OUTPUTS = ('.jsonl', '.csv', '.tsv', '.parquet')
SAMPLE = 100  # records that say which fields there are
SECONDS = 20  # between two lines of progress; shorter work shows none


class Records:
  """The records of one file, each of which gets an answer or says what is wrong with it.

  The text stands in the field that is asked for, or in that of the run (`data`), or in `text`, or
  in the only one whose values are strings and no numbers.

  Args:
    path: a file with one of `SUFFIXES`.
    data: section of the run; it says where text and pair stand, if the file has those fields, and
      whether there are pairs.
    text: the field with the text.
    pair: the field with the second text.
    whole: a record is all the fields of its line, as an objective with an `encode` of its own wants
      them.

  Attributes:
    fields: the fields with text and pair; None where records are whole.
    faults: how many records could not be read so far.
    fault: what is wrong with the first of them.

  Raises:
    ValueError: a file that cannot be read or has no record, a field that is not there, or no
      telling which one is meant.
  """

  def __init__(
    self,
    path: pathlib.Path,
    data: Mapping[str, Any],
    text: str | None = None,
    pair: str | None = None,
    whole: bool = False,
  ):
    self.path, self._table = path, _table(path, data)
    self.faults, self.fault = 0, ''
    self._waiting: collections.deque[tuple[dict[str, Any], str]] = collections.deque()
    known, strings = self._columns()
    if whole and (text or pair):
      raise ValueError('this model reads each record as it is; leave --text and --pair out.')
    self.fields = None if whole else self._fields(data, text, pair, known, strings)

  def __len__(self) -> int:
    return len(self._table)

  def answered(
    self,
    ask: Callable[[Iterator[dict[str, Any]]], Iterable[dict[str, Any]]],
    first: int = 0,
    check: Callable[[dict[str, Any]], None] | None = None,
  ) -> Iterator[dict[str, Any]]:
    """Each record of the file again, in order, with its answer or with `error`.

    A field that the answer brings too (`label`, say) is kept as `input_label`.

    Args:
      ask: gives the answers for the records that can be read.
      first: how many records are left out.
      check: raises ValueError for a record that has no answer.

    Raises:
      ValueError: no record can be read.
    """
    answer: dict[str, Any] = {}
    for answer in ask(self._readable(first, check)):
      while self._waiting[0][1]:
        yield self._faulty(answer)
      yield merged(self._waiting.popleft()[0], answer)
    if self.faults == len(self):
      raise ValueError(f'no record of {self.path} can be read; {self.fault}')
    while self._waiting:
      yield self._faulty(answer)

  def log_faults(self) -> None:
    """Says how many records could not be read, and what is wrong with the first."""
    if self.faults:
      logging.warning('%d records could not be read, the first: %s', self.faults, self.fault)

  def _readable(
    self, first: int, check: Callable[[dict[str, Any]], None] | None
  ) -> Iterator[dict[str, Any]]:
    for index in range(first, len(self)):
      values, record, fault = {}, {}, ''
      try:
        values = self._table.values(index)
        record = values
        if self.fields is not None:
          record = self.fields.record(values, self._table.where(index))
        if check is not None:
          check(record)
      except ValueError as error:
        fault = str(error)
        self.faults, self.fault = self.faults + 1, self.fault or fault
      self._waiting.append((values, fault))
      if not fault:
        yield record

  def _faulty(self, answer: Mapping[str, Any]) -> dict[str, Any]:
    values, fault = self._waiting.popleft()
    return merged(values, {'error': fault}, answer)

  def _columns(self) -> tuple[list[str], list[str]]:
    """The fields of the file, and which of them hold strings that are no numbers."""
    known, strings = dict.fromkeys(self._table.columns() or ()), {}
    for index in range(min(SAMPLE, len(self))):
      try:
        values = self._table.values(index)
      except ValueError:
        continue
      known |= dict.fromkeys(values)
      strings |= {name: None for name, value in values.items() if _is_words(value)}
    return list(known), list(strings)

  def _fields(
    self,
    data: Mapping[str, Any],
    text: str | None,
    pair: str | None,
    known: list[str],
    strings: list[str],
  ) -> _record.Fields:
    if pair is not None or data.get('pair') is not None:
      pair = self._field('pair', pair, data.get('pair'), known, [])
    strings = [name for name in strings if name not in (pair, data.get('label'))]
    return _record.Fields(self._field('text', text, data.get('text'), known, strings), pair, None)

  def _field(
    self, option: str, asked: str | None, own: str | None, known: list[str], strings: list[str]
  ) -> str:
    there = ', '.join(known)
    if asked is not None:
      if known and asked not in known:
        near = plugins.nearest(asked, known)
        raise ValueError(f'--{option}={asked}: no field of {self.path}{near}; it has: {there}.')
      return asked
    for name in (own, option):
      if name and (name in known or not known):  # without a record that can be read none is known
        return name
    if len(strings) == 1:
      return strings[0]
    raise ValueError(
      f'{self.path} has no field {own or option!r}; name the one to read with --{option}=FIELD, one '
      f'of: {there}.'
    )


def merged(
  values: Mapping[str, Any], answer: Mapping[str, Any], taken: Iterable[str] = ()
) -> dict[str, Any]:
  """A record with its answer; a field of it that the answer has too, or any in `taken`, is kept as
  `input_NAME`, and so is `error`.
  """
  names = {'error', *answer, *taken}
  return {f'input_{key}' if key in names else key: value for key, value in values.items()} | answer


def spool(stream: BinaryIO, folder: pathlib.Path) -> pathlib.Path:
  """What a stream gives as a file in a folder: .jsonl if it begins with {, else .txt.

  Equal content has an equal name and time, so that an interrupted call can be gone on from.
  """
  digest, start = hashlib.sha256(), b''
  with open(folder / 'stdin', 'wb') as file:
    while piece := stream.read(1 << 20):
      start = start or piece.removeprefix(b'\xef\xbb\xbf').lstrip()[:1]
      digest.update(piece)
      file.write(piece)
  suffix = '.jsonl' if start == b'{' else '.txt'
  path = (folder / 'stdin').rename(folder / f'stdin-{digest.hexdigest()[:8]}{suffix}')
  os.utime(path, (0, 0))
  return path


def write(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes rows as .jsonl, .csv, .tsv or .parquet, by the suffix, whole or not at all.

  Args:
    path: the file.
    rows: names to what JSON can hold, arrays, or what has a readable `str`.
  """
  if path.suffix == '.jsonl':
    with files.whole_file(path, 'wb') as file:
      file.writelines(map(encoded, rows))
    return
  with tempfile.TemporaryFile() as lines:
    lines.writelines(map(encoded, rows))
    convert(lines, path)


def convert(lines: BinaryIO, path: pathlib.Path) -> None:
  """Writes a file of JSON lines as .csv, .tsv or .parquet; `error` is the last column.

  In .csv and .tsv, null is an empty cell, and all but strings is JSON. In .parquet a column whose
  values have no common type is JSON.
  """
  names: dict[str, None] = {}
  for row in _decoded(lines):
    names |= dict.fromkeys(row)
  columns = sorted(names, key=lambda name: name == 'error')
  if path.suffix == '.parquet':
    _write_parquet(path, columns, _decoded(lines))
  else:
    _write_table(path, columns, _decoded(lines))


def encoded(row: Mapping[str, Any]) -> bytes:
  """A line of JSON: a number that is not finite is null, half of a surrogate pair, which UTF-8 does
  not have, an escape.
  """
  try:
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
  except ValueError:
    line = json.dumps(_nulled(row), ensure_ascii=False, default=str)
  try:
    return line.encode() + b'\n'
  except UnicodeEncodeError:
    return json.dumps(json.loads(line)).encode() + b'\n'


def progress(items: Iterable[Any], total: int, first: int = 0) -> Iterator[Any]:
  """The items; what takes long shows how far it is and the time left: on a terminal in a bar,
  elsewhere in a line of the log now and then.
  """
  terminal = sys.stderr.isatty()
  begun = said = time.monotonic()
  with tqdm(total=total, initial=first, delay=2, disable=not terminal, leave=False) as bar:
    for count, item in enumerate(items, 1):
      yield item
      bar.update()
      now = time.monotonic()
      if not terminal and now - said > SECONDS:
        left = (now - begun) / count * (total - first - count)
        logging.info('%d of %d records, %s left.', first + count, total, logs.duration(left))
        said = now


def _table(path: pathlib.Path, data: Mapping[str, Any]) -> Any:
  name = path.name
  if name.endswith(TEXT_SUFFIXES):
    return text.Table(str(path))
  if name.endswith(jsonl.SUFFIXES):
    return jsonl.Table(str(path))
  table: Any
  if name.endswith(parquet.SUFFIXES):
    table = parquet.Table(str(path))
  elif name.endswith(tables.SUFFIXES):
    commas = '.csv' in path.suffixes and data.get('source') == 'csv'
    table = tables.Table(str(path), data.get('delimiter') if commas else None)
  else:
    raise ValueError(f'{path} must be a {", ".join(SUFFIXES)} file.')
  (header,) = table.headers
  twice = [name for name, count in collections.Counter(header).items() if count > 1]
  if twice:
    raise ValueError(f'{path}: several columns are named {twice[0]!r}; rename all but one.')
  return table


def _is_words(value: Any) -> bool:
  if not isinstance(value, str) or not value.strip():
    return False
  try:
    float(value)
  except ValueError:
    return True
  return False


def _plain(value: Any) -> Any:
  return value.tolist() if hasattr(value, 'tolist') else str(value)


def _nulled(value: Any) -> Any:
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, Mapping):
    return {key: _nulled(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_nulled(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(lines: BinaryIO) -> Iterator[dict[str, Any]]:
  lines.seek(0)
  return map(json.loads, lines)


def _cell(value: Any) -> str:
  if not isinstance(value, str):
    value = '' if value is None else json.dumps(value, ensure_ascii=False)
  return value.encode('utf-8', 'replace').decode()


def _write_table(path: pathlib.Path, columns: list[str], rows: Iterator[dict[str, Any]]) -> None:
  cells = ([_cell(row.get(name)) for name in columns] for row in rows)
  every = itertools.chain([columns], cells)
  with files.whole_file(path) as file:
    if path.suffix == '.csv':
      csv.writer(file, lineterminator='\n').writerows(every)
      return
    spoiled = 0  # a .tsv has no quotes, as the source reads it
    for row in every:
      plain = [re.sub(r'[\t\r\n]', ' ', cell) for cell in row]
      spoiled += plain != row
      file.write('\t'.join(plain) + '\n')
  if spoiled:
    logging.warning('%d rows hold tabs or line ends, which are spaces in %s.', spoiled, path)


def _write_parquet(path: pathlib.Path, columns: list[str], rows: Iterator[dict[str, Any]]) -> None:
  import pyarrow
  import pyarrow.parquet

  held = list(rows)
  table = {name: _array(pyarrow, [row.get(name) for row in held]) for name in columns}
  with files.whole_file(path, 'wb') as file:
    pyarrow.parquet.write_table(pyarrow.table(table), file)


def _array(pyarrow: Any, values: list[Any]) -> Any:
  if not any(isinstance(value, dict) for value in values):
    try:
      return pyarrow.array(values)
    except (ValueError, TypeError, OverflowError):  # values of several types
      pass
  return pyarrow.array([None if value is None else _cell(value) for value in values])
