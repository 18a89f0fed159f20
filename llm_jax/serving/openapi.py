"""/openapi.json: the routes of the service, for programs that write clients.

OpenAPI 3.1, https://spec.openapis.org/oas/v3.1.0. What a body may hold comes from the tables that
check it; what is answered is described roughly.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from starlette.routing import Route

import llm_jax
from llm_jax.serving import fields
from llm_jax.serving.fields import Field

_TEXT, _WHOLE, _NUMBER = ({'type': kind} for kind in ('string', 'integer', 'number'))


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
  return {'type': 'array', 'items': items}


def _object(*optional: str, **properties: Mapping[str, Any]) -> dict[str, Any]:
  required = [name for name in properties if name not in optional]
  return {'type': 'object', 'properties': properties, 'required': required}


def _completion(kind: str, **said: Mapping[str, Any]) -> dict[str, Any]:
  choice = _object('logprobs', index=_WHOLE, finish_reason=_TEXT, logprobs={}, **said)
  usage = _object(prompt_tokens=_WHOLE, completion_tokens=_WHOLE, total_tokens=_WHOLE)
  return _object(
    id=_TEXT,
    object={'const': kind},
    created=_WHOLE,
    model=_TEXT,
    choices=_list(choice),
    usage=usage,
  )


def _outputs(**output: Mapping[str, Any]) -> dict[str, Any]:
  return _object(model=_TEXT, outputs=_list(_object(*output, **output)))


_MODEL = _object(
  'task',
  id=_TEXT,
  object={'const': 'model'},
  created=_WHOLE,
  owned_by=_TEXT,
  task=_TEXT,
  routes=_list(_TEXT),
)
_VECTOR = {'anyOf': [_list(_NUMBER), {'type': 'string', 'contentEncoding': 'base64'}]}
_ERROR = _object(
  error=_object(
    message=_TEXT, type=_TEXT, param={'type': ['string', 'null']}, code={'type': ['string', 'null']}
  )
)
_JSON, _PLAIN, _EVENTS = 'application/json', 'text/plain', 'text/event-stream'


class _Answer(NamedTuple):
  """What a route is for, what it answers, and its errors other than those of all its kind."""

  summary: str
  schema: Mapping[str, Any]
  kinds: tuple[str, ...] = (_JSON,)
  errors: tuple[int, ...] = ()


_ANSWERS = {
  '/': _Answer('A page that asks the models.', _TEXT, ('text/html',)),
  '/openapi.json': _Answer('This description.', {'type': 'object'}),
  '/health': _Answer('Whether the process lives.', _object(status={'const': 'ok'})),
  '/ready': _Answer('Whether it answers.', _object(ready={'const': True})),
  '/metrics': _Answer('Counts, for Prometheus.', _TEXT, (_PLAIN,)),
  '/v1/models': _Answer('The models.', _object(object={'const': 'list'}, data=_list(_MODEL))),
  '/v1/models/{name}': _Answer('One model.', _MODEL, errors=(404,)),
  '/v1/embeddings': _Answer(
    'Vectors of texts.',
    _object(
      object={'const': 'list'},
      model=_TEXT,
      data=_list(_object(object={'const': 'embedding'}, index=_WHOLE, embedding=_VECTOR)),
      usage=_object(prompt_tokens=_WHOLE, total_tokens=_WHOLE),
    ),
  ),
  '/v1/completions': _Answer(
    'Text behind prompts; with `stream`, piece by piece.',
    _completion('text_completion', text=_TEXT),
    (_JSON, _EVENTS),
  ),
  '/v1/chat/completions': _Answer(
    'The next message of a conversation; with `stream`, piece by piece.',
    _completion('chat.completion', message=_object(role=_TEXT, content=_TEXT)),
    (_JSON, _EVENTS),
  ),
  '/classify': _Answer(
    'The class of each text, or its value.',
    _outputs(label={}, probability=_NUMBER, probabilities={'type': 'object'}, value=_NUMBER),
  ),
  '/tag': _Answer(
    'The tags of the words of each text, and the entities.',
    _outputs(words=_list(_TEXT), tags=_list(_TEXT), entities=_list({'type': 'object'})),
  ),
  '/qa': _Answer(
    'Where in its context each question is answered.',
    _outputs(answer=_TEXT, start=_WHOLE, end=_WHOLE, probability=_NUMBER),
  ),
  '/rerank': _Answer(
    'The order of the passages of each query, or the best of its choices.',
    _outputs(scores=_list(_NUMBER), ranking=_list(_WHOLE), choice=_WHOLE, probability=_NUMBER),
  ),
  '/similarity': _Answer(
    'How alike the texts of each pair are.', _outputs(score={'type': ['number', 'null']})
  ),
  '/fill': _Answer(
    'Candidates for each mask of each text, with their probabilities.',
    _outputs(text=_TEXT, masks=_list(_list({'type': 'array'}))),
  ),
  '/tokenize': _Answer('The ids of texts.', _object(model=_TEXT, tokens=_list(_list(_WHOLE)))),
}
_ERRORS = {
  400: 'The request is not one that can be answered; the message says why.',
  401: 'No key, or one that is not known.',
  404: 'There is no model of this name.',
  413: 'The body is too long.',
  429: 'The key has asked too much, or too many wait; Retry-After says when to come again.',
  500: 'Something went wrong; the log of the service says what.',
  503: 'The service is not ready.',
  504: 'The answer took too long.',
}


def document(
  routes: Iterable[Route], forms: Mapping[str, Mapping[str, Field]], open_to_all: Collection[str]
) -> dict[str, Any]:
  """The description of a service.

  Args:
    routes: of the application.
    forms: the fields of the bodies, by the path of the route that reads them.
    open_to_all: the paths that ask for no key.
  """
  paths = {}
  for route in routes:
    path = re.sub(r':\w+}', '}', route.path)  # Starlette's {name:path}
    methods = (route.methods or set()) - {'HEAD'}
    operation = _operation(path, forms.get(path), path in open_to_all)
    paths[path] = {method.lower(): operation for method in methods}
  return {
    'openapi': '3.1.0',
    'info': {'title': 'llm_jax', 'version': llm_jax.__version__},
    'paths': paths,
    'security': [{'key': []}],
    'components': {
      'securitySchemes': {'key': {'type': 'http', 'scheme': 'bearer'}},
      'schemas': {'Error': _ERROR},
      'responses': {
        str(status): {'description': words} | _content({'$ref': '#/components/schemas/Error'})
        for status, words in _ERRORS.items()
      },
    },
  }


def _operation(path: str, form: Mapping[str, Field] | None, open_to_all: bool) -> dict[str, Any]:
  """What a route reads and answers."""
  answer = _ANSWERS[path]
  statuses = {*answer.errors, *(() if open_to_all else (401, 429)), *(_ERRORS if form else ())}
  responses = {str(status): _reference(status) for status in sorted(statuses)}
  responses['200'] = {'description': answer.summary} | _content(answer.schema, answer.kinds)
  if path == '/ready':  # whose answer is no error
    not_ready = _content(_object(ready={'const': False}))
    responses['503'] = {'description': _ERRORS[503]} | not_ready
  found: dict[str, Any] = {
    'operationId': re.sub(r'\W+', '_', path).strip('_') or 'page',
    'summary': answer.summary,
    'responses': dict(sorted(responses.items())),
  }
  if names := re.findall(r'{(\w+)}', path):
    found['parameters'] = [
      {'name': name, 'in': 'path', 'required': True, 'schema': _TEXT} for name in names
    ]
  if form:
    found['requestBody'] = {'required': True} | _content(fields.schema(form))
  return found | ({'security': []} if open_to_all else {})


def _reference(status: int) -> dict[str, str]:
  return {'$ref': f'#/components/responses/{status}'}


def _content(schema: Mapping[str, Any], kinds: Iterable[str] = (_JSON,)) -> dict[str, Any]:
  each = {kind: {'schema': _TEXT if kind == _EVENTS else schema} for kind in kinds}
  return {'content': each}
