"""What may stand in the body of a request: names, types, ranges."""

import dataclasses
import json
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


@dataclasses.dataclass(frozen=True)
class Check:
  """What a value must be.

  Attributes:
    run: the value to what is used; raises ValueError, whose message says what it must be.
    schema: the same as JSON Schema, which `/openapi.json` has.
  """

  run: Callable[[Any], Any]
  schema: Mapping[str, Any]

  def __call__(self, value: Any) -> Any:
    return self.run(value)


def described(**schema: Any) -> Callable[[Callable[[Any], Any]], Check]:
  """Makes a function a check with a schema."""
  return lambda run: Check(run, schema)


class Field(NamedTuple):
  """What a field may be.

  Attributes:
    check: of its value.
    default: where it is not there, or null; `NOTHING` where it must be.
  """

  check: Check
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


def schema(fields: Mapping[str, Field]) -> dict[str, Any]:
  """The JSON Schema of the bodies that `read` reads.

  It cannot say that text must be such as UTF-8 can hold.
  """
  return {
    'type': 'object',
    'properties': {name: _schema(field) for name, field in fields.items()},
    'required': [name for name, field in fields.items() if field.default is NOTHING],
    'additionalProperties': False,
  }


def _schema(field: Field) -> dict[str, Any]:
  if field.default is NOTHING:
    return {**field.check.schema}
  nullable = {'anyOf': [field.check.schema, {'type': 'null'}]} if field.check.schema else {}
  return nullable | ({} if field.default in (None, ()) else {'default': field.default})


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


@described()
def anything(value: Any) -> Any:
  """Any value."""
  return value


@described(type='string')
def text(value: Any) -> str:
  """A string that UTF-8 can hold."""
  if not isinstance(value, str):
    raise ValueError('a string')
  try:
    value.encode()
  except UnicodeEncodeError:
    raise ValueError('text, without halves of characters') from None
  return value


def texts(most: int) -> Check:
  """A string, or a list of some."""

  @described(anyOf=[text.schema, _list_of(text.schema, most)])
  def check(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not 0 < len(found) <= most:
      raise ValueError(f'a string, or a list of 1 to {most} strings')
    try:
      return [text(one) for one in found]
    except ValueError as error:
      raise ValueError(f'a string, or a list of strings, and each of them {error}') from None

  return check


def _list_of(schema: Mapping[str, Any], most: int | None = None) -> dict[str, Any]:
  limits = {'minItems': 1} | ({} if most is None else {'maxItems': most})
  return {'type': 'array', 'items': schema, **limits}


_STOP = {'type': 'string', 'minLength': 1}


@described(anyOf=[_STOP, _list_of(_STOP, 16)])
def stops(value: Any) -> list[str]:
  """Strings that end a text."""
  found: list[str] = texts(16)(value)
  if '' in found:
    raise ValueError('a string, or a list of up to 16, none of them empty')
  return found


def number(least: float, most: float) -> Check:
  """A number in a range."""

  @described(type='number', minimum=least, maximum=most)
  def check(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
      raise ValueError(f'a number from {least} to {most}')
    return float(value)

  return check


def whole(least: int, most: int) -> Check:
  """A whole number in a range; 2.0 is one, as in JSON Schema."""

  @described(type='integer', minimum=least, maximum=most)
  def check(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
      value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
      raise ValueError(f'a whole number from {least} to {most}')
    return value

  return check


@described(type='boolean')
def flag(value: Any) -> bool:
  """True or false."""
  if not isinstance(value, bool):
    raise ValueError('true or false')
  return value


def one_of(*names: str) -> Check:
  """One of some words."""

  @described(type='string', enum=[*names])
  def check(value: Any) -> str:
    if not isinstance(value, str) or value not in names:
      raise ValueError(f'one of {", ".join(names)}')
    return value

  return check


_PAIR = {'type': 'array', 'items': text.schema, 'minItems': 2, 'maxItems': 2}


_JSON_SCHEMA = {
  'type': 'object',
  'properties': {'schema': {'type': 'object'}},
  'required': ['schema'],
}


@described(
  type='object',
  required=['type'],
  oneOf=[
    {'properties': {'type': {'enum': ['text', 'json_object']}}},
    {
      'properties': {'type': {'const': 'json_schema'}, 'json_schema': _JSON_SCHEMA},
      'required': ['json_schema'],
    },
    {
      'properties': {
        'type': {'const': 'grammar'},
        'syntax': {'enum': ['lark', 'regex']},
        'definition': {'type': 'string'},
      },
      'required': ['syntax', 'definition'],
    },
  ],
)
def form(value: Any) -> tuple[str, Any] | None:
  """What a text must be, as `generation.guides` has it: a kind and a form; None for anything."""
  kind = value.get('type') if isinstance(value, dict) else None
  if kind == 'text':
    return None
  if kind == 'json_object':
    return 'json', {'type': 'object'}
  if kind == 'json_schema' and isinstance(value.get('json_schema'), dict):
    if isinstance(value['json_schema'].get('schema'), dict):
      return 'json', value['json_schema']['schema']
  if kind == 'grammar' and value.get('syntax') in ('lark', 'regex'):
    return value['syntax'], text(value.get('definition'))
  raise ValueError(
    'an object with type: text, json_object, json_schema with a json_schema that has a schema, or '
    'grammar with syntax, lark or regex, and definition'
  )


def records(most: int) -> Check:
  """Texts, pairs of texts, or objects, in a list, as records."""

  @described(**_list_of({'anyOf': [text.schema, _PAIR, {'type': 'object'}]}, most))
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


_PART = {'type': 'object', 'properties': {'text': text.schema}, 'required': ['text']}
_MESSAGE = {
  'type': 'object',
  'properties': {
    'role': text.schema,
    'content': {'anyOf': [text.schema, {'type': 'array', 'items': _PART}]},
  },
  'required': ['role', 'content'],
}


@described(**_list_of(_MESSAGE))
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
