"""Several processes as one program: how they start, what they agree on, and how they end together.

There is one process per host (on GPUs under Slurm one per GPU), all with the same command; how many
there are, `llm_jax.parallel.cluster` finds out. A single process leaves `jax.distributed` alone.

How they end. A process that fails sends its reason to the others, which repeat it and stop within a
few seconds. One that dies without a word (kill -9, a machine that is gone) is missed after
HEARTBEAT_SECONDS at the latest. SIGTERM or Ctrl-C, to one or to all, makes all of them save the
same step and stop (`preemption`); before the first step there is nothing to save: a single process
ends at once, several after their first step.

All processes must call `agree`, `first`, `barrier` and `check_same` in the same order, as with any
collective. These use the coordinator's key-value store and not the devices, whose collectives
cannot wait for hours while a corpus is tokenized.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from absl import logging
from jax._src import distributed  # the key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llm_jax.parallel import cluster, sharding
from llm_jax.parallel.cpu import memory

CONNECT_SECONDS = 300  # machines of a pod start minutes apart
HEARTBEAT_SECONDS = 30  # after which a process that says nothing is dead
SHUTDOWN_SECONDS = 60
POLL_SECONDS = 1.0  # how often a process looks whether another has failed
_FOREVER = 30 * 86400 * 1000  # in ms: how long to wait for a process that is alive
_STOPPED = 'llm_jax/stopped'
# In the messages of collectives and of the coordination service about a lost connection.
_LOST = ('Gloo', 'NCCL', 'UNAVAILABLE', 'heartbeat')

_Result = TypeVar('_Result')

_calls = itertools.count()
_watch: tuple[threading.Thread, threading.Event] | None = None


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  saves: bool = False,
  seconds: float = CONNECT_SECONDS,
) -> None:
  """Joins the other processes, if there are any; before anything else of JAX.

  Args:
    coordinator: HOST:PORT where process 0 listens; None, as the other two, to take it from the
      environment.
    num_processes: how many there are.
    process_id: which of them this is, from 0.
    saves: whether SIGTERM is left to `preemption`; otherwise it ends the process.
    seconds: how long to wait for the others; then this process ends with exit status 1 and a
      message.

  Raises:
    ValueError: arguments that do not agree, or an environment that does not say where process 0 is.
  """
  arguments = cluster.arguments(coordinator, num_processes, process_id)
  if arguments is None:
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_enable_preemption_service', saves)
  where = arguments.get('coordinator_address', 'the coordinator that the environment names')
  logging.info('Joining the other processes at %s (for at most %d s).', where, seconds)
  # JAX aborts the process with a stack trace when it cannot connect; the timer is there first.
  late = (
    f'the processes did not come together at {where} within {seconds:g} s: process 0 does not run '
    'or cannot be reached there, or not all processes were started.'
  )
  timer = threading.Timer(seconds, _leave, (late, 1))
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=int(seconds + 60),
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
  except (RuntimeError, ValueError, OSError) as error:
    raise ValueError(f'the processes cannot be joined at {where}: {error}') from error
  finally:
    timer.cancel()
  _start_watch()
  logging.info('Process %d of %d.', jax.process_index(), jax.process_count())


def several() -> bool:
  """Whether there is more than one process."""
  return _client() is not None


def primary() -> bool:
  """Whether this is the process that writes what is written once."""
  return jax.process_index() == 0


def agree(decide: Callable[[], _Result]) -> _Result:
  """What `decide` returns on process 0 (anything that JSON can hold), on all processes; it is
  called there only.

  Raises:
    ValueError: process 0 raised it (or a TypeError or OSError); likewise RuntimeError for all other
      exceptions.
  """
  client = _client()
  if client is None:
    return decide()
  key = f'llm_jax/agree/{next(_calls)}'
  if not primary():
    return _value_of(json.loads(client.blocking_key_value_get(key, _FOREVER)))
  try:
    value = decide()
    message = json.dumps({'value': value})
  except Exception as error:
    client.key_value_set(key, json.dumps(_failure(error)))
    raise
  client.key_value_set(key, message)
  return value


def first(function: Callable[[], _Result]) -> _Result:
  """Calls `function` on process 0 and, when that is done, on the others, which find what it wrote.

  Raises:
    ValueError, RuntimeError: as `agree`.
  """
  results: list[_Result] = []
  agree(lambda: results.append(function()))
  return results[0] if results else function()


def barrier() -> None:
  """Returns when all processes have come here."""
  if several():
    _client().wait_at_barrier(f'llm_jax/barrier/{next(_calls)}', _FOREVER)


def check_same(what: str, value: str) -> None:
  """Raises ValueError where this process has another `value` than process 0.

  Args:
    what: the value's name, for the message: 'a config'.
    value: text; the message shows its first line that differs.
  """
  theirs = agree(lambda: value)
  if theirs != value:
    raise ValueError(
      f'process {jax.process_index()} has {what} other than process 0; all processes need the same '
      f'command and the same files. First difference: {_difference(value, theirs)}.'
    )


def rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
  """The rows of a global batch that the devices of a process hold, in order: what it has to read.

  On a mesh with `sequence` or `tensor`, several processes may hold the same rows; and the rows of a
  process need not be neighbours.

  Args:
    mesh: the devices of all processes.
    batch_size: rows of the global batch.
    process: this one by default.

  Raises:
    ValueError: the process has no device in the mesh, or processes hold rows that overlap in part.
  """
  process = jax.process_index() if process is None else process
  held: dict[int, set[tuple[int, int]]] = {}
  where = sharding.batch_sharding(mesh).devices_indices_map((batch_size,))
  for device, (part, *_) in where.items():
    start, stop, _ = part.indices(batch_size)
    held.setdefault(device.process_index, set()).add((start, stop))
  if process not in held:
    raise ValueError(
      f'process {process} has none of the {mesh.size} devices of config.mesh; use all devices of '
      'all processes.'
    )
  for other, parts in held.items():
    if parts & held[process] and parts != held[process]:
      raise ValueError(
        f'config.mesh={dict(mesh.shape)} gives processes {process} and {other} rows that overlap '
        'in part; sequence x tensor must divide, or be a multiple of, the devices of a process.'
      )
  return np.concatenate([np.arange(*part) for part in sorted(held[process])])


def compiled(function: Callable[..., _Result]) -> Callable[..., _Result]:
  """A jitted function whose first call runs when all processes have compiled it.

  They compile at paces of their own, and a collective on CPUs fails when it has waited for 30 s. On
  CPUs a call also waits for its result: the next one, dispatched meanwhile, would take memory for
  its temporaries beside that of this one, and there is no device that would stand idle.
  """
  waiting, cpu = True, jax.default_backend() == 'cpu'

  @functools.wraps(function)
  def call(*args: Any) -> _Result:
    nonlocal waiting
    if waiting and hasattr(function, 'lower'):
      function.lower(*args).compile()  # the call finds what was compiled
      memory.release()  # what the compiler took
      if several():
        barrier()
    waiting = False
    result = function(*args)
    return jax.block_until_ready(result) if cpu else result

  return call


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
  """Gives a function to call once after each step: whether to save this very step and stop, because
  SIGTERM or Ctrl-C came. A second Ctrl-C raises KeyboardInterrupt at once.

  All processes get True at the same call, whichever of them got the signal; a call takes less than
  a microsecond.
  """
  if several():
    calls = itertools.count(1)  # JAX counts the calls from 1, at whatever step the run goes on
    with _on_signals(lambda: os.kill(os.getpid(), signal.SIGTERM), signal.SIGINT):
      yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
  else:
    received = threading.Event()
    with _on_signals(received.set, signal.SIGTERM, signal.SIGINT):
      yield received.is_set


@contextlib.contextmanager
def _on_signals(react: Callable[[], None], *numbers: signal.Signals) -> Iterator[None]:
  """Calls `react` at any of these signals; one that is ignored stays so. Only the main thread gets
  signals, so in any other nothing is done.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def note(number: int, _: object) -> None:
    if number == signal.SIGINT:
      signal.signal(number, signal.default_int_handler)
      print('\nllm_jax: saving after this step; Ctrl-C again stops at once.', file=sys.stderr)
    react()

  before = {number: signal.getsignal(number) for number in numbers}
  changed = [number for number in numbers if before[number] != signal.SIG_IGN]
  for number in changed:
    signal.signal(number, note)
  try:
    yield
  finally:
    for number in changed:
      signal.signal(number, before[number])


