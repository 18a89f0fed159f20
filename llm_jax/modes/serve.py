"""`--mode=serve`: the model answers over HTTP, by OpenAI's routes and its own.

Needs the extra `serve`. Without `--api_keys` only this machine is listened to.
"""

import contextlib
import functools
import logging as python_logging
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags, logging

from llm_jax.core import files
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  import uvicorn

  from llm_jax.inference.session import Session
  from llm_jax.serving.app import Service
  from llm_jax.serving.served import Limits, Served

PORT = flags.DEFINE_integer('port', 8080, 'serve: where it listens.', 0, 65535)
HOST = flags.DEFINE_string(
  'host', None, 'serve: the address it listens at; 127.0.0.1 without --api_keys, else 0.0.0.0.'
)
API_KEYS = flags.DEFINE_string(
  'api_keys',
  None,
  'serve: a file with a key on each line, plain or as sha256:..., and behind it per_minute=N and '
  'at_once=N where it has limits.',
)
ROWS = flags.DEFINE_integer('serve_rows', 8, 'serve: texts that a model writes at once.', 1)
SLOTS = flags.DEFINE_integer(
  'serve_slots', None, 'serve: tokens of each, prompt and new ones; by default all it takes.', 1
)
BATCH = flags.DEFINE_integer('serve_batch', 8, 'serve: rows of a batch that is read.', 1)
WAITING = flags.DEFINE_integer('serve_waiting', 256, 'serve: requests that may wait.', 1)
SECONDS = flags.DEFINE_float('serve_seconds', 60, 'serve: in which an answer must be there.', 0.1)
DRAIN = 30  # seconds that open requests have when the service ends


def run(command: Command) -> None:
  """Listens until SIGTERM or Ctrl-C, then answers what was asked."""
  try:
    import uvicorn

    from llm_jax.serving import app as apps
    from llm_jax.serving.keys import Keys
    from llm_jax.serving.served import Limits
    from llm_jax.serving.watch import Watch
  except ModuleNotFoundError as error:
    raise ImportError(f"--mode=serve needs {error.name}: pip install 'llm_jax[serve]'") from error
  path = files.local('--api_keys', API_KEYS.value)
  keys = None if path is None else Keys(path)
  if keys is None and HOST.value not in (None, '127.0.0.1', '::1', 'localhost'):
    raise ValueError(
      f'--host={HOST.value} lets other machines ask, and nobody needs a key; give --api_keys=FILE.'
    )
  limits = Limits(ROWS.value, SLOTS.value, BATCH.value, waiting=WAITING.value)
  models = opened(command.session(), name(command), limits)
  service = apps.Service(models, keys, Watch(list(models.values())), seconds=SECONDS.value)
  host = HOST.value or ('127.0.0.1' if keys is None else '0.0.0.0')
  python_logging.getLogger('uvicorn.error').setLevel(python_logging.WARNING)
  server = uvicorn.Server(
    uvicorn.Config(
      apps.create(service),
      host=host,
      port=PORT.value,
      log_config=None,
      access_log=False,
      timeout_graceful_shutdown=DRAIN,
    )
  )
  ends = server.handle_exit

  def handle_exit(*given) -> None:
    service.ready = False  # balancers send nothing more
    ends(*given)

  server.handle_exit = handle_exit
  failed: list[BaseException] = []
  warming = functools.partial(_warm, service, server, failed)
  threading.Thread(target=warming, name='warming', daemon=True).start()
  with _survived(signal.SIGTERM, signal.SIGINT):  # uvicorn ends by them, and then sends them again
    server.run()
  if failed:
    raise failed[0]
  for model in models.values():
    model.close()
  logging.info('All that was asked is answered.')


@contextlib.contextmanager
def _survived(*numbers: signal.Signals) -> Iterator[None]:
  before = {number: signal.signal(number, lambda *_: None) for number in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def name(command: Command) -> str:
  """What the model is called: the name of its folder."""
  folder = command.workdir
  if folder is None:
    folder = pathlib.Path(command.settings['init_from'])
  return folder.absolute().name


def opened(session: 'Session', name: str, limits: 'Limits') -> dict[str, 'Served']:
  """The model, and the adapters on it, by name."""
  from llm_jax.serving.served import Served, resized

  sessions = {name: session} | {adapter: session.switched(adapter) for adapter in session.adapters}
  for each in sessions.values():
    each.config = resized(each.config, limits)
  return {key: Served(key, each, limits) for key, each in sessions.items()}


def _warm(service: 'Service', server: 'uvicorn.Server', failed: list[BaseException]) -> None:
  try:
    for model in service.models.values():
      model.warm()
    while not server.started and not server.should_exit:
      time.sleep(0.01)
  except BaseException as error:  # it is raised where the service ends
    failed.append(error)
    server.should_exit = True
  else:
    service.ready = not server.should_exit
    for listening in server.servers if service.ready else ():
      for one in listening.sockets:
        host, port = one.getsockname()[:2]
        names = ', '.join(service.models)
        logging.info('Ready: %s answers at http://%s:%d.', names, host, port)
