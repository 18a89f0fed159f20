"""What may stand in the body of a request: names, types, ranges."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

NOTHING = object()  # a field that must be there


class Refused(Exception):
  """A request that is not answered.

  Attributes:
    status: of HTTP.
    kind: OpenAI's name of the kind of error.
    field: which field of the body is wrong; None for none.
    after: in how many seconds to come again; None where that would change nothing.
  """

  def __init__(
    self,
    status: int,
    message: str,
    kind: str = 'invalid_request_error',
    field: str | None = None,
    after: float | None = None,
  ):
    super().__init__(message)
    self.status, self.kind, self.field, self.after = status, kind, field, after


class Field(NamedTuple):
  """What a field may be.

  Attributes:
    check: its value to what is used; raises ValueError, whose message says what it must be.
    default: where it is not there, or null; `NOTHING` where it must be.
  """

  check: Callable[[Any], Any]
  default: Any = NOTHING


def read(body: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
  """The fields of a body.

  Raises:
    Refused: no JSON object, a field that is missing, unknown or wrong.
  """
  try:
    found = json.loads(body)
  except (ValueError, RecursionError):
    raise Refused(400, 'The body must be JSON.') from None
  if not isinstance(found, dict):
    raise Refused(400, 'The body must be a JSON object.')
  for name in found:
    if name not in fields:
      raise Refused(
        400, f'{_short(name)} is no field here; there are {", ".join(fields)}.', field=_short(name)
      )
  return {name: _value(name, field, found.get(name)) for name, field in fields.items()}


def _value(name: str, field: Field, given: Any) -> Any:
  if given is None:
    if field.default is NOTHING:
      raise Refused(400, f'The field {name} is missing.', field=name)
    return field.default
  try:
    return field.check(given)
  except ValueError as error:
    raise Refused(400, f'{name}={_short(given)} must be {error}.', field=name) from None


def _short(value: Any) -> str:
  """Not more of a value than a message needs."""
  text = value if isinstance(value, str) else repr(value)
  text = text.encode('utf-8', 'replace').decode()
  return text if len(text) <= 40 else f'{text[:37]}...'


def text(value: Any) -> str:
  """A string that UTF-8 can hold."""
  if not isinstance(value, str):
    raise ValueError('a string')
  try:
    value.encode()
  except UnicodeEncodeError:
    raise ValueError('text, without halves of characters') from None
  return value


def texts(most: int) -> Callable[[Any], list[str]]:
  """A string, or a list of some."""

  def check(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not 0 < len(found) <= most:
      raise ValueError(f'a string, or a list of 1 to {most} strings')
    try:
      return [text(one) for one in found]
    except ValueError as error:
      raise ValueError(f'a string, or a list of strings, and each of them {error}') from None

  return check


def stops(value: Any) -> list[str]:
  """Strings that end a text."""
  found = texts(16)(value)
  if '' in found:
    raise ValueError('a string, or a list of up to 16, none of them empty')
  return found


def number(least: float, most: float) -> Callable[[Any], float]:
  """A number in a range."""

  def check(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f'a number from {least} to {most}')
    if not (math.isfinite(value) and least <= value <= most):
      raise ValueError(f'a number from {least} to {most}')
    return float(value)

  return check


def whole(least: int, most: int) -> Callable[[Any], int]:
  """A whole number in a range."""

  def check(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
      raise ValueError(f'a whole number from {least} to {most}')
    return value

  return check


def flag(value: Any) -> bool:
  """True or false."""
  if not isinstance(value, bool):
    raise ValueError('true or false')
  return value


def one_of(*names: str) -> Callable[[Any], str]:
  """One of some words."""

  def check(value: Any) -> str:
    if value not in names:
      raise ValueError(f'one of {", ".join(names)}')
    return value

  return check


def records(most: int) -> Callable[[Any], list[dict[str, Any]]]:
  """Texts, pairs of texts, or objects, in a list, as records."""

  def check(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not 0 < len(value) <= most:
      raise ValueError(f'a list of 1 to {most} texts, pairs of texts, or objects')
    return [_record(one) for one in value]

  return check


def _record(value: Any) -> dict[str, Any]:
  if isinstance(value, dict):
    return value
  if isinstance(value, str):
    return {'text': text(value)}
  if isinstance(value, list) and len(value) == 2:
    return {'text': text(value[0]), 'pair': text(value[1])}
  raise ValueError('a list of texts, pairs of texts, or objects')


def messages(value: Any) -> list[dict[str, str]]:
  """The messages of a conversation, each with the text of its parts."""
  if not isinstance(value, list) or not value:
    raise ValueError('a list of messages')
  return [_message(one) for one in value]


def _message(value: Any) -> dict[str, str]:
  if not isinstance(value, dict) or not isinstance(value.get('role'), str):
    raise ValueError('a list of objects, each with role and content')
  content = value.get('content')
  if isinstance(content, list):  # parts: {'type': 'text', 'text': ...}
    parts = [part.get('text') if isinstance(part, dict) else None for part in content]
    content = None if None in parts else ''.join(map(text, parts))
  if not isinstance(content, str):
    raise ValueError('a list of objects, each with role and content, a text')
  role = 'system' if value['role'] == 'developer' else value['role']
  return {'role': text(role), 'content': text(content)}
