"""Several processes are one program: the same losses as one process, the same decisions, one end.

The runs are real ones, of a tiny model, started by `launch/local.sh`. Some go on where another
stopped, so that one start shows several things.
"""

import contextlib
import http.server
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from llm_jax.parallel import cluster, hosts, sharding

ROOT = pathlib.Path(__file__).parents[2]
# Relative, of a loss, gradient norm or score: float32 sums in another order (seen: 3e-7).
TOLERANCE = 2e-5
BATCH = 8
EVERY = 10  # steps between checkpoints, and of each leg on another number of processes
ENDS_WITHIN = 60  # seconds
ENDLESS = 100_000  # steps
TINY = [
  f'--config.batch_size={BATCH}',
  '--config.seq_len=32',
  '--config.log_every=1',
  f'--config.checkpoint.every={EVERY}',
  f'--config.eval_every={EVERY}',
  '--config.tokenizer.vocab_size=300',
  '--config.model.dim=32',
  '--config.model.layers=1',
  '--config.model.heads=2',
  '--config.model.mlp_dim=64',
  '--config.evaluation.rows=12',
  '--config.logging.tensorboard=False',
  '--config.optimizer.name=adamw',
  '--config.optimizer.schedule=constant',
  '--config.optimizer.warmup_fraction=0',
  # Adam makes whole steps of what is rounding alone; small ones, then
  '--config.optimizer.learning_rate=0.001',
  '--config.data.source=text',
  '--config.data.unit=line',
  '--config.data.validation=0.1',
]


# ---- which rows a process reads


class Device:
  """A device somewhere else."""

  platform = device_kind = 'cpu'

  def __init__(self, index, process):
    self.id, self.process_index = index, process


def mesh_of(processes, each, **sizes):
  return sharding.create_mesh(
    **sizes, devices=[Device(i, i // each) for i in range(processes * each)]
  )


@pytest.mark.parametrize(
  ('processes', 'each', 'sizes'),
  [
    (4, 2, dict(data=8)),
    (2, 4, dict(data=2, fsdp=2, tensor=2)),
    (4, 2, dict(data=2, sequence=2, tensor=2)),
    (4, 1, dict(sequence=2, tensor=2)),
    (2, 2, dict(data=2, dcn_fsdp=2)),
    (2, 4, dict(data=2, fsdp=2, dcn_data=2)),
  ],
)
def test_rows_are_those_of_the_devices(processes, each, sizes):
  mesh = mesh_of(processes, each, **sizes)
  data, fsdp, *_ = mesh.devices.shape
  part = 16 // (data * fsdp)
  for process in range(processes):
    held = set()
    for (d, f, _, _), device in np.ndenumerate(mesh.devices):
      if device.process_index == process:
        held |= set(range((d * fsdp + f) * part, (d * fsdp + f + 1) * part))
    assert hosts.rows(mesh, 16, process).tolist() == sorted(held)


def test_rows_that_are_refused():
  with pytest.raises(ValueError, match='overlap in part; sequence x tensor must divide'):
    hosts.rows(mesh_of(3, 2, data=2, tensor=3), 8, 0)
  with pytest.raises(ValueError, match='process 7 has none of the 8 devices'):
    hosts.rows(mesh_of(4, 2, data=8), 8, 7)


# ---- how processes find each other


@pytest.fixture
def joined(monkeypatch):
  """`hosts.start(...)` without other processes: gives what `jax.distributed.initialize` would have
  been called with.
  """
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **arguments: calls.append(arguments))
  monkeypatch.setattr(hosts, '_start_watch', lambda: None)
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_')):
      monkeypatch.delenv(name)

  def start(*arguments):
    hosts.start(*arguments)
    ours = ('initialization_timeout', 'heartbeat_timeout_seconds', 'shutdown_timeout_seconds')
    return {k: v for k, v in calls[-1].items() if k not in ours} if calls else None

  return start


@pytest.fixture
def tpu(monkeypatch):
  """A machine with TPU chips; gives a function that starts its metadata server, which names these
  workers, or none.
  """
  monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
  monkeypatch.setattr(
    cluster.hardware_utils, 'num_available_tpu_chips_and_device_id', lambda: (4, None)
  )
  monkeypatch.setattr(cluster, 'METADATA_SECONDS', 0.5)
  with contextlib.ExitStack() as stack:

    def serve(workers):

      class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
          known = self.headers['Metadata-Flavor'] == 'Google' and self.path.endswith(
            '/attributes/worker-network-endpoints'
          )
          self.send_response(200 if known and workers else 404)
          self.end_headers()
          self.wfile.write(','.join(workers).encode())

        def log_message(self, *_):
          pass

      server = stack.enter_context(http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler))
      stack.callback(server.shutdown)
      threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
      monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{server.server_port}')

    yield serve


