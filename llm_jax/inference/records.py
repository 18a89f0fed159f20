"""The records of a file that is to be answered: which fields hold the texts, and what is wrong with
a record that cannot be read, which costs that record alone.
"""

import collections
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from absl import logging

from llm_jax.core import plugins
from llm_jax.core.contracts import Record
from llm_jax.data.sources import _record, conll, conllu, jsonl, parquet, squad, text
from llm_jax.data.sources import csv as tables

TEXT_SUFFIXES = ('.txt', '.txt.gz')
# Sources whose files are answered too, where an objective reads whole records.
SOURCES = {'squad': squad, 'conll': conll, 'conllu': conllu}
SUFFIXES = tuple(
  dict.fromkeys(
    suffix
    for suffixes in (
      jsonl.SUFFIXES,
      tables.SUFFIXES,
      parquet.SUFFIXES,
      TEXT_SUFFIXES,
      *(module.SUFFIXES for module in SOURCES.values()),
    )
    for suffix in suffixes
  )
)
SAMPLE = 100  # records that say which fields there are

Ask = Callable[[Iterator[tuple[int, Record]]], Iterable[dict[str, Any]]]


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
      them, with `text` and `pair` from where the run has them.

  Attributes:
    fields: the fields with text and pair; None where records are whole.
    faults: how many records could not be read so far.

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
    self.faults, self._fault = 0, ''  # how many, and what is wrong with the first
    self._waiting: collections.deque[tuple[dict[str, Any], str]] = collections.deque()
    known, strings = self._columns()
    if whole and (text or pair):
      raise ValueError('this model reads each record as it is; leave --text and --pair out.')
    self.fields = None if whole else self._fields(data, text, pair, known, strings)
    self._own = {name: data.get(name) or name for name in ('text', 'pair')}

  def __len__(self) -> int:
    return len(self._table)

  def answered(
    self, ask: Ask, first: int = 0, check: Callable[[Record], None] | None = None
  ) -> Iterator[dict[str, Any]]:
    """Each record of the file again, in order, with its answer or with `error`.

    A field that the answer brings too (`label`, say) is kept as `input_label`.

    Args:
      ask: gives the answers for the records that can be read, each of which comes with its number.
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
      raise ValueError(f'no record of {self.path} can be read; {self._fault}')
    while self._waiting:
      yield self._faulty(answer)

  def log_faults(self) -> None:
    """Says how many records could not be read, and what is wrong with the first."""
    if self.faults:
      logging.warning(
        '%d records have no answer but `error`, the first: %s', self.faults, self._fault
      )

  def _readable(
    self, first: int, check: Callable[[Record], None] | None
  ) -> Iterator[tuple[int, Record]]:
    for index in range(first, len(self)):
      values, record, fault = {}, {}, ''
      try:
        values = self._table.values(index)
        where = self._table.where(index)
        record = self.fields.record(values, where) if self.fields else self._whole(values, where)
        if check is not None:
          fault = _fault(check, record, where)
      except ValueError as error:
        fault = str(error)
      self._waiting.append((values, fault))
      if not fault:
        yield index, record
        continue
      self.faults, self._fault = self.faults + 1, self._fault or fault

  def _whole(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All fields of a line, with `text` and `pair` from the fields that the run has them in."""
    found = {
      name: _record.string(values[field], f'{where}: field {field!r}')
      for name, field in self._own.items()
      if values.get(field) is not None
    }
    return {**values, **found}

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
      f'{self.path} has no field {own or option!r}; name the one to read with --{option}=FIELD, '
      f'one of: {there}.'
    )


def merged(
  values: Mapping[str, Any], answer: Mapping[str, Any], taken: Iterable[str] = ()
) -> dict[str, Any]:
  """A record with its answer; a field of it that the answer has too, or any in `taken`, is kept as
  `input_NAME`, and so is `error`.
  """
  names = {'error', *answer, *taken}
  return {f'input_{key}' if key in names else key: value for key, value in values.items()} | answer


def spool(stream: BinaryIO, folder: pathlib.Path, text: str | None = None) -> pathlib.Path:
  """What a stream gives as a file in a folder: .jsonl if it begins with {, else a text per line; or
  a table with a header, .tsv or .csv, where a field is named.

  Equal content has an equal name and time, so that an interrupted call can be gone on from.

  Args:
    stream: what is read.
    folder: where the file comes to lie.
    text: the field with the text.
  """
  digest, start = hashlib.sha256(), b''
  with open(folder / 'stdin', 'wb') as file:
    while piece := stream.read(1 << 20):
      start = start or piece.removeprefix(b'\xef\xbb\xbf').lstrip()
      digest.update(piece)
      file.write(piece)
  suffix = '.txt'
  if start.startswith(b'{'):
    suffix = '.jsonl'
  elif text is not None:
    suffix = '.tsv' if b'\t' in start.partition(b'\n')[0] else '.csv'
  path = (folder / 'stdin').rename(folder / f'stdin-{digest.hexdigest()[:8]}{suffix}')
  os.utime(path, (0, 0))
  return path


def _fault(check: Callable[[Record], None], record: Record, where: str) -> str:
  try:
    check(record)
  except ValueError as error:
    return f'{where}: {error}'
  return ''


def _table(path: pathlib.Path, data: Mapping[str, Any]) -> Any:
  name = path.name
  if name.endswith(TEXT_SUFFIXES):
    return text.Table(str(path))
  if name.endswith(jsonl.SUFFIXES):
    return jsonl.Table(str(path))
  for kind, module in SOURCES.items():
    if name.endswith(module.SUFFIXES):
      own = data if data.get('source') == kind else {}
      taken = own.keys() & plugins.signature(module.Source).keys() - {'path'}
      return module.Source(str(path), **{option: own[option] for option in taken})
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
