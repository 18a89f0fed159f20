"""JSON Lines: one object per line; plain or gzip."""

import json
from typing import Any

from llm_jax.data.sources import _lines, _paths, _record

SUFFIXES = ('.jsonl', '.jsonl.gz')


class Table(_lines.Lines):
  """The objects of JSON Lines files as they are; blank lines are none.

  Args:
    path: as that of `Source`.
  """

  def __init__(self, path: str):
    super().__init__(path, SUFFIXES)

  def values(self, index: int) -> dict[str, Any]:
    """All fields of one line as they are; ValueError for a line that is no object."""
    try:
      values = json.loads(self.data(index).decode('utf-8-sig'))
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{self.where(index)}: not a JSON object in UTF-8 ({error}).') from error
    if not isinstance(values, dict):
      raise ValueError(
        f'{self.where(index)}: a {type(values).__name__}, not a JSON object; each line must be '
        'like {"text": "..."}.'
      )
    return values

  def _counts(self, line: bytes) -> bool:
    return bool(line.strip())


class Source(Table):
  """The objects of JSON Lines files as records, by index over byte offsets; blank lines are none.

  Args:
    path: a file, a folder (.jsonl, .jsonl.gz at any depth), a glob, or several with commas between
      them.
    text: name of the field with the text; '' where there is none.
    pair: name of the field with the second text, if there is one.
    label: name of the field with the label, if there is one: a string, integer or boolean (a
      class), a float, or a list of strings.
    fields: names of further fields that the objective reads.
    target: name of the field with the text that a model is to give, if there is one.

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
    target: str | None = None,
  ):
    super().__init__(path)
    self.fields = _record.Fields(text, pair, label, fields, target)
    self.fingerprint = _paths.fingerprint(self.files, 'jsonl', *self.fields.key)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.fields.record(self.values(index), self.where(index))