def test_a_laptop_is_one_process(joined):
  assert joined() is None
  assert joined('127.0.0.1:9', 1, 0) is None


def test_flags(joined):
  assert joined('node-0:4000', 3, 2) == dict(
    coordinator_address='node-0:4000',
    num_processes=3,
    process_id=2,
    cluster_detection_method='deactivate',
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('node-0:4000', None, 1), '--num_processes must be given too'),
    ((None, None, 0), '--coordinator and --num_processes must be given too'),
    (('node-0', 2, 1), '--coordinator=node-0 must be HOST:PORT'),
    ((':4000', 2, 1), 'must be HOST:PORT'),
    (('node-0:99999', 2, 1), 'must be HOST:PORT'),
    (('node-0:4000', 2, 2), '--process_id=2 must be from 0 to 1'),
    (('node-0:4000', 2, -1), '--process_id=-1 must be from 0 to 1'),
    (('node-0:4000', 0, 0), '--num_processes=0 must be at least 1'),
  ],
)
def test_flags_that_are_refused(joined, flags, message):
  with pytest.raises(ValueError, match=message):
    joined(*flags)


@pytest.mark.parametrize(
  ('environment', 'arguments'),
  [
    (dict(SLURM_STEP_NUM_TASKS='4'), dict(cluster_detection_method='slurm')),
    (dict(SLURM_STEP_NUM_TASKS='1'), None),
    (dict(SLURM_NTASKS='4'), None),  # a batch script without srun: the only process
    (
      dict(OMPI_COMM_WORLD_SIZE='2', OMPI_MCA_orte_hnp_uri='1.0;tcp://10.0.0.1:1'),
      dict(cluster_detection_method='ompi'),
    ),
    (dict(OMPI_COMM_WORLD_SIZE='1'), None),
    (dict(TPU_WORKER_HOSTNAMES='a,b'), None),  # no TPU here
  ],
)
def test_environments(joined, monkeypatch, environment, arguments):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert joined() == arguments
  assert joined('node-0:4000', 2, 0)['num_processes'] == 2  # flags go first


def test_an_open_mpi_that_does_not_say_where_process_0_is(joined, monkeypatch):
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
  with pytest.raises(ValueError, match='--process_id=.OMPI_COMM_WORLD_RANK'):
    joined()


@pytest.mark.parametrize(
  ('environment', 'several'),
  [
    (dict(TPU_WORKER_HOSTNAMES='a,b'), True),
    (dict(TPU_WORKER_HOSTNAMES='localhost'), False),
    (dict(TPU_WORKER_HOSTNAMES='a', MEGASCALE_NUM_SLICES='2'), True),
    (dict(MEGASCALE_NUM_SLICES='2'), True),
    (dict(TPU_PROCESS_ADDRESSES='a:1,b:1'), True),
    (dict(TPU_SKIP_MDS_QUERY='1'), False),
  ],
)
def test_tpu_pods_by_environment(joined, tpu, monkeypatch, environment, several):
  # The metadata server, which is not to be asked, would say the contrary.
  tpu(['x', 'y'] if not several else [])
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert joined() == ({} if several else None)


@pytest.mark.parametrize(
  ('workers', 'several'), [(['a', 'b', 'c'], True), (['a'], False), ([], False)]
)
def test_tpu_pods_by_metadata(joined, tpu, workers, several):
  tpu(workers)
  assert joined() == ({} if several else None)


def test_no_metadata_server(joined, tpu, monkeypatch):
  with socket.create_server(('127.0.0.1', 0)) as silent:  # takes the connection and never answers
    monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{silent.getsockname()[1]}')
    began = time.perf_counter()
    assert joined() is None and time.perf_counter() - began < 10


