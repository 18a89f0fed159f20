"""The routes of OpenAI's interface: what their requests hold, and what is answered.

https://platform.openai.com/docs/api-reference
"""

import base64
import itertools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.generation.sampling import Sampling
from llm_jax.serving import fields
from llm_jax.serving.fields import Field
from llm_jax.serving.writing import LIKELY, Likely

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
  'stream_options': Field(fields.anything, None),
  'user': Field(fields.text, None),
  'response_format': Field(fields.form, None),
  # What OpenAI has not.
  'top_k': Field(fields.whole(0, 2**31 - 1), 0),
  'min_p': Field(fields.number(0, 1), 0.0),
  'repetition_penalty': Field(fields.number(0.01, 100), 1.0),
  'min_tokens': Field(fields.whole(0, 2**20), 0),
}
COMPLETIONS = {
  'prompt': Field(fields.texts(MANY)),
  'logprobs': Field(fields.whole(0, LIKELY), None),
} | _WRITING
CHAT = {
  'messages': Field(fields.messages),
  'max_completion_tokens': Field(fields.whole(1, 2**20), None),
  'logprobs': Field(fields.flag, False),
  'top_logprobs': Field(fields.whole(0, LIKELY), None),
} | _WRITING
EMBEDDINGS = {
  'model': Field(fields.text, None),
  'input': Field(fields.texts(MANY)),
  'encoding_format': Field(fields.one_of('float', 'base64'), 'float'),
  'dimensions': Field(fields.whole(1, 2**16), None),
  'user': Field(fields.text, None),
}
DEFAULT_TOKENS = 128


class Part(NamedTuple):
  """A part of a text.

  Attributes:
    index: the number of the text.
    piece: what is added to it.
    reason: why the text is over; None where it is not.
    tokens: those of it, where they are asked for.
  """

  index: int
  piece: str
  reason: str | None
  tokens: list[Likely]

  def followed(self, part: 'Part') -> 'Part':
    """With another part behind it."""
    return Part(self.index, self.piece + part.piece, part.reason, self.tokens + part.tokens)


def likely(body: Mapping[str, Any]) -> int | None:
  """How many of the likeliest tokens are said at each; None where not even its own is.

  Raises:
    ValueError: numbers that do not go together.
  """
  if 'top_logprobs' not in body:
    return body['logprobs']
  if body['top_logprobs'] and not body['logprobs']:
    raise ValueError('top_logprobs needs logprobs=true.')
  return (body['top_logprobs'] or 0) if body['logprobs'] else None


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
    spelled: what a token spells.
  """

  def __init__(self, name: str, chat: bool, prompt_tokens: int, spelled: Callable[[int], bytes]):
    self._chat, self._prompt_tokens, self._spelled = chat, prompt_tokens, spelled
    self._offsets: dict[int, int] = {}  # characters of each text whose tokens were said
    kind = 'chat.completion' if chat else 'text_completion'
    streamed = 'chat.completion.chunk' if chat else kind
    known = {'created': int(time.time()), 'model': name}
    number = f'{"chatcmpl" if chat else "cmpl"}-{uuid.uuid4().hex}'
    self._whole = {'id': number, 'object': kind} | known
    self._part = {'id': number, 'object': streamed} | known

  def whole(self, texts: Sequence[Part], tokens: int) -> dict[str, Any]:
    """The answer, all texts in it."""
    choices = []
    for text in texts:
      message = {'role': 'assistant', 'content': text.piece}
      said = {'message': message} if self._chat else {'text': text.piece}
      choices.append(self._choice(text) | said)
    return self._whole | {'choices': choices, 'usage': self.usage(tokens)}

  def part(self, part: Part, first: bool) -> dict[str, Any]:
    """A piece of one text, as it is streamed."""
    said: dict[str, Any] = {'text': part.piece}
    if self._chat:
      delta = {'role': 'assistant'} if first else {}
      said = {'delta': delta | ({'content': part.piece} if part.piece else {})}
    return self._part | {'choices': [self._choice(part) | said]}

  def _choice(self, part: Part) -> dict[str, Any]:
    likely = (self._of_chat if self._chat else self._of_completion)(part) if part.tokens else None
    return {'index': part.index, 'logprobs': likely, 'finish_reason': part.reason}

  def _of_chat(self, part: Part) -> dict[str, Any]:
    def said(token: int, logprob: float) -> dict[str, Any]:
      spelled = self._spelled(token)
      text = spelled.decode('utf-8', 'replace')
      return {'token': text, 'logprob': logprob, 'bytes': [*spelled]}

    content = [
      said(one.token, one.logprob) | {'top_logprobs': [said(*other) for other in one.others]}
      for one in part.tokens
    ]
    return {'content': content, 'refusal': None}

  def _of_completion(self, part: Part) -> dict[str, Any]:
    spell = lambda token: self._spelled(token).decode('utf-8', 'replace')
    texts = [spell(one.token) for one in part.tokens]
    begun = self._offsets.get(part.index, 0)
    offsets = [begun, *itertools.accumulate(map(len, texts), initial=begun)][1:]
    self._offsets[part.index] = offsets.pop()
    return {
      'tokens': texts,
      'token_logprobs': [one.logprob for one in part.tokens],
      'top_logprobs': [{spell(token): one for token, one in t.others} for t in part.tokens],
      'text_offset': offsets,
    }

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


def failure(message: str, kind: str, field: str | None) -> dict[str, Any]:
  """The body of an answer that is none."""
  return {'error': {'message': message, 'type': kind, 'param': field, 'code': None}}
