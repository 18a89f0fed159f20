"""From a JSON object or a table's row to a record: the named fields, checked, labels in
the forms of the contract.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from llm_jax.core import plugins


def make(
  fields: Mapping[str, Any], where: str, text: str, pair: str | None, label: str | None
) -> dict[str, Any]:
  """Returns {'text': str} with 'pair' and 'label' where those fields are asked for.

  Args:
    fields: field name -> value.
    where: what to call the row in an error ('data.jsonl:17').
    text: name of the field with the text.
    pair: name of the field with the second text, or None.
    label: name of the field with the label, or None.

  Raises:
    ValueError: a field is missing, or its value is no text or no label.
  """
  check_fields(where, fields, text, pair, label)
  record: dict[str, Any] = {'text': string(fields[text], f'{where}: field {text!r}')}
  if pair is not None:
    record['pair'] = string(fields[pair], f'{where}: field {pair!r}')
  if label is not None:
    record['label'] = label_value(fields[label], f'{where}: label field {label!r}')
  return record


def check_fields(
  where: str, known: Iterable[str], text: str, pair: str | None, label: str | None
) -> None:
  """Raises ValueError unless every field that is asked for is among `known`."""
  known = list(known)
  for option, field in (('text', text), ('pair', pair), ('label', label)):
    if field is not None and field not in known:
      raise ValueError(
        f'{where}: no field {field!r}{plugins.nearest(field, known)}; it has: {", ".join(known)}. '
        f'The option `{option}` names the field.'
      )


def string(value: Any, where: str) -> str:
  """Returns `value` if it is a string that UTF-8 can hold, else raises ValueError."""
  if not isinstance(value, str):
    raise ValueError(f'{where} is {value!r}, of type {type(value).__name__}; it must be a string.')
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:
    raise ValueError(
      f'{where} has half of a surrogate pair at character {error.start}: not valid text.'
    ) from error
  return value


def label_value(value: Any, where: str) -> str | float | list[str]:
  """A label as the contract has it: str (also for int and bool), float, or list of str.

  Raises:
    ValueError: the label is missing (null, an empty string), not a number, or of another type.
  """
  if isinstance(value, (list, tuple)):
    return [_name(item, where) for item in value]
  if isinstance(value, float):
    if not math.isfinite(value):
      raise ValueError(f'{where} is {value}; a label must be a finite number.')
    return value
  return _name(value, where)


def _name(value: Any, where: str) -> str:
  if value is None or value == '':
    raise ValueError(
      f'{where} is missing; give every record a label, or set no label field to read them all '
      'without.'
    )
  if not isinstance(value, (str, int)):
    raise ValueError(
      f'{where} is {value!r}, of type {type(value).__name__}; '
      'allowed: string, integer, boolean, number, list of strings.'
    )
  return str(value)
