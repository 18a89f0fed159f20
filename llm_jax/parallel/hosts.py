"""Several processes as one program: how they start, what they agree on, and how they end together.

A process a host (on GPUs under Slurm one a GPU), all with the same command. `start` takes their
number from the first of these:

| who says it | how it is told |
|---|---|
| `--coordinator --num_processes --process_id` | all three, or none |
| Slurm | `SLURM_STEP_NUM_TASKS` above 1: srun sets it, a batch script without srun and a login node do not have it |
| Open MPI | `OMPI_COMM_WORLD_SIZE` above 1 |
| a TPU pod on GKE | TPU chips here, and `TPU_WORKER_HOSTNAMES` (or `TPU_PROCESS_ADDRESSES`, `MEGASCALE_NUM_SLICES`): several |
| a TPU pod of TPU VMs | TPU chips here, and the machine's metadata server names several workers |

Otherwise this is the only process, and nothing of `jax.distributed` is touched: so on a laptop, a
GPU box, a single TPU VM, in Colab. The metadata server is asked only where there are TPU chips,
once, for METADATA_SECONDS at most.

How they end. A process that fails says why to the others, which repeat it and stop within a few
seconds. One that dies without a word (kill -9, a machine that is gone) is missed after
HEARTBEAT_SECONDS at the latest. SIGTERM, to one or to all, makes all of them save the same step and
stop (`preemption`); before the first step there is nothing to save: a single process ends at once,
several after their first step.

All processes must call `agree`, `first`, `barrier` and `check_same` in the same order, as with any
collective. They go by the coordinator's key-value store and not by the devices, whose collectives
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
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax._src import (
  distributed,
  hardware_utils,
)  # the key-value store and the chip count have no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llm_jax.parallel import sharding

CONNECT_SECONDS = 300  # machines of a pod start minutes apart
HEARTBEAT_SECONDS = 30  # after which a process that says nothing is dead
SHUTDOWN_SECONDS = 60
METADATA_SECONDS = 2
POLL_SECONDS = 1.0  # how often a process looks whether another has failed
_FOREVER = 30 * 86400 * 1000  # in ms: how long to wait for a process that is alive
_STOPPED = 'llm_jax/stopped'
_LOST = (
  'Gloo',
  'NCCL',
  'UNAVAILABLE',
  'heartbeat',
)  # in what collectives and the coordination service say of a lost connection

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
    coordinator: HOST:PORT where process 0 listens; None, like the other two, to find out from the
      environment.
    num_processes: how many there are.
    process_id: which of them this is, from 0.
    saves: whether SIGTERM is kept for `preemption`; otherwise it ends the process.
    seconds: how long to wait for the others; then this process ends with exit status 1 and a
      message.

  Raises:
    ValueError: arguments that do not agree, or an environment that does not say where process 0 is.
  """
  arguments = _given(coordinator, num_processes, process_id) or _environment()
  if arguments is None:
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_enable_preemption_service', saves)
  where = arguments.get('coordinator_address', 'the coordinator that the environment names')
  logging.info('Joining the other processes at %s (for at most %d s).', where, seconds)
  # JAX aborts the process with a stack trace when it cannot connect; the timer is there first.
  late = (
    f'the processes did not come together at {where} within {seconds:g} s: process 0 does not run '
    'or cannot be reached '
    'there, or not all processes were started.'
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


def agree(decide: Callable[[], Any]) -> Any:
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
    found = json.loads(client.blocking_key_value_get(key, _FOREVER))
    if 'error' in found:
      raise (ValueError if found['told'] else RuntimeError)(found['error'])
    return found['value']
  try:
    value = decide()
    said = json.dumps({'value': value})
  except Exception as error:
    told = isinstance(error, (ValueError, TypeError, OSError))
    client.key_value_set(
      key, json.dumps({'error': str(error) if told else f'process 0: {_line(error)}', 'told': told})
    )
    raise
  client.key_value_set(key, said)
  return value


def first(function: Callable[[], Any]) -> Any:
  """Calls `function` on process 0 and, when that is done, on the others, which find what it wrote;
  see `agree` for errors.
  """
  results = []
  agree(lambda: results.append(function()))
  return results[0] if results else function()


def barrier() -> None:
  """Returns when all processes have come here."""
  if several():
    _client().wait_at_barrier(f'llm_jax/barrier/{next(_calls)}', _FOREVER)


def check_same(what: str, value: str) -> None:
  """Raises ValueError where this process holds another `value` than process 0, in which `what`
  differs.
  """
  theirs = agree(lambda: value)
  if theirs != value:
    raise ValueError(
      f'process {jax.process_index()} has {what} other than process 0; all processes need the same '
      'command and '
      f'the same files. First difference: {_difference(value, theirs)}.'
    )


def rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
  """The rows of a global batch that the devices of a process (this one, by default) hold, in order:
  what it has to read.

  On a mesh with `sequence` or `tensor`, several processes may hold the same rows; and a process's
  rows need not be neighbours.

  Raises:
    ValueError: the process has no device in the mesh, or processes hold rows that overlap in part.
  """
  process = jax.process_index() if process is None else process
  held: dict[int, set[tuple[int, int]]] = {}
  for device, (cut, *_) in sharding.batch_sharding(mesh).devices_indices_map((batch_size,)).items():
    held.setdefault(device.process_index, set()).add(cut.indices(batch_size)[:2])
  if process not in held:
    raise ValueError(
      f'process {process} has none of the {mesh.size} devices of config.mesh; use all devices of '
      'all processes.'
    )
  for other, cuts in held.items():
    if cuts & held[process] and cuts != held[process]:
      raise ValueError(
        f'config.mesh={dict(mesh.shape)} gives processes {process} and {other} rows that overlap '
        'in part; '
        'sequence x tensor must divide, or be a multiple of, the devices of a process.'
      )
  return np.concatenate([np.arange(*cut) for cut in sorted(held[process])])


def compiled(function: Callable) -> Callable:
  """A jitted function whose first call runs when all processes have compiled it.

  They compile at paces of their own, and a collective on CPUs fails when it has waited for 30 s.
  """
  waiting = several()

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    nonlocal waiting
    if waiting:
      function.lower(*args).compile()
      barrier()
      waiting = False
    return function(*args)

  return call


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
  """Gives a function to call once after each step: whether to save this very step, and stop,
  because SIGTERM came.

  All processes get True at the same call, wherever the signal went; it takes less than a
  microsecond.
  """
  if several():
    calls = itertools.count(1)  # JAX wants the calls counted from 1, wherever the run goes on
    yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
  elif threading.current_thread() is threading.main_thread():
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
      yield received.is_set
    finally:
      signal.signal(signal.SIGTERM, before)
  else:
    yield lambda: False  # signals are the main thread's


def finish() -> None:
  """Leaves the others when all are done. Without it, JAX's own exit would wait for less long than
  another process may need.
  """
  global _watch
  if not several():
    return
  barrier()
  thread, ended = _watch
  ended.set()
  thread.join()
  _watch = None
  jax.distributed.shutdown()


def lost(error: BaseException) -> str | None:
  """What to say of an error that only means that another process is gone; None of any other error."""
  if not isinstance(error, jax.errors.JaxRuntimeError) or not any(
    sign in str(error) for sign in _LOST
  ):
    return None
  return (
    'stopping, because another process died, or cannot be reached; its own log may say why, and '
    'the same command goes on '
    f'from the last checkpoint. ({str(error).splitlines()[0]})'
  )


def abort(reason: str, status: int) -> None:
  """Ends this process, and with it all the others, which repeat the reason; returns where there is
  only one process.

  Leaves by `os._exit`: an ordinary exit would wait for the others, which wait for this one.
  """
  client = _client()
  if client is None:
    return
  said = json.dumps({'process': jax.process_index(), 'reason': reason, 'status': status})
  earlier = None
  try:
    client.key_value_set(_STOPPED, said)
  except RuntimeError:  # another process was first, or the coordinator is gone
    earlier = _stopped(client)
  if primary():
    time.sleep(3 * POLL_SECONDS)  # the coordinator: the others learn the reason through it
  _leave(_told(earlier) if earlier and earlier['reason'] != reason else None, status)


def _given(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any] | None:
  flags = {
    '--coordinator': coordinator,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in flags.items() if value is None]
  if len(missing) == len(flags):
    return None
  if missing:
    raise ValueError(
      f'{" and ".join(missing)} must be given too: {", ".join(flags)} go together, or none of them.'
    )
  host, colon, port = coordinator.rpartition(':')
  if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
    raise ValueError(
      f'--coordinator={coordinator} must be HOST:PORT, the same on all processes: the host of '
      'process 0, and a '
      'port that is free there.'
    )
  if num_processes < 1:
    raise ValueError(f'--num_processes={num_processes} must be at least 1.')
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id} must be from 0 to {num_processes - 1}, for '
      f'--num_processes={num_processes}.'
    )
  if num_processes == 1:
    return None
  return dict(
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
    cluster_detection_method='deactivate',
  )


