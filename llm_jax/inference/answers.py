"""The answers to the records of a file: written as they come, gone on with after an interruption,
and in the end a file of the kind that was asked for.
"""

import csv
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from absl import logging

from llm_jax.core import files, progress
from llm_jax.core.contracts import Record
from llm_jax.inference.records import Ask, Records
from llm_jax.parallel import hosts

if TYPE_CHECKING:
  import pyarrow

OUTPUTS = ('.jsonl', '.csv', '.tsv', '.parquet')
VECTORS = '.npy'
VECTOR = 'embedding'  # the field of an answer that is a row of a .npy file
GROUP = 4096  # rows of a row group of Parquet

Row = Mapping[str, Any]
Choose = Callable[[Iterator[dict[str, Any]]], Sequence[int]]


def write_answers(
  records: Records,
  ask: Ask,
  target: pathlib.Path,
  made_by: object,
  check: Callable[[Record], None] | None = None,
  change: Callable[[dict[str, Any]], Row] | None = None,
  width: int = 0,
  choose: Choose | None = None,
) -> None:
  """Writes a file with an answer for each record.

  Answers are written as they come, to a file beside `target` that ends in `.partial`. A call that
  is interrupted leaves it; the next one with the same input, made by the same, goes on from there.
  All processes call it, one writes.

  Args:
    records: what is answered.
    ask: as for `Records.answered`.
    target: has all answers or is not there; one of `OUTPUTS`, or a .npy file of what answers have
      as `embedding`, with NaN for a record that has none.
    made_by: the answers are others where its `repr` is another.
    check: as for `Records.answered`.
    change: from a record with its answer to what is written.
    width: numbers of an embedding.
    choose: from all answers the numbers of those that `target` gets, in their order; None for all.

  Raises:
    ValueError: no record can be read.
  """
  partial = target.with_name(f'{target.name}.{_key(records, made_by)}.partial')
  form = _Vectors(width) if target.suffix == VECTORS else _Lines(choose)
  done = hosts.agree(lambda: form.done(partial))
  answers = records.answered(ask, done, check)
  answers = progress.shown(answers, 'Answering', len(records) - done, 'records', hosts.primary())
  if not hosts.primary():
    for _ in answers:  # the devices of all processes are needed for each
      pass
    return
  if done:
    logging.info('%d answers are in %s; going on after them.', done, partial)
  with open(partial, 'ab') as file:
    try:
      for answer in answers:
        file.write(form.encoded(change(answer) if change else answer))
    except BaseException:
      if file.tell():
        logging.error('Interrupted: the answers so far are in %s; the same call goes on.', partial)
      else:
        partial.unlink()
      raise
  form.finish(partial, target)
  partial.unlink(missing_ok=True)
  if choose is None:
    logging.info('%d answers in %s.', len(records) - records.faults, target)
  records.log_faults()


def model_key(origin: pathlib.Path, *options: object) -> tuple[object, ...]:
  """What changes whenever the parameters in a folder, or the options, do."""
  found = [*origin.glob('checkpoints/*/seal.json'), *origin.glob('*.safetensors')]
  return (*map(_stamp, sorted(found)), *options)


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
  """Writes rows as .jsonl, .csv, .tsv or .parquet, by the suffix, whole or not at all.

  Args:
    path: the file.
    rows: names to what JSON can hold, arrays, or what has a readable `str`.
  """
  with tempfile.NamedTemporaryFile() as lines:
    lines.writelines(map(encoded, rows))
    lines.flush()
    convert(lines.file, path)


def convert(lines: BinaryIO, path: pathlib.Path) -> None:
  """Writes a file of JSON lines by the suffix of `path`; `error` is the last column.

  In .csv and .tsv, null is an empty cell, and all but strings is JSON. In .parquet a column whose
  values have no common type is JSON.
  """
  if path.suffix == '.jsonl':
    lines.seek(0)
    with files.whole_file(path, 'wb') as file:
      file.writelines(lines)
    return
  names: dict[str, None] = {}
  for row in _decoded(lines):
    names |= dict.fromkeys(row)
  columns = sorted(names, key=lambda name: name == 'error')
  if path.suffix == '.parquet':
    _write_parquet(path, columns, lines)
  else:
    _write_table(path, columns, _decoded(lines))


def encoded(row: Row) -> bytes:
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


