"""`--mode=serve`: models answer over HTTP, by OpenAI's routes and their own.

Needs the extra `serve`. Without `--api_keys` only this machine is listened to. At SIGHUP the newest
version of each model is opened beside the one that answers, and takes its place.
"""

import contextlib
import functools
import logging as python_logging
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from llm_jax.core import files
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  import uvicorn

  from llm_jax.inference.session import Session
  from llm_jax.serving.app import Service
  from llm_jax.serving.fleet import Fleet
  from llm_jax.serving.served import Limits, Served
  from llm_jax.serving.trace import Trace

PORT = flags.DEFINE_integer('port', 8080, 'serve: where it listens.', 0, 65535)
HOST = flags.DEFINE_string(
  'host', None, 'serve: the address it listens at; 127.0.0.1 without --api_keys, else 0.0.0.0.'
)
API_KEYS = flags.DEFINE_string(
  'api_keys',
  None,
  'serve: a file with a key on each line, plain or as sha256:..., and behind it per_minute=N, '
  'tokens_per_minute=N and at_once=N where it has limits.',
)
ROWS = flags.DEFINE_integer('serve_rows', 8, 'serve: texts that a model writes at once.', 1)
SLOTS = flags.DEFINE_integer(
  'serve_slots', None, 'serve: tokens of each, prompt and new ones; by default all it takes.', 1
)
BATCH = flags.DEFINE_integer('serve_batch', 8, 'serve: rows of a batch that is read.', 1)
WAITING = flags.DEFINE_integer('serve_waiting', 256, 'serve: requests that may wait.', 1)
PREFIXES = flags.DEFINE_integer(
  'serve_prefixes',
  4,
  'serve: prompts whose caches are kept, each as large as a row, for others that begin alike.',
  0,
)
MODELS = flags.DEFINE_list(
  'serve_models',
  [],
  'serve: further models, NAME=FOLDER with commas between; workdirs, or Hugging Face folders.',
)
SECONDS = flags.DEFINE_float('serve_seconds', 60, 'serve: in which an answer must be there.', 0.1)
TRACE = flags.DEFINE_string(
  'trace',
  None,
  'serve: where spans of requests go, by OTLP over HTTP: http://HOST:4318/v1/traces; needs the '
  'extra `trace`.',
)
DRAIN = 30  # seconds that open requests have when the service ends


def run(command: Command) -> None:
  """Listens until SIGTERM or Ctrl-C, then answers what was asked."""
  try:
    import uvicorn

    from llm_jax.serving import app as apps
    from llm_jax.serving.fleet import Fleet
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
  trace = _trace(TRACE.value)
  limits = Limits(
    ROWS.value, SLOTS.value, BATCH.value, waiting=WAITING.value, prefixes=PREFIXES.value
  )
  fleet = Fleet(openers(command, further(MODELS.value), limits))
  watch = Watch(fleet.models.values())
  service = apps.Service(fleet.models, keys, watch, seconds=SECONDS.value, trace=trace)
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
  warming = functools.partial(_warm, fleet, service, server, failed)
  _in_thread(warming)
  with _survived(signal.SIGTERM, signal.SIGINT):  # uvicorn ends by them, and then sends them again
    signal.signal(signal.SIGHUP, lambda *_: _in_thread(_renew, fleet, service, path))
    server.run()
  if failed:
    raise failed[0]
  fleet.close()
  if trace is not None:
    trace.close()
  if watch.cut:
    logging.error('%d of %d requests were broken off after %d s.', watch.cut, watch.taken, DRAIN)
  else:
    logging.info('All %d requests that were read are answered.', watch.taken)


def _trace(url: str | None) -> 'Trace | None':
  if url is None:
    return None
  try:
    from llm_jax.serving import trace
  except ModuleNotFoundError as error:
    raise ImportError(f"--trace needs {error.name}: pip install 'llm_jax[trace]'") from error
  return trace.to(url)


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


def further(given: Sequence[str]) -> dict[str, pathlib.Path]:
  """The folders of further models, by name; ValueError where one lacks a name, or has another's."""
  found: dict[str, pathlib.Path] = {}
  for one in given:
    key, _, folder = (part.strip() for part in one.partition('='))
    if not (key and folder) or key in found:
      raise ValueError(f'--serve_models={one} must be NAME=FOLDER, each with a name of its own.')
    found[key] = files.local('--serve_models', folder).absolute()
  return found


def openers(
  command: Command, folders: Mapping[str, pathlib.Path], limits: 'Limits'
) -> dict[str, Callable[[], dict[str, 'Served']]]:
  """What opens each model, by its name."""
  from llm_jax.inference import session

  found = {key: functools.partial(session.open_folder, folder) for key, folder in folders.items()}
  if name(command) in found:
    raise ValueError(f'--serve_models names {name(command)}, as --workdir is called; give another.')
  found = {name(command): command.session} | found
  return {key: lambda key=key, to=to: opened(to(), key, limits) for key, to in found.items()}


def opened(session: 'Session', name: str, limits: 'Limits') -> dict[str, 'Served']:
  """The model, and the adapters on it, by name."""
  from llm_jax.serving.served import Served, resized

  sessions = {name: session} | {adapter: session.switched(adapter) for adapter in session.adapters}
  for each in sessions.values():
    each.config = resized(each.config, limits)
  return {key: Served(key, each, limits) for key, each in sessions.items()}


def _renew(fleet: 'Fleet', service: 'Service', keys: pathlib.Path | None) -> None:
  from llm_jax.serving.keys import Keys

  if keys is not None:
    try:
      service.keys = Keys(keys)
    except (OSError, ValueError) as error:
      logging.error('The old keys stay: %s', error)
  with service.watch.warming():
    fleet.renew(service.watch.loaded)


def _in_thread(do: Callable[..., None], *args: Any) -> None:
  threading.Thread(target=do, args=args, daemon=True).start()


def _warm(
  fleet: 'Fleet', service: 'Service', server: 'uvicorn.Server', failed: list[BaseException]
) -> None:
  try:
    with service.watch.warming():
      fleet.warm()
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