def _environment() -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None where this is the only process."""
  if _number('SLURM_STEP_NUM_TASKS') > 1:
    return dict(cluster_detection_method='slurm')
  if _number('OMPI_COMM_WORLD_SIZE') > 1:
    if 'OMPI_MCA_orte_hnp_uri' not in os.environ:
      raise ValueError(
        'this Open MPI does not say where process 0 is; tell it by flags: mpirun ... bash -c '
        "'python -m "
        'llm_jax.main ... --coordinator=HOST:PORT --num_processes=$OMPI_COMM_WORLD_SIZE '
        "--process_id=$OMPI_COMM_WORLD_RANK'"
      )
    return dict(cluster_detection_method='ompi')
  return {} if _tpu_hosts() > 1 else None


def _tpu_hosts() -> int:
  """How many hosts the TPU slices that this machine belongs to have; 1 where there is no TPU, or no
  one to ask.
  """
  if (
    os.environ.get('JAX_PLATFORMS') == 'cpu'
    or not hardware_utils.num_available_tpu_chips_and_device_id()[0]
  ):
    return 1
  names = os.environ.get('TPU_PROCESS_ADDRESSES') or os.environ.get('TPU_WORKER_HOSTNAMES')
  if names:
    return len(names.split(',')) * max(_number('MEGASCALE_NUM_SLICES'), 1)
  if _number('MEGASCALE_NUM_SLICES') > 1:
    return _number('MEGASCALE_NUM_SLICES')
  if 'TPU_SKIP_MDS_QUERY' in os.environ:
    return 1
  server = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
    f'http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints',
    headers={'Metadata-Flavor': 'Google'},
  )
  try:
    with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
      return len(answer.read().decode().split(','))
  except OSError:
    return 1


def _number(variable: str) -> int:
  value = os.environ.get(variable, '')
  return int(value) if value.isdigit() else 0


def _client() -> Any:
  return distributed.global_state.client


def _start_watch() -> None:
  global _watch
  ended = threading.Event()
  thread = threading.Thread(target=_look_out, args=(_client(), ended), name='watch', daemon=True)
  _watch = thread, ended
  thread.start()


def _look_out(client: Any, ended: threading.Event) -> None:
  """Ends this process once another has said that it stops."""
  while not ended.wait(POLL_SECONDS):
    stopped = _stopped(client)
    if stopped and stopped['process'] != jax.process_index():
      _leave(_told(stopped), stopped['status'])


def _stopped(client: Any) -> dict[str, Any] | None:
  try:
    return json.loads(client.key_value_try_get(_STOPPED))
  except RuntimeError:  # no process has; or the coordinator is gone, which JAX sees to
    return None


def _told(stopped: dict[str, Any]) -> str:
  return f'stopping, because process {stopped["process"]} stopped: {stopped["reason"]}'


def _leave(message: str | None, status: int) -> None:
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