class _Lines:
  """Answers as JSON lines, which become any of `OUTPUTS`.

  Args:
    choose: as for `write_answers`.
  """

  encoded = staticmethod(encoded)

  def __init__(self, choose: Choose | None):
    self._choose = choose

  def done(self, partial: pathlib.Path) -> int:
    """How many answers an interrupted call has left; half a line is cut off."""
    if not partial.is_file():
      return 0
    whole = end = 0
    with open(partial, 'rb+') as file:
      for line in file:
        if line.endswith(b'\n'):
          whole, end = whole + 1, end + len(line)
      file.truncate(end)
    return whole

  def finish(self, partial: pathlib.Path, target: pathlib.Path) -> None:
    """Makes the target of the whole file, or of the chosen lines."""
    if self._choose is None and target.suffix == '.jsonl':
      partial.replace(target)
      return
    with open(partial, 'rb') as file:
      if self._choose is None:
        convert(file, target)
        return
      with tempfile.TemporaryFile() as chosen:
        chosen.writelines(_chosen(file, self._choose(_decoded(file))))
        convert(chosen, target)


class _Vectors:
  """Embeddings as rows of float32, which become a .npy file."""

  def __init__(self, width: int):
    self._width = width

  def encoded(self, row: Row) -> bytes:
    """The bytes of a vector."""
    vector = np.full(self._width, np.nan) if 'error' in row else row[VECTOR]
    return np.asarray(vector, '<f4').tobytes()

  def done(self, partial: pathlib.Path) -> int:
    """How many vectors an interrupted call has left; half a vector is cut off."""
    if not partial.is_file():
      return 0
    whole = partial.stat().st_size // (4 * self._width)
    os.truncate(partial, whole * 4 * self._width)
    return whole

  def finish(self, partial: pathlib.Path, target: pathlib.Path) -> None:
    """Makes the target of the whole file."""
    vectors = np.memmap(partial, '<f4', 'r').reshape(-1, self._width)
    with files.whole_file(target, 'wb') as file:
      np.save(file, vectors)


def _key(records: Records, made_by: object) -> str:
  known = repr((_stamp(records.path), records.fields, made_by))
  return hashlib.sha256(known.encode()).hexdigest()[:8]


def _stamp(path: pathlib.Path) -> tuple[object, ...]:
  stat = path.stat()
  return path.name, stat.st_size, stat.st_mtime_ns


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


def _chosen(lines: BinaryIO, numbers: Sequence[int]) -> list[bytes]:
  lines.seek(0)
  wanted = set(numbers)
  found = {number: line for number, line in enumerate(lines) if number in wanted}
  return [found[number] for number in numbers]


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


def _write_parquet(path: pathlib.Path, columns: list[str], lines: BinaryIO) -> None:
  """Reads the lines twice, a group at a time: the types of the columns, then their values."""
  import pyarrow
  import pyarrow.parquet

  types: dict[str, Any] = dict.fromkeys(columns, pyarrow.null())
  for table in _groups(columns, lines):
    types = {name: _common(types[name], values) for name, values in table.items()}
  fields = [(name, pyarrow.string() if type_ is None else type_) for name, type_ in types.items()]
  schema = pyarrow.schema(fields)
  with (
    files.whole_file(path, 'wb') as file,
    pyarrow.parquet.ParquetWriter(file, schema) as writer,
  ):
    for table in _groups(columns, lines):
      arrays = [
        pyarrow.array(
          [None if value is None else _cell(value) for value in values]
          if types[name] is None
          else values,
          schema.field(name).type,
        )
        for name, values in table.items()
      ]
      writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _groups(columns: list[str], lines: BinaryIO) -> Iterator[dict[str, list[Any]]]:
  rows = _decoded(lines)
  while group := list(itertools.islice(rows, GROUP)):
    yield {name: [row.get(name) for row in group] for name in columns}


def _common(known: 'pyarrow.DataType | None', values: list[Any]) -> 'pyarrow.DataType | None':
  """The type of a column that has one type so far, and of more values; None for no common one."""
  import pyarrow

  if known is None or any(isinstance(value, dict) for value in values):
    return None
  try:
    more = pyarrow.array(values).type
    schemas = [pyarrow.schema([('x', type_)]) for type_ in (known, more)]
    return pyarrow.unify_schemas(schemas, promote_options='permissive').field('x').type
  except (ValueError, TypeError, OverflowError):  # pyarrow's own errors are some of these
    return None