# ---- one process alone


def test_alone_everything_is_at_once():
  assert not hosts.several() and hosts.primary()
  # Not even JSON is needed.
  assert hosts.agree(lambda: {1, 2}) == hosts.first(lambda: {1, 2}) == {1, 2}
  hosts.barrier()
  hosts.check_same('a config', 'x')
  hosts.abort('nothing', 1)
  hosts.finish()
  function = lambda x: x + 1
  assert hosts.compiled(function)(1) == 2  # a function without .lower: nothing is compiled ahead


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process(number):
  usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
  outside = signal.signal(number, usual)  # a job in the background ignores Ctrl-C
  try:
    with hosts.preemption() as preempted:
      assert not preempted()
      os.kill(os.getpid(), number)
      assert preempted()
      if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
          os.kill(os.getpid(), number)
          time.sleep(1)  # which the signal cuts short
    assert signal.getsignal(number) is usual
  finally:
    signal.signal(number, outside)


def test_an_ignored_signal_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a job in the background
  try:
    with hosts.preemption() as preempted:
      os.kill(os.getpid(), signal.SIGINT)
      assert not preempted()
  finally:
    signal.signal(signal.SIGINT, before)


def test_what_a_lost_connection_is():
  error = jax.errors.JaxRuntimeError(
    'UNKNOWN: Gloo all-reduce failed: Connection closed by peer [10.0.0.2]:1\nand more'
  )
  message = hosts.lost(error)
  assert 'another process died' in message and message.endswith('peer [10.0.0.2]:1)')
  assert hosts.lost(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')) is None
  assert hosts.lost(ValueError('Gloo')) is None


# ---- several, without a model


WORKER = """
import json, sys, time
import jax, numpy as np
from llm_jax.parallel import hosts, sharding

index, count = int(sys.argv[2]), 2
hosts.start(sys.argv[1], count, index)
found = {}

def attempt(name, function):
  try:
    found[name] = function()
  except Exception as error:
    found[name] = f'{type(error).__name__}: {error}'

def fail(error):
  raise error

attempt('agree', lambda: hosts.agree(lambda: index * 10 + 7))
attempt('user error', lambda: hosts.agree(lambda: fail(OSError('the disk is full'))))
attempt('other error', lambda: hosts.agree(lambda: fail(KeyError('x'))))
attempt('no json', lambda: hosts.agree(lambda: {1, 2}))
def late():
  if index == 0:
    time.sleep(1)
  return time.time()
attempt('first', lambda: hosts.first(late))
time.sleep(index)
attempt('before', time.time)
hosts.barrier()
attempt('after', time.time)
attempt('same', lambda: hosts.check_same('a config', 'seed: 1'))
attempt('other', lambda: hosts.check_same('a config', 'steps: 3\\nseed: %d' % index))
mesh = sharding.create_mesh(data=2, dcn_fsdp=2)  # neighbouring rows lie on different processes
whole = np.arange(16).reshape(8, 2)
rows = hosts.rows(mesh, 8)
array = jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), whole[rows])
found['rows'] = rows.tolist()
shards = array.addressable_shards
found['placed'] = all((np.asarray(part.data) == whole[part.index]).all() for part in shards)
step = hosts.compiled(jax.jit(lambda x: x.sum()))
found['sums'] = [int(step(array)), int(step(array))]
hosts.finish()
found['several'] = hosts.several()
print(json.dumps(found))
"""


def together(arguments, count, variables=lambda index: {}, timeout=120):
  """Runs `arguments(address, index)` with `variables(index)` for each process; gives (status,
  stdout, stderr) of each.
  """
  with socket.create_server(('127.0.0.1', 0)) as found:
    address = f'127.0.0.1:{found.getsockname()[1]}'
  environment = os.environ | {
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, *map(str, arguments(address, i))],
      stdout=subprocess.PIPE,
      text=True,
      stderr=subprocess.PIPE,
      env=environment | variables(i),
      cwd=ROOT,
    )
    for i in range(count)
  ]
  try:
    outputs = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_processes_agree(tmp_path):
  (tmp_path / 'worker.py').write_text(WORKER)
  done = together(lambda address, i: [tmp_path / 'worker.py', address, i], 2)
  assert [status for status, *_ in done] == [0, 0], done
  zero, one = (json.loads(out.splitlines()[-1]) for _, out, _ in done)
  assert zero['agree'] == one['agree'] == 7
  assert zero['user error'] == 'OSError: the disk is full'
  assert one['user error'] == 'ValueError: the disk is full'
  assert zero['other error'] == "KeyError: 'x'"
  assert one['other error'] == "RuntimeError: process 0: KeyError: 'x'"
  assert zero['no json'].startswith('TypeError') and 'not JSON serializable' in one['no json']
  assert zero['first'] < one['first']
  assert abs(zero['after'] - one['after']) < 0.5 < one['before'] - zero['before']
  assert zero['same'] is one['same'] is None and zero['other'] is None
  assert one['other'] == (
    'ValueError: process 1 has a config other than process 0; all processes need the same command '
    'and the same files. First difference: seed: 1, on process 0 seed: 0.'
  )
  assert (zero['rows'], one['rows']) == ([0, 1, 4, 5], [2, 3, 6, 7])
  assert zero['placed'] and one['placed']
  assert zero['sums'] == one['sums'] == [120, 120]
  assert not zero['several'] and not one['several']


