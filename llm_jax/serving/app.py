"""The service as an ASGI application: routes, keys, errors.

Nothing of a request is logged but its route, status and time.
"""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_jax.core import faults
from llm_jax.generation.guides import Guide
from llm_jax.programs import summary
from llm_jax.serving import bodies, fields, openapi, page
from llm_jax.serving.batches import Batches, Full
from llm_jax.serving.fields import Field, Refused
from llm_jax.serving.keys import Keys
from llm_jax.serving.served import Served
from llm_jax.serving.texts import Stream, Texts
from llm_jax.serving.watch import Asked, Watch

if TYPE_CHECKING:
  from llm_jax.serving.trace import Trace

OPEN = ('/', '/health', '/ready')  # routes that ask for no key
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
FORMS: dict[str, Mapping[str, Field]] = {  # routes that read a body, and its fields
  '/v1/embeddings': bodies.EMBEDDINGS,
  '/v1/completions': bodies.COMPLETIONS,
  '/v1/chat/completions': bodies.CHAT,
  **dict.fromkeys(TASKS, RECORDS),
  '/fill': FILL,
  '/tokenize': TOKENIZE,
}

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
    trace: makes spans of requests; None where nobody wants any.
  """

  models: dict[str, Served]
  keys: Keys | None
  watch: Watch
  most_bytes: int = 2**20
  seconds: float = 60.0
  ready: bool = False
  trace: 'Trace | None' = None

  def __post_init__(self):
    self.watch.ready = lambda: self.ready

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
    Route('/', _page),
    Route('/openapi.json', _openapi),
    Route('/health', _health),
    Route('/ready', _ready),
    Route('/metrics', _metrics),
    Route('/v1/models', _models),
    Route('/v1/models/{name:path}', _model),
    _route('/v1/embeddings', _embeddings),
    _route('/v1/completions', _completions),
    _route('/v1/chat/completions', _chat),
    *(_route(path, _answers_of(path)) for path in TASKS),
    _route('/fill', _fill),
    _route('/tokenize', _tokenize),
  ]
  handlers = {Refused: _refused, HTTPException: _http_error, Exception: _defect}
  app = Starlette(routes=routes, exception_handlers=handlers)
  app.state.service = service
  return _Gate(app, service)


class _Gate:
  """What every request passes: the key, the limits of it, the count, the trace."""

  def __init__(self, app: Starlette, service: Service):
    self._app, self._service = app, service
    self._paths = {route.path for route in app.routes}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    # A path of which there is no route is none of a bounded number of names.
    route = scope['path'] if scope['path'] in self._paths else 'other'
    asked, status = Asked(scope['method'], route), 500
    scope.setdefault('state', {})['asked'] = asked
    self._service.watch.taken += 1

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
          key.leave(asked.read + asked.written)
    except Refused as refused:
      await _error(refused)(scope, receive, sent)
    except ClientDisconnect:
      status = 499
    except asyncio.CancelledError:
      self._service.watch.cut += 1
      raise
    except Exception as error:  # the server would log its message, which may quote a text
      logging.error('%s failed: %s', route, faults.described(error))
    finally:
      self._service.watch.answered(asked, status)
      if self._service.trace is not None and route in FORMS:
        self._service.trace.answered(asked, status, scope['headers'])

  def _key(self, scope: Scope):
    """The key of a request, which is counted as begun."""
    if self._service.keys is None or scope['path'] in OPEN:
      return None
    headers = dict(scope['headers'])
    given = headers.get(b'authorization', b'').decode('latin-1')
    kind, _, text = given.partition(' ')
    key = self._service.keys.find(text.strip()) if kind.lower() == 'bearer' else None
    if key is None:
      self._service.watch.refused('unknown_key')
      raise Refused(401, 'Authorization: Bearer KEY, with a key that is known, is needed.')
    if (after := key.enter()) is not None:
      self._service.watch.refused('key_limit')
      raise Refused(429, 'This key has asked too much; come again later.', after=after)
    return key


def _route(path: str, answer: Answer) -> Route:
  """A route that reads a body, finds the model, and answers."""

  async def endpoint(request: Request) -> Response:
    service: Service = request.app.state.service
    if not service.ready:
      service.watch.refused('not_ready')
      raise Refused(503, 'The service is not ready.', 'server_error', after=1.0)
    body = fields.read(await _body(request, service.most_bytes), FORMS[path])
    try:
      model = service.find(body['model'])
      request.state.asked.model = model.name
      with model.used():
        return await answer(service, model, body, request)
    except Full:
      service.watch.refused('full')
      raise Refused(
        429, 'Too many requests wait; come again later.', 'server_error', after=1.0
      ) from None
    except TimeoutError:
      service.watch.refused('late')
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


async def _page(request: Request) -> Response:
  del request
  return HTMLResponse(page.TEXT, headers=page.HEADERS)


async def _openapi(request: Request) -> Response:
  return JSONResponse(openapi.document(request.app.routes, FORMS, OPEN))


async def _health(request: Request) -> Response:
  return JSONResponse({'status': 'ok'})


async def _ready(request: Request) -> Response:
  ready = request.app.state.service.ready
  return JSONResponse({'ready': ready}, 200 if ready else 503)


async def _metrics(request: Request) -> Response:
  text = request.app.state.service.watch.text()
  return Response(text, media_type='text/plain; version=0.0.4')


async def _models(request: Request) -> Response:
  models = request.app.state.service.models.values()
  described = await asyncio.to_thread(lambda: list(map(_described, models)))
  return JSONResponse({'object': 'list', 'data': described})


async def _model(request: Request) -> Response:
  model = request.app.state.service.find(request.path_params['name'])
  return JSONResponse(await asyncio.to_thread(_described, model))


def _described(model: Served) -> dict[str, Any]:
  known = {'id': model.name, 'object': 'model', 'created': 0, 'owned_by': 'llm_jax'}
  task = {'task': model.task} if model.task else {}
  routes = [path for path in FORMS if _answers_at(model, path)]
  return known | task | {'routes': routes, 'exact': model.exact}


def _answers_at(model: Served, path: str) -> bool:
  """Whether there is a request for the route that the model answers."""
  if path in TASKS:
    return model.answers is not None and model.task in TASKS[path]
  if path == '/v1/embeddings':
    return model.embeds is not None
  if path == '/v1/completions':
    return model.writer is not None
  if path == '/v1/chat/completions':
    return model.writer is not None and _converses(model)
  if path == '/fill':
    return model.fills_in
  return True


def _converses(model: Served) -> bool:
  try:
    return model.session.conversation is not None
  except ValueError:  # no template
    return False


async def _embeddings(service, model, body, request) -> Response:
  texts = body['input']
  if model.embeds is None:
    raise Refused(400, f'{model.name} reads and writes, and gives no vectors.', field='model')
  vectors = await _gathered(service, request, model.embeds, texts)
  if (size := body['dimensions']) is not None:
    if size > len(vectors[0]):
      raise Refused(400, f'dimensions={size}: the vectors have {len(vectors[0])}.')
    vectors = [vector[:size] for vector in vectors]
  ids = await _ids(model, texts)
  service.watch.read(model, request.state.asked, ids)
  tokens = sum(map(len, ids))
  return _answered(bodies.embeddings(model.name, vectors, body['encoding_format'], tokens))


def _answers_of(path: str) -> Answer:

  async def answer(service, model, body, request) -> Response:
    if model.answers is None or model.task not in TASKS[path]:
      route = next((route for route, tasks in TASKS.items() if model.task in tasks), None)
      way_out = f'; ask {route}' if route else ''
      raise Refused(400, f'{model.name} was trained by {model.task}, not for {path}{way_out}.')
    ids = await asyncio.to_thread(_checked, model, body['inputs'])
    found = await _gathered(service, request, model.answers, body['inputs'])
    service.watch.read(model, request.state.asked, ids)
    service.watch.predicted(model, found)
    return _answered({'model': model.name, 'outputs': found})

  return answer


def _answered(found: Mapping[str, Any]) -> Response:
  """What a model says, as JSON, which has no NaN: one is a fault of the model, not the request."""
  try:
    return JSONResponse(found)
  except ValueError:
    said = 'The model gave numbers that are not finite.'
    raise Refused(500, said, 'server_error') from None


def _checked(model: Served, records: Sequence[Mapping[str, Any]]) -> list[Any]:
  """The ids of records; raises ValueError for one that the model cannot read."""
  found = []
  for number, record in enumerate(records):
    try:
      found.append(summary.ids(model.session.check_record(record)))
    except (TypeError, KeyError, AttributeError):  # a field of another kind
      raise ValueError(
        f'inputs[{number}] has a field of a kind that this model cannot read.'
      ) from None
  return found


async def _fill(service, model, body, request) -> Response:
  if model.fills is None:
    raise Refused(400, f'{model.name} writes, and fills in nothing.', field='model')
  found = await _gathered(service, request, model.fills, body['inputs'])
  service.watch.read(model, request.state.asked, await _ids(model, body['inputs'], special=True))
  outputs = [
    {'text': filled.text, 'masks': [mask[: body['top']] for mask in filled.masks]}
    for filled in found
  ]
  return _answered({'model': model.name, 'outputs': outputs})


async def _tokenize(service, model, body, request) -> Response:
  ids = [found.tolist() for found in await _ids(model, body['input'])]
  return JSONResponse({'model': model.name, 'tokens': ids})


async def _ids(model: Served, texts: Sequence[str], special: bool = False) -> list[Any]:
  """The ids of texts, which may be long: others are not kept waiting."""
  encode = functools.partial(model.session.tokenizer.encode, special=special)
  return await asyncio.to_thread(lambda: list(map(encode, texts)))


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
  form = bodies.Written(model.name, chat, sum(len(ids) for ids, _ in prompts), model.spelled)
  guides = await asyncio.to_thread(_guides, model, body, len(prompts) * body['n'])
  texts = Texts(model, body, prompts, guides, service.watch, request.state.asked)
  if body['stream']:
    options = body['stream_options']
    usage = isinstance(options, dict) and bool(options.get('include_usage'))
    return Stream(texts, texts.streamed(form, usage, service.seconds))
  with texts:
    whole = await _unless_gone(request, texts.whole(), service.seconds)
  return JSONResponse(form.whole(whole, texts.tokens))


def _guides(model: Served, body: Mapping[str, Any], count: int) -> list[Guide | None]:
  """What each text may be."""
  if (wanted := body['response_format']) is None or count > model.writer.limit:
    return [None] * count
  first = model.guides(*wanted)
  return [first, *(first.copied() for _ in range(count - 1))]


async def _gathered(service: Service, request: Request, batches: Batches, items: Sequence) -> list:
  """The answers to some items, from a batch."""
  future = asyncio.wrap_future(batches.submit(items, request.state.asked.begin))
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


def _error(refused: Refused) -> Response:
  headers = {} if refused.after is None else {'Retry-After': str(max(1, round(refused.after)))}
  said = bodies.failure(str(refused), refused.kind, refused.field)
  return JSONResponse(said, refused.status, headers)


async def _refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, Refused)
  if error.status >= 500:
    logging.error('%s: %s', request.url.path, error)
  return _error(error)


async def _defect(request: Request, error: Exception) -> Response:
  del request, error  # which is passed on to the gate, and logged there
  return _error(Refused(500, 'Something went wrong; the log says what.', 'server_error'))


async def _http_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  said = bodies.failure(str(error.detail), 'invalid_request_error', None)
  return JSONResponse(said, error.status_code, error.headers)