def finish() -> None:
  """Leaves the others when all are done. Without it, JAX's own exit would wait for a shorter time
  than another process may need.
  """
  global _watch
  if not several() or _watch is None:
    return
  barrier()
  thread, ended = _watch
  ended.set()
  thread.join()
  _watch = None
  jax.distributed.shutdown()


def lost(error: BaseException) -> str | None:
  """The message for an error that only means that another process is gone; None for others."""
  if not isinstance(error, jax.errors.JaxRuntimeError):
    return None
  if not any(sign in str(error) for sign in _LOST):
    return None
  return (
    'stopping, because another process died, or cannot be reached; its own log may say why, and '
    f'the same command goes on from the last checkpoint. ({str(error).splitlines()[0]})'
  )


def abort(reason: str, status: int) -> None:
  """Ends this process, and with it all the others, which repeat the reason; returns where there is
  only one process.

  Leaves by `os._exit`: an ordinary exit would wait for the others, which wait for this one.
  """
  client = _client()
  if client is None:
    return
  message = json.dumps({'process': jax.process_index(), 'reason': reason, 'status': status})
  earlier = None
  try:
    client.key_value_set(_STOPPED, message)
  except RuntimeError:  # another process was first, or the coordinator is gone
    earlier = _stopped(client)
  if primary():
    time.sleep(3 * POLL_SECONDS)  # the coordinator: the others learn the reason through it
  other_reason = earlier is not None and earlier['reason'] != reason
  _leave(_reason_of(earlier) if earlier and other_reason else None, status)


