"""The service as an ASGI application: routes, keys, errors.

Nothing of a request is logged but its route, status and time.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_jax.serving import bodies, fields
from llm_jax.serving.batches import Batches, Full
from llm_jax.serving.fields import Field, Refused
from llm_jax.serving.keys import Keys
from llm_jax.serving.served import Served
from llm_jax.serving.watch import Watch
from llm_jax.serving.writing import ERROR, Order

OPEN = ('/health', '/ready')  # routes that ask for no key
TASKS = {  # routes, and the objectives whose models answer there
  '/classify': ('classify', 'prompt', 'relation', 'mix'),
  '/tag': ('tag',),
  '/qa': ('qa',),
  '/rerank': ('rerank', 'choice'),
  '/similarity': ('pair',),
}
RECORDS = {
  'model': Field(fields.text, None),
  'inputs': Field(fields.records(bodies.MANY)),
}
FILL = {
  'model': Field(fields.text, None),
  'inputs': Field(fields.texts(bodies.MANY)),
  'top': Field(fields.whole(1, 100), 5),
}
TOKENIZE = {'model': Field(fields.text, None), 'input': Field(fields.texts(bodies.MANY))}

Answer = Callable[['Service', Served, Mapping[str, Any], Request], Awaitable[Response]]


@dataclasses.dataclass
class Service:
  """What the routes share.

  Attributes:
    models: by name; the first is asked where a request names none.
    keys: of those who may ask; None where all may.
    watch: counts.
    most_bytes: of a body.
    seconds: in which an answer must be there.
    ready: whether all is compiled, and nothing is about to end.
  """

  models: dict[str, Served]
  keys: Keys | None
  watch: Watch
  most_bytes: int = 2**20
  seconds: float = 60.0
  ready: bool = False

  def find(self, name: str | None) -> Served:
    """The model of this name; raises Refused where there is none."""
    if name is None:
      return next(iter(self.models.values()))
    if name not in self.models:
      known = ', '.join(self.models)
      raise Refused(404, f'There is no model of this name; there are {known}.', field='model')
    return self.models[name]


def create(service: Service) -> ASGIApp:
  """The application."""
  routes = [
    Route('/health', _health),
    Route('/ready', _ready),
    Route('/metrics', _metrics),
    Route('/v1/models', _models),
    Route('/v1/models/{name:path}', _model),
    _route('/v1/embeddings', bodies.EMBEDDINGS, _embeddings),
    _route('/v1/completions', bodies.COMPLETIONS, _completions),
    _route('/v1/chat/completions', bodies.CHAT, _chat),
    *(_route(path, RECORDS, _answers_of(path)) for path in TASKS),
    _route('/fill', FILL, _fill),
    _route('/tokenize', TOKENIZE, _tokenize),
  ]
  handlers = {Refused: _refused, HTTPException: _http_error, Exception: _defect}
  app = Starlette(routes=routes, exception_handlers=handlers)
  app.state.service = service
  return _Gate(app, service)


class _Gate:
  """What every request passes: the key, the limits of it, the count."""

  def __init__(self, app: Starlette, service: Service):
    self._app, self._service = app, service
    self._paths = {route.path for route in app.routes}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    began, status = time.monotonic(), 500

    async def sent(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    try:
      key = self._key(scope)
      try:
        await self._app(scope, receive, sent)
      finally:
        if key is not None:
          key.leave()
    except Refused as refused:
      await _error(refused)(scope, receive, sent)
    except ClientDisconnect:
      status = 499
    finally:
      # A path of which there is no route is none of a bounded number of names.
      route = scope['path'] if scope['path'] in self._paths else 'other'
      self._service.watch.answered(route, status, time.monotonic() - began)

  def _key(self, scope: Scope):
    """The key of a request, which is counted as begun."""
    if self._service.keys is None or scope['path'] in OPEN:
      return None
    headers = dict(scope['headers'])
    given = headers.get(b'authorization', b'').decode('latin-1')
    kind, _, text = given.partition(' ')
    key = self._service.keys.find(text.strip()) if kind.lower() == 'bearer' else None
    if key is None:
      raise Refused(401, 'Authorization: Bearer KEY, with a key that is known, is needed.')
    if (after := key.enter()) is not None:
      raise Refused(429, 'This key has asked too much; come again later.', after=after)
    return key


def _route(path: str, known: Mapping[str, Field], answer: Answer) -> Route:
  """A route that reads a body, finds the model, and answers."""

  async def endpoint(request: Request) -> Response:
    service: Service = request.app.state.service
    if not service.ready:
      raise Refused(503, 'The service is not ready.', 'server_error', after=1.0)
    body = fields.read(await _body(request, service.most_bytes), known)
    try:
      return await answer(service, service.find(body['model']), body, request)
    except Full:
      raise Refused(
        429, 'Too many requests wait; come again later.', 'server_error', after=1.0
      ) from None
    except TimeoutError:
      raise Refused(504, 'The answer took too long.', 'server_error') from None
    except ValueError as error:  # what a model cannot read
      raise Refused(400, str(error)) from error

  return Route(path, endpoint, methods=['POST'])


async def _body(request: Request, most: int) -> bytes:
  found = bytearray()
  async for part in request.stream():
    found += part
    if len(found) > most:
      raise Refused(413, f'The body has more than {most} bytes.')
  return bytes(found)


async def _health(request: Request) -> Response:
  return JSONResponse({'status': 'ok'})


async def _ready(request: Request) -> Response:
  ready = request.app.state.service.ready
  return JSONResponse({'ready': ready}, 200 if ready else 503)


async def _metrics(request: Request) -> Response:
  text = request.app.state.service.watch.text()
  return Response(text, media_type='text/plain; version=0.0.4')


async def _models(request: Request) -> Response:
  service = request.app.state.service
  return JSONResponse({'object': 'list', 'data': list(map(_described, service.models.values()))})


async def _model(request: Request) -> Response:
  return JSONResponse(_described(request.app.state.service.find(request.path_params['name'])))


def _described(model: Served) -> dict[str, Any]:
  return {'id': model.name, 'object': 'model', 'created': 0, 'owned_by': 'llm_jax'} | (
    {'task': model.task} if model.task else {}
  )


async def _embeddings(service, model, body, request) -> Response:
  texts = body['input']
  if model.embeds is None:
    raise Refused(400, f'{model.name} reads and writes, and gives no vectors.', field='model')
  vectors = await _gathered(service, request, model.embeds, texts)
  if (size := body['dimensions']) is not None:
    if size > len(vectors[0]):
      raise Refused(400, f'dimensions={size}: the vectors have {len(vectors[0])}.')
    vectors = [vector[:size] for vector in vectors]
  tokens = sum(map(len, await _ids(model, texts)))
  service.watch.counted(model.name, tokens, 0)
  return JSONResponse(bodies.embeddings(model.name, vectors, body['encoding_format'], tokens))


def _answers_of(path: str) -> Answer:

  async def answer(service, model, body, request) -> Response:
    if model.answers is None or model.task not in TASKS[path]:
      route = next((route for route, tasks in TASKS.items() if model.task in tasks), None)
      way_out = f'; ask {route}' if route else ''
      raise Refused(400, f'{model.name} was trained by {model.task}, not for {path}{way_out}.')
    await asyncio.to_thread(_check, model, body['inputs'])
    found = await _gathered(service, request, model.answers, body['inputs'])
    return JSONResponse({'model': model.name, 'outputs': found})

  return answer


def _check(model: Served, records: Sequence[Mapping[str, Any]]) -> None:
  """Raises ValueError for a record that the model cannot read."""
  for number, record in enumerate(records):
    try:
      model.session.check_record(record)
    except (TypeError, KeyError, AttributeError):  # a field of another kind
      raise ValueError(
        f'inputs[{number}] has a field of a kind that this model cannot read.'
      ) from None


async def _fill(service, model, body, request) -> Response:
  if model.fills is None:
    raise Refused(400, f'{model.name} writes, and fills in nothing.', field='model')
  found = await _gathered(service, request, model.fills, body['inputs'])
  outputs = [
    {'text': filled.text, 'masks': [mask[: body['top']] for mask in filled.masks]}
    for filled in found
  ]
  return JSONResponse({'model': model.name, 'outputs': outputs})


async def _tokenize(service, model, body, request) -> Response:
  ids = [found.tolist() for found in await _ids(model, body['input'])]
  return JSONResponse({'model': model.name, 'tokens': ids})


async def _ids(model: Served, texts: Sequence[str]) -> list[Any]:
  """The ids of texts, which may be long: others are not kept waiting."""
  return await asyncio.to_thread(lambda: list(map(model.session.tokenizer.encode, texts)))


async def _completions(service, model, body, request) -> Response:
  _check_writes(model)
  prompts = await asyncio.to_thread(lambda: list(map(model.prompt, body['prompt'])))
  return await _written(service, model, body, request, prompts)


async def _chat(service, model, body, request) -> Response:
  _check_writes(model)
  prompt = await asyncio.to_thread(model.turn, body['messages'])
  return await _written(service, model, body, request, [prompt], chat=True)


def _check_writes(model: Served) -> None:
  if model.writer is None:
    raise Refused(400, f'{model.name} is an encoder and writes no text.', field='model')


async def _written(
  service: Service,
  model: Served,
  body: Mapping[str, Any],
  request: Request,
  prompts: Sequence[tuple[list[int], tuple[int, ...]]],
  chat: bool = False,
) -> Response:
  """Texts behind prompts: at once, or piece by piece."""
  form = bodies.Written(model.name, chat, sum(len(ids) for ids, _ in prompts))
  texts = _Texts(service, model, body, prompts)
  if body['stream']:
    options = body['stream_options']
    usage = isinstance(options, dict) and bool(options.get('include_usage'))
    return _Stream(texts, texts.streamed(form, usage), media_type='text/event-stream')
  with texts:
    whole = await _unless_gone(request, texts.whole(), service.seconds)
  return JSONResponse(form.whole(*whole, texts.tokens))


class _Texts:
  """The texts that a request asks for, as they are written."""

  def __init__(self, service, model, body, prompts):
    self._service, self._model = service, model
    self._read = sum(len(ids) for ids, _ in prompts)
    self._said: asyncio.Queue[tuple[int, str, str | None]] = asyncio.Queue()
    self._orders: list[Order] = []
    loop = asyncio.get_running_loop()
    try:
      for ids, ends in prompts:
        sampling = bodies.sampling(body, model.writer.room(ids))
        for _ in range(body['n']):
          number = len(self._orders)

          def tell(piece: str, reason: str | None, number: int = number) -> None:
            if not loop.is_closed():  # the service has not ended meanwhile
              loop.call_soon_threadsafe(self._said.put_nowait, (number, piece, reason))

          self._orders.append(model.write(ids, sampling, ends, body['stop'], number, tell))
    except BaseException:
      self._leave()
      raise

  @property
  def tokens(self) -> int:
    """How many are written."""
    return sum(order.tokens for order in self._orders)

  def __enter__(self) -> '_Texts':
    return self

  def __exit__(self, *_) -> None:
    self._leave()

  def _leave(self) -> None:
    for order in self._orders:
      order.cancelled = True
    self._service.watch.counted(self._model.name, self._read, self.tokens)

  async def whole(self) -> tuple[list[str], list[str]]:
    """All texts, and why each is over."""
    texts, reasons = [''] * len(self._orders), [''] * len(self._orders)
    async for number, piece, reason in self._pieces():
      texts[number] += piece
      reasons[number] = reason or reasons[number]
    return texts, reasons

  async def streamed(self, form: bodies.Written, usage: bool) -> AsyncIterator[str]:
    """Server-sent events: each piece as it comes."""
    begun: set[int] = set()
    try:
      async with asyncio.timeout(self._service.seconds):
        async for number, piece, reason in self._pieces():
          yield _event(form.part(number, piece, reason, number not in begun))
          begun.add(number)
      if usage:
        yield _event(form.last(self.tokens))
    except (Refused, TimeoutError) as error:
      yield _event(_said_of(str(error) or 'The answer took too long.', 'server_error', None))
    yield 'data: [DONE]\n\n'

  async def _pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
    left = len(self._orders)
    while left:
      number, piece, reason = await self._said.get()
      if reason == ERROR:
        raise Refused(500, 'Writing failed; the log of the service says why.', 'server_error')
      left -= reason is not None
      yield number, piece, reason


class _Stream(StreamingResponse):
  """Texts that nobody wants any more once the response is over, however it ends."""

  def __init__(self, texts: _Texts, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._texts = texts

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    with self._texts:
      await super().__call__(scope, receive, send)


async def _gathered(service: Service, request: Request, batches: Batches, items: Sequence) -> list:
  """The answers to some items, from a batch."""
  future = asyncio.wrap_future(batches.submit(items))
  try:
    return await _unless_gone(request, future, service.seconds)
  finally:
    future.cancel()


async def _unless_gone(request: Request, work: Awaitable, seconds: float) -> Any:
  """What the work gives, in its time, and unless the client leaves before."""
  tasks = [asyncio.ensure_future(work), asyncio.create_task(_gone(request))]
  try:
    async with asyncio.timeout(seconds):
      await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if not tasks[0].done():
      raise ClientDisconnect
    return tasks[0].result()
  finally:
    for task in tasks:
      task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await tasks[1]


async def _gone(request: Request) -> None:
  while (await request.receive())['type'] != 'http.disconnect':
    pass


def _event(found: Mapping[str, Any]) -> str:
  return f'data: {json.dumps(found)}\n\n'


def _said_of(message: str, kind: str, field: str | None) -> dict[str, Any]:
  return {'error': {'message': message, 'type': kind, 'param': field, 'code': None}}


def _error(refused: Refused) -> Response:
  headers = {} if refused.after is None else {'Retry-After': str(max(1, round(refused.after)))}
  said = _said_of(str(refused), refused.kind, refused.field)
  return JSONResponse(said, refused.status, headers)


async def _refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, Refused)
  if error.status >= 500:
    logging.error('%s: %s', request.url.path, error)
  return _error(error)


async def _defect(request: Request, error: Exception) -> Response:
  del request, error  # which the server logs
  return _error(Refused(500, 'Something went wrong; the log says what.', 'server_error'))


async def _http_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  said = _said_of(str(error.detail), 'invalid_request_error', None)
  return JSONResponse(said, error.status_code, error.headers)
