"""From a JSON object or a table's row to a record: the named fields, checked, labels in
the forms of the contract.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from llm_jax.core import plugins


@dataclasses.dataclass(frozen=True)
class Fields:
  """Which fields make a record.

  Attributes:
    text: name of the field with the text; '' where records have none.
    pair: name of the field with the second text, or None.
    label: name of the field with the label, or None. A record where it is null or an empty string
      has no label.
    target: name of the field with the text that a model is to give for the first one, or None.
    others: names of further fields, which a record holds under these names as they are.

  Raises:
    ValueError: no field at all, or a further one by a name that is taken.
  """

  text: str
  pair: str | None
  label: str | None
  others: tuple[str, ...] = ()
  target: str | None = None

  def __post_init__(self) -> None:
    if not self.names:
      raise ValueError("text='' leaves no field to read; name one in `fields`.")
    for name in self.others:
      if name in ('text', 'pair', 'label', 'target') or self.others.count(name) > 1:
        raise ValueError(
          f'fields={self.others} names {name!r}, which is taken; the options text, pair, label and '
          'target are for those, and a further field is named once.'
        )

  @property
  def names(self) -> list[str]:
    """The names of the fields that are read, each once."""
    named = (self.text or None, self.pair, self.label, self.target, *self.others)
    return [name for name in dict.fromkeys(named) if name is not None]

  @property
  def key(self) -> tuple[Any, ...]:
    """What of it belongs to the fingerprint of a source."""
    further = [self.others] if self.others or self.target else []
    return (self.text, self.pair, self.label, *further, *([self.target] if self.target else []))

  def check(self, where: str, known: Iterable[str]) -> None:
    """Raises ValueError unless every field that is asked for is among `known`."""
    known = list(known)
    options = [('text', self.text or None), ('pair', self.pair), ('label', self.label)]
    options += [('target', self.target), *(('fields', name) for name in self.others)]
    for option, field in options:
      if field is not None and field not in known:
        raise ValueError(
          f'{where}: no field {field!r}{plugins.nearest(field, known)}; it has: '
          f'{", ".join(known) or "none at all"}. The option `{option}` names the field.'
        )

  def record(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A record with 'text', 'pair', 'label' and 'target', where they are asked for, and the further
    fields.

    Args:
      values: field name -> value.
      where: what to call the row in an error ('data.jsonl:17').

    Raises:
      ValueError: a field is missing, or its value is no text or no label.
    """
    self.check(where, values)
    record: dict[str, Any] = {name: values[name] for name in self.others}
    if self.text:
      record['text'] = string(values[self.text], f'{where}: field {self.text!r}')
    if self.pair is not None:
      record['pair'] = string(values[self.pair], f'{where}: field {self.pair!r}')
    if self.target is not None:
      record['target'] = string(values[self.target], f'{where}: field {self.target!r}')
    if self.label is not None and values[self.label] not in (None, ''):
      record['label'] = label_value(values[self.label], f'{where}: label field {self.label!r}')
    return record


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
    ValueError: a number that is not finite, a name in a list that is missing, another type.
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
    raise ValueError(f'{where} lists a name that is missing: {value!r}.')
  if not isinstance(value, (str, int)):
    raise ValueError(
      f'{where} is {value!r}, of type {type(value).__name__}; '
      'allowed: string, integer, boolean, number, list of strings.'
    )
  return str(value)
