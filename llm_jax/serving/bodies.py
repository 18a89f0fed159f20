"""The routes of OpenAI's interface: what their requests hold, and what is answered.

https://platform.openai.com/docs/api-reference
"""

import base64
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.generation.sampling import Sampling
from llm_jax.serving import fields
from llm_jax.serving.fields import Field

MANY = 2048  # texts of a request
_WRITING = {
  'model': Field(fields.text, None),
  'max_tokens': Field(fields.whole(1, 2**20), None),
  'temperature': Field(fields.number(0, 100), 1.0),
  'top_p': Field(fields.number(0, 1), 1.0),
  'n': Field(fields.whole(1, 64), 1),
  'stop': Field(fields.stops, ()),
  'seed': Field(fields.whole(0, 2**32 - 1), 0),
  'stream': Field(fields.flag, False),
  'stream_options': Field(lambda value: value, None),
  'user': Field(fields.text, None),
  # What OpenAI has not.
  'top_k': Field(fields.whole(0, 2**31 - 1), 0),
  'min_p': Field(fields.number(0, 1), 0.0),
  'repetition_penalty': Field(fields.number(0.01, 100), 1.0),
  'min_tokens': Field(fields.whole(0, 2**20), 0),
}
COMPLETIONS = {'prompt': Field(fields.texts(MANY))} | _WRITING
CHAT = {
  'messages': Field(fields.messages),
  'max_completion_tokens': Field(fields.whole(1, 2**20), None),
} | _WRITING
EMBEDDINGS = {
  'model': Field(fields.text, None),
  'input': Field(fields.texts(MANY)),
  'encoding_format': Field(fields.one_of('float', 'base64'), 'float'),
  'dimensions': Field(fields.whole(1, 2**16), None),
  'user': Field(fields.text, None),
}
DEFAULT_TOKENS = 128


def sampling(body: Mapping[str, Any], room: int) -> Sampling:
  """How the tokens of a text are chosen.

  Args:
    body: of a request.
    room: tokens that there is room for, behind the prompt.

  Raises:
    ValueError: numbers that do not go together.
  """
  asked = body.get('max_completion_tokens') or body['max_tokens']
  greedy = body['temperature'] == 0
  return Sampling(
    max_new_tokens=asked or max(1, min(room, DEFAULT_TOKENS)),
    temperature=body['temperature'],
    # Clients send these beside temperature=0, where they change nothing.
    top_p=1.0 if greedy else body['top_p'],
    top_k=0 if greedy else body['top_k'],
    min_p=0.0 if greedy else body['min_p'],
    repetition_penalty=body['repetition_penalty'],
    min_new_tokens=body['min_tokens'],
    seed=body['seed'],
  )


def embeddings(name: str, vectors: Sequence[np.ndarray], encoding: str, tokens: int) -> dict:
  """The answer to a request for vectors."""

  def written(vector: np.ndarray) -> Any:
    if encoding == 'float':
      return vector.tolist()
    return base64.b64encode(vector.astype('<f4').tobytes()).decode()

  data = [
    {'object': 'embedding', 'index': i, 'embedding': written(vector)}
    for i, vector in enumerate(vectors)
  ]
  usage = {'prompt_tokens': tokens, 'total_tokens': tokens}
  return {'object': 'list', 'model': name, 'data': data, 'usage': usage}


class Written:
  """The form of the answers to a request for text.

  Args:
    name: of the model.
    chat: whether it was a conversation.
    prompt_tokens: that were read.
  """

  def __init__(self, name: str, chat: bool, prompt_tokens: int):
    self._chat, self._prompt_tokens = chat, prompt_tokens
    kind = 'chat.completion' if chat else 'text_completion'
    streamed = 'chat.completion.chunk' if chat else kind
    known = {'created': int(time.time()), 'model': name}
    number = f'{"chatcmpl" if chat else "cmpl"}-{uuid.uuid4().hex}'
    self._whole = {'id': number, 'object': kind} | known
    self._part = {'id': number, 'object': streamed} | known

  def whole(self, texts: Sequence[str], reasons: Sequence[str], tokens: int) -> dict[str, Any]:
    """The answer, all texts in it."""
    choices = []
    for i, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
      said = {'message': {'role': 'assistant', 'content': text}} if self._chat else {'text': text}
      choices.append({'index': i, 'logprobs': None, 'finish_reason': reason} | said)
    return self._whole | {'choices': choices, 'usage': self.usage(tokens)}

  def part(self, index: int, piece: str, reason: str | None, first: bool) -> dict[str, Any]:
    """A piece of one text, as it is streamed."""
    said: dict[str, Any] = {'text': piece}
    if self._chat:
      delta = ({'role': 'assistant'} if first else {}) | ({'content': piece} if piece else {})
      said = {'delta': delta}
    choice = {'index': index, 'logprobs': None, 'finish_reason': reason} | said
    return self._part | {'choices': [choice]}

  def last(self, tokens: int) -> dict[str, Any]:
    """What is streamed behind all pieces where the usage is asked for."""
    return self._part | {'choices': [], 'usage': self.usage(tokens)}

  def usage(self, tokens: int) -> dict[str, int]:
    """How many tokens were read and written."""
    return {
      'prompt_tokens': self._prompt_tokens,
      'completion_tokens': tokens,
      'total_tokens': self._prompt_tokens + tokens,
    }
