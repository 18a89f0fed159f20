"""`--mode=chat`: a conversation in the terminal.

A line that begins with a slash is a command: `/reset` begins anew, `/save FILE` adds the
conversation to a file that `config.data.source=chat` reads, `/exit` (or the end of the input) ends.
"""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.modes import _decoding
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.generation.sampling import Sampling
  from llm_jax.inference.session import Session

SYSTEM = flags.DEFINE_string('system', None, 'chat: what a conversation begins with.')
ASKS = '> '  # before what the user types, on a terminal


def run(command: Command) -> None:
  """Reads standard input, writes standard output."""
  sampling = _decoding.sampling(temperature=1.0)
  chat(command.session(), sampling, SYSTEM.value, _lines())


def chat(
  session: 'Session',
  sampling: 'Sampling',
  system: str | None,
  lines: Iterable[str],
  say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
  """Answers each line, and gives the conversation as it stands at the end.

  Args:
    session: a decoder with a chat template.
    sampling: how tokens are chosen.
    system: what the conversation begins with.
    lines: what the user types.
    say: prints; None: to standard output, at once.

  Raises:
    ValueError: a model that answers in no conversation, or has no room for any answer.
  """
  from llm_jax.inference import chatting

  say = say or _print
  begin = chatting.system(system)
  session.fitting([*begin, {'role': 'user', 'content': '-'}], sampling)  # before anybody types
  messages = list(begin)
  for line in lines:
    said = line.strip()
    if said.startswith('/'):
      if said == '/exit':
        break
      messages = _commanded(said, messages, begin, say)
    elif said:
      messages = _answered(session, sampling, messages, said, say)
  return messages


def _answered(
  session: 'Session',
  sampling: 'Sampling',
  messages: list[dict[str, Any]],
  said: str,
  say: Callable[[str], None],
) -> list[dict[str, Any]]:
  """The conversation with an answer; as it was where there can be none."""
  asked = [*messages, {'role': 'user', 'content': said}]
  try:
    kept = session.fitting(asked, sampling)
    if len(kept) < len(asked):
      say(f'({len(asked) - len(kept)} earlier messages no longer fit and are left out)\n')
    answer = session.chat(kept, sampling=sampling, stream=say)
  except ValueError as error:
    say(f'error: {error}\n')
    return messages
  say('\n')
  return [*kept, {'role': 'assistant', 'content': answer}]


def _commanded(
  said: str,
  messages: list[dict[str, Any]],
  begin: list[dict[str, Any]],
  say: Callable[[str], None],
) -> list[dict[str, Any]]:
  from llm_jax.inference import chatting

  name, _, argument = said.partition(' ')
  if name == '/reset' and not argument:
    say('(a new conversation)\n')
    return list(begin)
  if name == '/save' and argument.strip():
    try:
      chatting.save(argument.strip(), messages)
      say(f'({len(messages)} messages saved to {argument.strip()})\n')
    except OSError as error:
      say(f'error: {error}\n')
    return messages
  say('commands: /reset, /save FILE, /exit\n')
  return messages


def _lines() -> Iterable[str]:
  asks = ASKS if sys.stdin.isatty() else ''
  while True:
    try:
      yield input(asks)
    except EOFError:
      return


def _print(piece: str) -> None:
  print(piece, end='', flush=True)
