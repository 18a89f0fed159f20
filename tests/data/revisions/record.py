"""A run in numbers: its logged metrics, and of each saved array a hash and a norm."""

import hashlib
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

TIMINGS = ('tokens_per_second', 'seconds_per_step')


def machine():
  """The CPU, by what decides which instructions XLA picks for it, and the version of JAX."""
  cpu = pathlib.Path('/proc/cpuinfo').read_text().split('\n\n')[0]  # of the first core
  fields = dict(map(str.strip, line.split(':', 1)) for line in cpu.splitlines())
  flags = ' '.join(sorted(fields['flags'].split()))
  digest = hashlib.sha256(flags.encode()).hexdigest()
  return {'cpu': fields['model name'], 'cpu_flags_sha256': digest, 'jax': jax.__version__}


def metrics(workdir, first, last):
  """The lines of metrics.jsonl from step `first` to step `last`, without timings."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  chosen = [line for line in map(json.loads, lines) if first <= line['step'] <= last]
  return [{key: line[key] for key in line if key not in TIMINGS} for line in chosen]


def state(workdir, step):
  """Each array of a checkpoint by its path, as 'dtype[shape] sha256 norm', the norm being L2."""
  folder = workdir / 'checkpoints' / str(step) / 'state'
  leaves, _ = jax.tree_util.tree_flatten_with_path(ocp.PyTreeCheckpointer().restore(folder))
  return {'/'.join(str(key.key) for key in path): _summary(leaf) for path, leaf in leaves}


def _summary(leaf):
  array = np.asarray(leaf)
  digest = hashlib.sha256(array.tobytes()).hexdigest()
  norm = np.linalg.norm(array.astype(np.float64).ravel())
  return f'{array.dtype}{list(array.shape)} {digest} {norm:.12g}'


def record(workdir, first, last):
  """Metrics of steps `first` to `last`, and the state at the last of them."""
  return {'metrics': metrics(workdir, first, last), 'state': state(workdir, last)}
