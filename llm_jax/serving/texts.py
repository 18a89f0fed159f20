"""The texts that a request asks for, as a writer writes them: at once, or piece by piece."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llm_jax.generation.guides import Guide
from llm_jax.serving import bodies
from llm_jax.serving.bodies import Part
from llm_jax.serving.fields import Refused
from llm_jax.serving.served import Served
from llm_jax.serving.watch import Asked, Watch
from llm_jax.serving.writing import ERROR, UNGUIDED, Likely, Order


class Texts:
  """What is ordered of a model's writer; nobody wants it any more once the context is left.

  Args:
    model: that writes.
    body: of the request.
    prompts: ids, and those that end what follows.
    guides: what each text may be, all of the first prompt first.
    watch: counts.
    asked: the request, as it is counted.

  Raises:
    ValueError: what cannot be written.
    Full: too many texts wait.
  """

  def __init__(
    self,
    model: Served,
    body: Mapping[str, Any],
    prompts: Sequence[tuple[list[int], tuple[int, ...]]],
    guides: Sequence[Guide | None],
    watch: Watch,
    asked: Asked,
  ):
    self._model, self._watch, self._asked = model, watch, asked
    self._said: asyncio.Queue[Part] = asyncio.Queue()
    self._orders: list[Order] = []
    self._loop, likely = asyncio.get_running_loop(), bodies.likely(body)
    if (count := len(prompts) * body['n']) > model.writer.limit:
      raise ValueError(f'{count} texts at once are more than {model.writer.limit}; ask for fewer.')
    try:
      for ids, ends in prompts:
        sampling = bodies.sampling(body, model.writer.room(ids))
        for _ in range(body['n']):
          number = len(self._orders)
          how = sampling, ends, body['stop'], number, self._teller(number), likely
          self._orders.append(model.write(ids, *how, guides[number]))
    except BaseException:
      self._leave()
      raise
    watch.read(model, asked, [ids for ids, _ in prompts])

  @property
  def tokens(self) -> int:
    """How many are written."""
    return sum(order.tokens for order in self._orders)

  def __enter__(self) -> 'Texts':
    return self

  def __exit__(self, *_) -> None:
    self._leave()

  async def whole(self) -> list[Part]:
    """All texts, each in one part."""
    found = [Part(number, '', None, []) for number in range(len(self._orders))]
    async for part in self._parts():
      found[part.index] = found[part.index].followed(part)
    return found

  async def streamed(self, form: bodies.Written, usage: bool, seconds: float) -> AsyncIterator[str]:
    """Server-sent events: each piece as it comes, in at most so many seconds."""
    begun: set[int] = set()
    try:
      async with asyncio.timeout(seconds):
        async for part in self._parts():
          yield _event(form.part(part, part.index not in begun))
          begun.add(part.index)
      if usage:
        yield _event(form.last(self.tokens))
    except (Refused, TimeoutError) as error:
      self._watch.refused('late' if isinstance(error, TimeoutError) else 'failed')
      said = str(error) or 'The answer took too long.'
      yield _event(bodies.failure(said, getattr(error, 'kind', 'server_error'), None))
    yield 'data: [DONE]\n\n'

  async def _parts(self) -> AsyncIterator[Part]:
    left = len(self._orders)
    while left:
      part = await self._said.get()
      if part.reason == ERROR:
        raise Refused(500, 'Writing failed; the log of the service says why.', 'server_error')
      if part.reason == UNGUIDED:
        raise Refused(
          400, 'No text could be written that is as it must be.', field='response_format'
        )
      left -= part.reason is not None
      yield part

  def _teller(self, number: int):
    """What a writer calls, in its thread, with the pieces of a text."""

    def tell(piece: str, reason: str | None, tokens: Sequence[Likely]) -> None:
      if not self._loop.is_closed():  # the service has not ended meanwhile
        part = Part(number, piece, reason, list(tokens))
        self._loop.call_soon_threadsafe(self._said.put_nowait, part)

    return tell

  def _leave(self) -> None:
    for order in self._orders:
      order.cancelled = True
    self._asked.begun = min((order.begun for order in self._orders if order.begun), default=None)
    self._watch.wrote(self._model, self._asked, self.tokens)


class Stream(StreamingResponse):
  """Texts that nobody wants any more once the response is over, however it ends."""

  def __init__(self, texts: Texts, events: AsyncIterator[str]):
    super().__init__(events, media_type='text/event-stream')
    self._texts = texts

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    with self._texts:
      await super().__call__(scope, receive, send)


def _event(found: Mapping[str, Any]) -> str:
  return f'data: {json.dumps(found)}\n\n'
