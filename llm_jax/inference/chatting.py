"""A conversation with a model: what was said, as much of it as fits, and the next answer."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax.core.tree import PyTree
from llm_jax.data import conversations
from llm_jax.data.chat_template import Template
from llm_jax.data.conversations import Message
from llm_jax.generation.completion import Completer
from llm_jax.generation.sampling import Sampling


class Chat:
  """Answers conversations by a template.

  Args:
    completer: of the decoder; completions end with what ends a turn.
    template: how conversations become text.
  """

  def __init__(self, completer: Completer, template: Template):
    self.completer, self._template = completer, template

  def __call__(
    self,
    weights: PyTree,
    messages: Sequence[Message],
    sampling: Sampling,
    stream: Callable[[str], None] | None = None,
  ) -> str:
    """What the assistant says next.

    Args:
      weights: as `Generator.weights` makes them.
      messages: the last one is of the user, or of a tool.
      sampling: how tokens are chosen.
      stream: called with each piece of the answer.

    Raises:
      ValueError: messages that are no conversation, or longer with the answer than the model takes;
        several answers.
    """
    if sampling.num_return_sequences > 1:
      raise ValueError(
        f'num_return_sequences={sampling.num_return_sequences}: a conversation goes on with one '
        'answer; leave it out.'
      )
    ids = self.ids(messages)
    pieces = stream or (lambda _: None)
    (text,) = self.completer.from_ids(
      weights, [ids], sampling, stream=lambda _, piece: pieces(piece)
    )
    return text

  def ids(self, messages: Sequence[Message]) -> list[int]:
    """What the model reads before its answer.

    Raises:
      ValueError: messages that are no conversation, or that no answer follows on.
    """
    self._check(messages)
    return self._template.prompt_ids(messages)

  def fitting(self, messages: Sequence[Message], sampling: Sampling) -> list[Message]:
    """The messages without as many of the oldest turns as the model has no room for, with the
    answer; a system message stays.

    Raises:
      ValueError: the last turn alone is too long.
    """
    self._check(messages)
    kept = list(messages)
    system = [message for message in kept[:1] if message['role'] == 'system']
    while not self._fits(kept, sampling):
      turns = kept[len(system) :]
      later = [i for i, message in enumerate(turns) if i and message['role'] == 'user']
      if not later:
        self.completer.generator.check([self._template.prompt_ids(kept)], [sampling])
      kept = [*system, *turns[later[0] :]]
    return kept

  def _fits(self, messages: Sequence[Message], sampling: Sampling) -> bool:
    ids = self._template.prompt_ids(messages)
    return self.completer.generator.room(ids) >= sampling.max_new_tokens

  def _check(self, messages: Sequence[Message]) -> None:
    conversations.check(messages)
    if messages[-1]['role'] not in ('user', 'tool'):
      raise ValueError(
        f'the last message is of {messages[-1]["role"]}; an answer follows on user or tool.'
      )


def save(path: str, messages: Sequence[Message]) -> None:
  """Writes a conversation as a line of JSON, as `config.data.source=chat` reads it; what stands in
  the file stays.
  """
  with open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps({'messages': list(messages)}, ensure_ascii=False) + '\n')


def system(text: str | None) -> list[dict[str, Any]]:
  """The messages that a conversation begins with."""
  return [{'role': 'system', 'content': text}] if text else []