@pytest.mark.slow
def test_slurm_joins_them():
  worker = (
    'from llm_jax.parallel import hosts; hosts.start(); '
    'print(hosts.jax.process_index(), hosts.agree(lambda: 7)); hosts.finish()'
  )
  job = dict(
    SLURM_JOB_ID=str(os.getpid()),
    SLURM_STEP_NODELIST='localhost',
    SLURM_NTASKS='2',
    SLURM_STEP_NUM_TASKS='2',
  )
  one_of = lambda i: job | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)}
  done = together(lambda *_: ['-c', worker], 2, one_of)
  assert [out for _, out, _ in done] == ['0 7\n', '1 7\n'], done


FAILS = """
from llm_jax import main
from llm_jax.modes import train
from llm_jax.parallel import hosts
def run(command):
  import jax
  if jax.process_index() == 1:
    raise RuntimeError('process 1 is out of luck')
  hosts.barrier()
train.run = run
main.cli()
"""


@pytest.mark.slow
def test_an_exception_ends_all_processes_with_its_reason(tmp_path):
  (tmp_path / 'fails.py').write_text(FAILS)
  began = time.perf_counter()
  zero, one = together(
    lambda address, i: [
      tmp_path / 'fails.py',
      '--config=configs/bert_tiny.py',
      f'--workdir={tmp_path / "w"}',
      f'--coordinator={address}',
      '--num_processes=2',
      f'--process_id={i}',
    ],
    2,
  )
  assert time.perf_counter() - began < ENDS_WITHIN
  assert zero[0] == one[0] == 1
  assert 'Traceback' in one[2] and 'RuntimeError: process 1 is out of luck' in one[2]
  reason = 'RuntimeError: process 1 is out of luck'
  assert zero[2].splitlines()[-1] == f'llm_jax: stopping, because process 1 stopped: {reason}'


@pytest.mark.slow
def test_a_process_whose_others_do_not_come():
  start = 'from llm_jax.parallel import hosts; hosts.start("127.0.0.1:1", 2, 1, seconds=1)'
  done = subprocess.run(
    [sys.executable, '-c', start], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
  )
  assert done.returncode == 1
  assert (
    'llm_jax: the processes did not come together at 127.0.0.1:1 within 1 s: process 0 does not run'
    in done.stderr
  )


# ---- real runs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Holds a corpus, and the runs over it."""
  folder = tmp_path_factory.mktemp('hosts')
  draw = random.Random(0)
  words = [''.join(draw.choices('abcdefgh', k=draw.randint(2, 6))) for _ in range(60)]
  (folder / 'text.txt').write_text(
    '\n'.join(' '.join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(400))
  )
  return folder


