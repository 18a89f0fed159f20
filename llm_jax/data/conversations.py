"""Records as conversations: a list of messages, each with a role and content, whatever a record
calls them.

| record | read as |
|---|---|
| `messages`: [{`role`, `content`}] | as they are |
| `conversations`: [{`from`, `value`}] (ShareGPT) | `human` is the user, `gpt` the assistant |
| `instruction`, `input`, `output` (Alpaca) | the first two are what the user says |
| `prompt`, `completion` (or `response`) | one turn |
| `text`, `target` | one turn |

`system`, a text, may stand beside all but the first two.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core.contracts import Record

Message = Mapping[str, Any]
ROLES = ('system', 'user', 'assistant', 'tool')
_ROLES = {  # of other forms
  'human': 'user',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'bing': 'assistant',
  'bard': 'assistant',
  'model': 'assistant',
  'bot': 'assistant',
  'observation': 'tool',
  'function_response': 'tool',
}
_NEXT = {  # role -> what may follow on it
  'system': ('user',),
  'user': ('assistant',),
  'assistant': ('user', 'tool'),
  'tool': ('tool', 'assistant'),
}
_TURNS = (('prompt', 'completion'), ('prompt', 'response'), ('text', 'target'))
FIELDS = (  # that may make a conversation
  'messages',
  'conversations',
  'system',
  'instruction',
  'input',
  'output',
  'prompt',
  'completion',
  'response',
  'chosen',
  'rejected',
)


def messages(record: Record) -> list[dict[str, Any]]:
  """The messages of a record, roles in an order that a conversation has.

  Raises:
    ValueError: fields of no known form, an unknown role, content that is no text, roles in another
      order.

  Example:
    >>> messages({'instruction': 'Add.', 'input': '1 + 1', 'output': '2'})[0]
    {'role': 'user', 'content': 'Add.\\n\\n1 + 1'}
  """
  given = record.get('messages')
  if given is None:
    given = record.get('conversations')
  found = _turns(record) if given is None else _listed(given)
  check(found)
  return found


def check(found: Sequence[Message]) -> None:
  """Raises ValueError for messages that are no conversation."""
  if not found:
    raise ValueError('a conversation without a message.')
  if found[0]['role'] not in ('system', 'user'):
    raise ValueError(f'a conversation must begin with system or user, not with {found[0]["role"]}.')
  pairs = zip(found, found[1:], strict=False)
  for number, (one, other) in enumerate(pairs, 2):
    if other['role'] not in _NEXT[one['role']]:
      raise ValueError(
        f'message {number} of a conversation is of {other["role"]} and follows on one of '
        f'{one["role"]}; {" or ".join(_NEXT[one["role"]])} may follow.'
      )


def prompt(found: Sequence[Message]) -> list[Message]:
  """The messages before the last one of the assistant."""
  last = max(i for i, message in enumerate(found) if message['role'] == 'assistant')
  return list(found[:last])


def preference(record: Record) -> tuple[list[Message], list[Message], list[Message]]:
  """What was asked, and the answers that were chosen and rejected.

  A record has `prompt`, `chosen` and `rejected`, texts or lists of messages; without a prompt the
  two lists begin with what they share.

  Raises:
    ValueError: fields that are not there, two answers that are equal or none.
  """
  missing = [name for name in ('chosen', 'rejected') if not record.get(name)]
  if missing:
    raise ValueError(
      f'a record has no {missing[0]}, only {", ".join(k for k, v in record.items() if v)}; '
      'preferences are prompt, chosen and rejected.'
    )
  sides = [_as_messages(record[name], 'assistant') for name in ('chosen', 'rejected')]
  before = _as_messages(record['prompt'], 'user') if record.get('prompt') else []
  if record.get('system'):
    before = [{'role': 'system', 'content': record['system']}, *before]
  if not before:
    pairs = zip(*sides, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, sides)))
    before, sides = sides[0][:shared], [side[shared:] for side in sides]
  chosen, rejected = sides
  if chosen == rejected:
    raise ValueError('the chosen answer is equal to the rejected one, so neither is better.')
  for side in sides:
    check([*before, *side])
    if not side or side[-1]['role'] != 'assistant' or side[0]['role'] == 'user':
      raise ValueError(
        'chosen and rejected must be what the assistant answers, and end with it; what was asked '
        'before is prompt.'
      )
  return list(before), chosen, rejected


def _as_messages(given: Any, role: str) -> list[dict[str, Any]]:
  if isinstance(given, str):
    return [{'role': role, 'content': given}]
  return _listed(given)


def _listed(given: Any) -> list[dict[str, Any]]:
  if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
    raise ValueError(
      f'the messages of a conversation must be a list of objects with role and content, not '
      f'{_shortened(given)}.'
    )
  return [_message(one, number) for number, one in enumerate(given, 1)]


def _message(one: Mapping[str, Any], number: int) -> dict[str, Any]:
  role = one.get('role', one.get('from'))
  role = _ROLES.get(role, role)
  if role not in ROLES:
    raise ValueError(
      f'message {number} of a conversation has the role {role!r}; known: '
      f'{", ".join((*ROLES, *_ROLES))}.'
    )
  content = one.get('content', one.get('value'))
  if content is None and one.get('tool_calls'):
    content = ''
  if not isinstance(content, str):
    raise ValueError(
      f'message {number} of a conversation ({role}) must have a text as its content, not '
      f'{_shortened(content)}.'
    )
  others = {key: one[key] for key in ('tool_calls', 'name', 'tool_call_id') if one.get(key)}
  return {'role': role, 'content': content} | others


def _turns(record: Record) -> list[dict[str, Any]]:
  """The turn of a record with fields of its own for both sides."""
  if 'instruction' in record and 'output' in record:
    beside = record.get('input')
    asked, answer = record['instruction'], record['output']
    if isinstance(asked, str) and isinstance(beside, str) and beside.strip():
      asked = f'{asked}\n\n{beside}'
  else:
    names = next((pair for pair in _TURNS if all(name in record for name in pair)), None)
    if names is None:
      raise ValueError(
        f'a record has no conversation, only {", ".join(record) or "nothing"}; it needs messages, '
        'conversations, instruction and output, prompt and completion, or text and target '
        '(config.data.text and config.data.target name the latter).'
      )
    asked, answer = (record[name] for name in names)
  turns = [('user', asked), ('assistant', answer)]
  if record.get('system'):
    turns.insert(0, ('system', record['system']))
  for role, content in turns:
    if not isinstance(content, str) or (role == 'assistant' and not content.strip()):
      raise ValueError(f'what {role} says must be a text, not {_shortened(content)}.')
  return [{'role': role, 'content': content} for role, content in turns]


def _shortened(value: Any) -> str:
  shown = repr(value)
  return shown if len(shown) <= 80 else f'{shown[:77]}...'