def _client() -> Any:
  return distributed.global_state.client


def _failure(error: Exception) -> dict[str, Any]:
  """What process 0 sends instead of a value; a user error keeps its own words."""
  user_error = isinstance(error, (ValueError, TypeError, OSError))
  message = str(error) if user_error else f'process 0: {_line(error)}'
  return {'error': message, 'user_error': user_error}


def _value_of(found: dict[str, Any]) -> Any:
  if 'error' not in found:
    return found['value']
  kind = ValueError if found['user_error'] else RuntimeError
  raise kind(found['error'])


def _start_watch() -> None:
  global _watch
  ended = threading.Event()
  thread = threading.Thread(target=_look_out, args=(_client(), ended), name='watch', daemon=True)
  _watch = thread, ended
  thread.start()


def _look_out(client: Any, ended: threading.Event) -> None:
  """Ends this process once another has announced that it stops."""
  while not ended.wait(POLL_SECONDS):
    stopped = _stopped(client)
    if stopped and stopped['process'] != jax.process_index():
      _leave(_reason_of(stopped), stopped['status'])


def _stopped(client: Any) -> dict[str, Any] | None:
  try:
    return json.loads(client.key_value_try_get(_STOPPED))
  except RuntimeError:  # no process has; or the coordinator is gone, which JAX handles
    return None


def _reason_of(stopped: dict[str, Any]) -> str:
  return f'stopping, because process {stopped["process"]} stopped: {stopped["reason"]}'


def _leave(message: str | None, status: int) -> NoReturn:
  if message:
    print(f'llm_jax: {message}', file=sys.stderr)
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  os._exit(status)


def _line(error: BaseException) -> str:
  return f'{type(error).__name__}: {error}'


def _difference(mine: str, theirs: str) -> str:
  for a, b in itertools.zip_longest(mine.splitlines(), theirs.splitlines(), fillvalue='nothing'):
    if a != b:
      return f'{a.strip(" ,")}, on process 0 {b.strip(" ,")}'
  return f'{mine!r}, on process 0 {theirs!r}'