def command(folder, name, processes, steps, *flags):
  """The command of a run in `folder/name`, of its first steps or of more."""
  return [
    ROOT / 'launch' / 'local.sh',
    '-n',
    str(processes),
    '--config=configs/bert_tiny.py',
    f'--workdir={folder / name}',
    f'--config.data.path={folder / "text.txt"}',
    f'--config.data.cache={folder / "cache"}',
    *TINY,
    f'--config.steps={steps}',
    *flags,
  ]


@contextlib.contextmanager
def started(*arguments):
  """A run under way, with what it writes in `<workdir>.log`; ended at the end in any case."""
  line = command(*arguments)
  folder, name = arguments[:2]
  compiles_sooner = {'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  environment = os.environ | {'PYTHON': sys.executable} | compiles_sooner
  with open(folder / f'{name}.log', 'w') as log:
    process = subprocess.Popen(
      line, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
    )
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()


def train(*arguments):
  """A run to its end, which must be a good one; gives its metrics."""
  folder, name = arguments[:2]
  with started(*arguments) as process:
    status = process.wait(timeout=180)
  assert status == 0, log_of(folder, name)
  return metrics(folder, name)


def log_of(folder, name):
  return ''.join(
    path.read_text()
    for path in (folder / f'{name}.log', *sorted((folder / name).glob('process-*.log')))
  )


def metrics(folder, name):
  """What a run says of each step, without its speed."""
  path = folder / name / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  rows = [json.loads(line) for line in lines if line.endswith('\n')]
  return {
    (row.pop('split'), row.pop('step')): {k: v for k, v in row.items() if 'second' not in k}
    for row in rows
  }


def wait_for_step(folder, name, step, process):
  deadline = time.time() + 120
  while not any(s >= step for split, s in metrics(folder, name) if split == 'train'):
    assert process.poll() is None and time.time() < deadline, log_of(folder, name)
    time.sleep(0.05)


def pid_of(folder, name, index):
  """The process id of process `index` of a run."""
  for entry in pathlib.Path('/proc').iterdir():
    with contextlib.suppress(OSError):
      words = (entry / 'cmdline').read_bytes().decode().split('\0') if entry.name.isdigit() else ()
      if f'--process_id={index}' in words and f'--workdir={folder / name}' in words:
        return int(entry.name)
  raise AssertionError(f'no process {index}: {log_of(folder, name)}')


def difference(a, b):
  """The largest relative difference of any number of two runs, which must have the same steps."""
  assert a.keys() == b.keys() and a
  pairs = [(a[step][key], b[step][key]) for step in a for key in a[step]]
  return max(abs(x - y) / max(abs(x), abs(y), 1e-30) for x, y in pairs)


def shifted(run):
  """The metrics of a run as if each training step had been the one after it: what a run that lost
  one step looks like.
  """
  last = max(step for split, step in run if split == 'train')
  return {
    (split, step): run[split, step % last + 1] if split == 'train' else row
    for (split, step), row in run.items()
  }


@pytest.fixture(scope='module')
def alone(folder):
  """The run of one process."""
  return train(folder, 'alone', 1, 3 * EVERY)


@pytest.fixture(scope='module')
def pair(folder):
  """A run of two processes: killed, started anew, preempted, and started anew. Gives what was seen
  on the way.
  """
  seen = {}
  seal = folder / 'pair' / 'checkpoints' / str(EVERY) / 'seal.json'
  with started(folder, 'pair', 2, ENDLESS) as process:
    wait_for_step(folder, 'pair', EVERY + 1, process)
    while not seal.exists():  # a run that dies in a save has lost it
      time.sleep(0.01)
    os.kill(pid_of(folder, 'pair', 1), signal.SIGKILL)
    began = time.perf_counter()
    seen['killed'] = process.wait(timeout=150), time.perf_counter() - began, log_of(folder, 'pair')
  last = max(step for split, step in metrics(folder, 'pair') if split == 'train')
  with started(folder, 'pair', 2, ENDLESS) as process:
    wait_for_step(folder, 'pair', last + 1, process)
    os.kill(pid_of(folder, 'pair', 1), signal.SIGTERM)
    began = time.perf_counter()
    seen['preempted'] = (
      process.wait(timeout=150),
      time.perf_counter() - began,
      log_of(folder, 'pair'),
    )
  seen['step'] = max(step for split, step in metrics(folder, 'pair') if split == 'train')
  seen['saved'] = sorted(
    int(path.name) for path in (folder / 'pair' / 'checkpoints').iterdir() if path.name.isdigit()
  )
  seen['metrics'] = train(folder, 'pair', 2, seen['step'] + 2)
  seen['log'] = log_of(folder, 'pair')
  return seen


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_its_reason(pair):
  status, seconds, log = pair['killed']
  assert status == 128 + signal.SIGKILL and seconds < ENDS_WITHIN
  assert 'launch/local.sh: process 1 ended with status 137; the others follow.' in log
  assert 'llm_jax: stopping, because another process died' in log or 'another task died' in log


@pytest.mark.slow
def test_sigterm_to_one_saves_one_step_on_all(pair):
  status, seconds, log = pair['preempted']
  assert status == 0 and seconds < ENDS_WITHIN
  assert f'Stopped by a signal after step {pair["step"]}, which is saved' in log
  assert pair['saved'][-1] == pair['step']


@pytest.mark.slow
def test_killed_and_preempted_the_run_is_the_same_to_the_last_bit(pair, folder):
  assert (
    f'Resumed from the checkpoint of step {pair["step"]}, at example {pair["step"] * BATCH}.'
    in pair['log']
  )
  whole = train(folder, 'whole', 2, pair['step'] + 2)
  assert pair['metrics'] == whole
  assert shifted(whole) != whole  # a run that lost one step would look otherwise


@pytest.fixture(scope='module')
def elastic(folder):
  """A run on four processes, on one, and on four again with another mesh. Gives its metrics after
  each.
  """
  four = train(folder, 'elastic', 4, EVERY)
  one = train(folder, 'elastic', 1, 2 * EVERY)
  shutil.copy(folder / 'elastic.log', folder / 'second.log')
  back = train(
    folder, 'elastic', 4, 3 * EVERY, '--config.mesh.sequence=2', '--config.mesh.tensor=2'
  )
  return four, one, back


def upto(run, step):
  return {key: row for key, row in run.items() if key[1] <= step}


@pytest.mark.slow
def test_two_and_four_processes_are_the_run_of_one(alone, pair, elastic):
  last = min(pair['step'], 3 * EVERY)
  assert difference(upto(pair['metrics'], last), upto(alone, last)) < TOLERANCE
  assert difference(elastic[0], upto(alone, EVERY)) < TOLERANCE
  assert difference(shifted(alone), alone) > 100 * TOLERANCE


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_another_mesh(alone, elastic, folder):
  _, one, back = elastic
  assert difference(one, upto(alone, 2 * EVERY)) < TOLERANCE
  assert difference(back, alone) < TOLERANCE
  assert (
    f'Resumed from the checkpoint of step {EVERY}, at example {EVERY * BATCH}.'
    in (folder / 'second.log').read_text()
  )
  assert (
    f'step {2 * EVERY}, at example {2 * EVERY * BATCH}.' in (folder / 'elastic.log').read_text()
  )


@pytest.mark.slow
def test_processes_with_different_configs_are_stopped(folder):
  zero, one = together(
    lambda address, i: [
      '-m',
      'llm_jax.main',
      *command(folder, 'differing', 2, EVERY)[3:],
      f'--config.seed={i}',
      f'--coordinator={address}',
      '--num_processes=2',
      f'--process_id={i}',
    ],
    2,
  )
  reason = 'process 1 has a config other than process 0'
  assert one[0] == 2 and reason in one[2] and '"seed": 1, on process 0 "seed": 0' in one[2]
  assert zero[0] == 2 and f'stopping, because process 1 stopped: {reason}' in zero[2]
  assert 'Traceback' not in zero[2] + one[2]


@pytest.mark.parametrize(
  'arguments', [[], ['-n'], ['-n', '0', '--workdir=x'], ['-n', 'two', '--workdir=x'], ['-n', '2']]
)
def test_local_sh_used_wrongly(arguments):
  done = subprocess.run(
    [ROOT / 'launch' / 'local.sh', *arguments], capture_output=True, text=True, check=False
  )
  assert done.returncode == 2 and done.stderr.startswith('usage: launch/local.sh [--dry_run] -n ')
