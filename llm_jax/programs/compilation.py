"""Compiled programs kept on disk by JAX's persistent compilation cache, so that a second start of a
run does not compile again.

The key of an entry covers the program, its options, the devices and the versions of JAX and XLA.
Process 0 writes entries, all read them.
"""

import contextlib
import hashlib
import os
import pathlib
import platform

import jax
from absl import logging
from jax._src import compilation_cache  # how an entry is packed has no public name

from llm_jax.parallel import hosts

FOLDER = 'xla_cache'


def keep(directory: pathlib.Path) -> None:
  """Keeps what is compiled from now on under `directory / FOLDER`, small programs too, and reads it
  from there.

  The folder is made when there is something to keep. One that JAX was given by other means
  (JAX_COMPILATION_CACHE_DIR) is used instead. Must come after `hosts.start`.

  Args:
    directory: the folder of a run, or the user's cache; several processes may share it.
  """
  if jax.config.jax_compilation_cache_dir is None:
    folder = directory / FOLDER
    if jax.default_backend() == 'cpu':
      folder /= f'cpu-{_processor()}'
    if hosts.primary():
      _drop_damaged(folder)
    jax.config.update('jax_compilation_cache_dir', str(folder))
    if jax.default_backend() != 'gpu':
      # XLA's own caches are for GPUs; their path is part of every key, so that the folder could not
      # be moved.
      jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def _processor() -> str:
  """A name for this processor: machine code for one may not run on another, and is made for the
  number of its cores.
  """
  known = [platform.machine(), str(os.cpu_count())]
  fields = ('model name', 'flags', 'Features', 'CPU part')
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    known += sorted({line for line in lines if line.startswith(fields)})
  except OSError:
    known += [platform.node(), platform.processor()]
  return hashlib.sha256('\n'.join(known).encode()).hexdigest()[:16]


def _drop_damaged(folder: pathlib.Path) -> None:
  """Removes entries that were cut short by a full disk or the death of a process: JAX compiles such
  programs again each time, but never replaces the entries.
  """
  for path in folder.glob('*-cache'):
    try:
      compilation_cache.decompress_executable(path.read_bytes())
    except OSError:  # another run has just removed it; or it cannot be read, which JAX reports
      continue
    except Exception:  # of whichever library JAX packs with
      logging.warning('%s is damaged, and is removed.', path)
      with contextlib.suppress(OSError):
        path.unlink()
