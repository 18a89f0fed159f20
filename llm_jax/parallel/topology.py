"""Machines that are not here: descriptions of a slice's devices by its name, good enough for the
real compiler.

`v5e:4x4` is a slice of 4 x 4 chips, `v5e:4x4*2` two of them joined by the data centre's network,
`cpu:8` eight devices of this machine's CPU. The TPU compiler (package libtpu) needs no TPU.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from llm_jax.core.plugins import nearest


@dataclasses.dataclass(frozen=True)
class _Kind:
  """How libtpu names a generation, the dimensions of its slices, and whether the two cores of a
  chip are one device.
  """

  name: str
  dimensions: int
  megacore: bool

  def closed(self, shape: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Along which dimensions a slice's ends are joined: all where each is a multiple of 4 (3-D);
    those of 16 chips (2-D).
    """
    ends = (
      [all(size % 4 == 0 for size in shape)] * 3
      if self.dimensions == 3
      else [size == 16 for size in (*shape, 1)]
    )
    return tuple(ends)


# Google's pages on each generation (docs.cloud.google.com/tpu/docs/v5p and so on).
KINDS = {
  'v4': _Kind('v4', 3, True),
  'v5e': _Kind('v5e', 2, False),
  'v5p': _Kind('v5', 3, True),
  'v6e': _Kind('v6e', 2, False),
}
# libtpu asks about the TPU that it is on, complains where there is none, and keeps others from it;
# here it only compiles.
_NO_TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
EXAMPLES = 'v5e:4x4, v5p:4x4x4, v5e:4x4*2 (two slices), cpu:8'


def parse(topology: str) -> tuple[str, tuple[int, ...], int]:
  """(generation, chips along each dimension, slices) of a name.

  Raises:
    ValueError: not a name of this form, or a generation that is not known.
  """
  match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?', topology)
  if not match:
    raise ValueError(
      f'--topology={topology} is not the name of a machine; give one such as {EXAMPLES}.'
    )
  kind, shape, slices = match[1], tuple(map(int, match[2].split('x'))), int(match[3] or 1)
  if kind != 'cpu' and kind not in KINDS:
    raise ValueError(
      f'--topology={topology}: {kind!r} is not a known kind of '
      f'chip{nearest(kind, [*KINDS, "cpu"])}; known: '
      f'{", ".join(KINDS)}, cpu.'
    )
  wanted = 1 if kind == 'cpu' else KINDS[kind].dimensions
  if len(shape) != wanted or min(shape) < 1 or slices < 1 or (kind == 'cpu' and slices > 1):
    example = {1: 'cpu:8', 2: f'{kind}:4x4', 3: f'{kind}:4x4x4'}[wanted]
    raise ValueError(f'--topology={topology}: {kind} has {wanted} dimension(s), as in {example}.')
  return kind, shape, slices


def prepare(topologies: Sequence[str]) -> None:
  """Before JAX starts: checks the names, and makes room for as many CPU devices as they want."""
  parsed = [parse(name) for name in topologies]
  jax.config.update(
    'jax_num_cpu_devices', max([1, *(shape[0] for kind, shape, _ in parsed if kind == 'cpu')])
  )


def devices(topology: str) -> list[Any]:
  """The devices of a topology, as a mesh and the compiler take them.

  For a CPU they are real ones, for which `prepare` makes room.

  Raises:
    ValueError: a name that is not one, a shape that does not exist, no TPU compiler on this
      machine, too few CPU devices.
  """
  kind, shape, slices = parse(topology)
  if kind == 'cpu':
    return _cpu_devices(topology, shape[0])
  check_compiler()
  chip = KINDS[kind]
  for name, value in _NO_TPU.items():
    os.environ.setdefault(name, value)
  options = (
    dict(chip_config_name='megacore', chips_per_host_bounds=(2, 2, 1)) if chip.megacore else {}
  )
  try:
    described = topologies.get_topology_desc(
      platform='tpu',
      topology_name=f'{chip.name}:{"x".join(map(str, shape))}',
      num_slices=slices,
      wrap=chip.closed(shape),
      **options,
    )
  except (
    Exception
  ) as error:  # jaxlib's own error type, and IndexError for what is smaller than a host
    raise ValueError(
      f'--topology={topology}: the TPU compiler knows no such slice '
      f'({str(error).splitlines()[0]}); '
      f'shapes are multiples of the 2x2 chips of a host.'
    ) from error
  return list(described.devices)


def check_compiler() -> None:
  """Raises ValueError, saying how to install it, where the TPU compiler is not there."""
  if importlib.util.find_spec('libtpu') is None:
    wanted = next(
      (
        line.split(';')[0].strip()
        for line in importlib.metadata.requires('jax') or ()
        if line.startswith('libtpu')
      ),
      'libtpu',
    )
    raise ValueError(
      f"plans for TPUs need the TPU compiler, which runs without a TPU: pip install '{wanted}', or "
      'plan for '
      'this machine with --topology=cpu:8.'
    )


def _cpu_devices(topology: str, count: int) -> list[Any]:
  found = jax.devices('cpu')
  if len(found) < count:
    raise ValueError(
      f'--topology={topology}: JAX has started with {len(found)} CPU devices; set XLA_FLAGS='
      f'--xla_force_host_platform_device_count={count}.'
    )
  return found[:count]


def chips(topology: str) -> int:
  """How many chips a topology has."""
  _, shape, slices = parse(topology)
  return math.prod(shape) * slices
