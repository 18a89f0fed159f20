"""What a train step takes of a device's memory, as the compiler says, and the cheapest `remat` with
which it fits.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from llm_jax.core.config import Config
from llm_jax.parallel import chips
from llm_jax.programs.build import Program

REMATS = (
  'none',
  'dots',
  'narrow',
  'attention',
  'full',
)  # from the one that computes least again to the one that keeps least


class Need(NamedTuple):
  """Of one step on one device. `compiled` is None where the compiler refused the program for lack
  of memory.
  """

  total_bytes: int
  compiled: Any


def needed(program: Program) -> Need:
  """Compiles the train step."""
  _check(program)
  try:
    compiled = program.train_step.lower(program.state, program.batch).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return Need(int(refused_bytes(str(error))), None)
  memory = compiled.memory_analysis()
  return Need(
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    compiled,
  )


def limit(devices: Sequence[Any]) -> int:
  """Bytes that a program may use of a device's memory; CPU devices share what the machine has.

  Raises:
    ValueError: the kind of device is not known.
  """
  chip = chips.CHIPS.get(devices[0].device_kind)
  if chip is not None and chip.usable_bytes is not None:
    return int(chip.usable_bytes)
  if devices[0].platform == 'gpu':
    return devices[0].memory_stats()['bytes_limit']
  if devices[0].platform != 'cpu':
    raise ValueError(
      f'the memory of {devices[0].device_kind!r} is not known; add it to llm_jax/parallel/chips.py.'
    )
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // len(devices)


def fitting(config: Config, make: Callable[[Config], Program]) -> Program:
  """The program of a config; where `model.remat` is 'auto', with the first of `REMATS` with which a
  step fits.

  What is compiled on the way is kept by the compilation cache, so that the first step does not
  compile it again.

  Args:
    config: resolved.
    make: the program of a config of this kind.

  Raises:
    ValueError: 'auto', and not even the last of them fits; 'offload' on a CPU.
  """
  if config.model.get('remat') != 'auto':
    return _check(make(config))
  for remat in REMATS:
    program = make(dataclasses.replace(config, model=config.model | {'remat': remat}))
    need, most = needed(program).total_bytes, limit(list(program.mesh.devices.flat))
    logging.info(
      'model.remat=%s: a step takes %.2f of %.2f GiB on a device.',
      remat,
      need / 2**30,
      most / 2**30,
    )
    if need <= most:
      return program
  raise ValueError(
    f"config.model.remat='auto': even with remat={remat!r} a step takes {need / 2**30:.2f} of "
    f'{most / 2**30:.2f} '
    f'GiB on a device; raise config.micro_batches from {program.micro_batches}, set '
    'config.mesh.fsdp, or ask '
    '--mode=plan what fits.'
  )


def _check(program: Program) -> Program:
  if program.network.model.remat == 'offload' and program.layout.platform == 'cpu':
    raise ValueError(
      "config.model.remat='offload' moves activations from a device to its host; on a CPU they are "
      'there already. '
      "Take 'narrow', which keeps the same."
    )
  return program


def refused_bytes(message: str) -> float:
  """What a program that was refused would have needed, as the compiler's message says it ('Used
  24.31G of 15.75G hbm').
  """
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  found = re.search(r'Used ([\d.]+)([KMGT]) of', message) or re.search(
    r'\(([\d.]+)([KMGT])\) exceeds', message
  )
  if found is None:
    raise ValueError(
      'the compiler refused the program for lack of memory, and its message names no size: '
      f'{message[:500]}'
    )
  return float(found[1]) * units[found[2]]
