"""What a train step takes of a device's memory, as the compiler says, and the cheapest `remat` with
which it fits.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
from absl import logging

from llm_jax.core.config import Config
from llm_jax.parallel import chips, hosts
from llm_jax.training.program import Training

# What `model.remat` may be, from the policy that recomputes least to the one that keeps least.
REMATS = ('none', 'dots', 'narrow', 'attention', 'full')
GIB = 2**30
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_Value = TypeVar('_Value')


class Need(NamedTuple):
  """Of one step on one device.

  Attributes:
    total_bytes: as the compiler says.
    compiled: the step; None where the compiler refused it for lack of memory.
  """

  total_bytes: int
  compiled: jax.stages.Compiled | None


@dataclasses.dataclass(frozen=True)
class Trial(Generic[_Value]):
  """A config that was compiled to see whether it fits.

  Attributes:
    value: whatever the caller made of it.
    total_bytes: what its step takes on a device.
    limit_bytes: what there is.
    fits: whether it can run.
  """

  value: _Value
  total_bytes: int
  limit_bytes: int
  fits: bool


def needed(program: Training) -> Need:
  """Compiles the train step.

  Raises:
    ValueError: 'offload' on a CPU.
  """
  _check(program)
  try:
    compiled = program.train_step.lower(program.state, program.batch).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return Need(int(refused_bytes(str(error))), None)
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Need(held + memory.temp_size_in_bytes, compiled)


def temporaries(program: Training) -> int:
  """Bytes that a step takes of the memory of each device for no longer than it runs."""
  compiled = program.train_step.lower(program.state, program.batch).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def limit(devices: Sequence[jax.Device]) -> int:
  """Bytes that a program may use of a device's memory; CPU devices share what the machine has.

  Raises:
    ValueError: the kind of device is not known.
  """
  device = devices[0]
  chip = chips.CHIPS.get(device.device_kind)
  if chip is not None and chip.usable_bytes is not None:
    return int(chip.usable_bytes)
  if device.platform == 'gpu':
    return device.memory_stats()['bytes_limit']
  if device.platform != 'cpu':
    raise ValueError(
      f'the memory of {device.device_kind!r} is not known; add it to llm_jax/parallel/chips.py.'
    )
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // len(devices)


def fitting(config: Config, make: Callable[[Config], Training]) -> Training:
  """The program of a config; where `model.remat` is 'auto', with the first of `REMATS` with which a
  step fits.

  The step that was compiled to find out is the one that runs, so where the first of them fits, this
  costs nothing. Of several processes, process 0 decides.

  Args:
    config: resolved.
    make: the program of a config of this kind.

  Raises:
    ValueError: 'auto', and not even the last of them fits; 'offload' on a CPU.
  """
  if config.model.get('remat') != 'auto':
    return _check(make(config))

  def measure(config: Config) -> Trial[Training]:
    program = make(config)
    need, most = needed(program), limit(list(program.mesh.devices.flat))
    fits = hosts.agree(lambda: need.compiled is not None and need.total_bytes <= most)
    return Trial(program, need.total_bytes, most, fits)

  found = first_fitting(config, measure)
  hosts.barrier()  # they compile at paces of their own
  if not found.fits:
    program = found.value
    raise ValueError(
      f"config.model.remat='auto': even with remat={program.config.model['remat']!r} a step takes "
      f'{found.total_bytes / GIB:.2f} of {found.limit_bytes / GIB:.2f} GiB on a device; raise '
      f'config.micro_batches from {program.micro_batches}, set config.mesh.fsdp, or ask '
      '--mode=plan what fits.'
    )
  return found.value


def first_fitting(config: Config, measure: Callable[[Config], Trial[_Value]]) -> Trial[_Value]:
  """The trial of a config; where `model.remat` is 'auto', of the first of `REMATS` that fits, or of
  the last where none does.
  """
  if config.model.get('remat') != 'auto':
    return measure(config)
  for remat in REMATS:
    trial = measure(dataclasses.replace(config, model=config.model | {'remat': remat}))
    logging.info(
      'model.remat=%s: a step takes %.2f of %.2f GiB on a device.',
      remat,
      trial.total_bytes / GIB,
      trial.limit_bytes / GIB,
    )
    if trial.fits:
      break
  return trial


def refused_bytes(message: str) -> float:
  """What a program that was refused would have needed, from the compiler's message ('Used 24.31G of
  15.75G hbm').

  Raises:
    ValueError: the message names no size.
  """
  used = re.search(r'Used ([\d.]+)([KMGT]) of', message)
  found = used or re.search(r'\(([\d.]+)([KMGT])\) exceeds', message)
  if found is None:
    raise ValueError(
      'the compiler refused the program for lack of memory, and its message names no size: '
      f'{message[:500]}'
    )
  return float(found[1]) * _UNITS[found[2]]


def _check(program: Training) -> Training:
  if program.config.model.get('remat') == 'offload' and program.layout.platform == 'cpu':
    raise ValueError(
      "config.model.remat='offload' moves activations from a device to its host; on a CPU they are "
      "there already. Take 'narrow', which keeps the same."
    )
  return program
