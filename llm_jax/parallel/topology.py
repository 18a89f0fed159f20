"""Machines that are not here: descriptions of their devices, from a name, which the real compiler
takes.

`v5e:4x4` is a slice of 4 x 4 chips, `v5e:4x4*2` two of them joined by the data centre's network,
`v5e-16` (or `v5litepod-16`) and `v5p-64` are slices as Google Cloud names them, `cpu:8` is eight
devices of this machine's CPU. The TPU compiler (package libtpu) needs no TPU.
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
  """A generation of TPUs.

  Attributes:
    name: what libtpu calls it.
    dimensions: of its slices.
    megacore: whether the two cores of a chip are one device.
  """

  name: str
  dimensions: int
  megacore: bool

  def closed(self, shape: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Along which dimensions the ends of a slice are joined: in 3-D all, where each is a multiple
    of 4 chips; in 2-D those of 16 chips.
    """
    if self.dimensions == 3:
      whole = all(size % 4 == 0 for size in shape)
      return whole, whole, whole
    return shape[0] == 16, shape[1] == 16, False


# Google's pages on each generation (docs.cloud.google.com/tpu/docs/v5p and so on).
KINDS = {
  'v4': _Kind('v4', 3, True),
  'v5e': _Kind('v5e', 2, False),
  'v5p': _Kind('v5', 3, True),
  'v6e': _Kind('v6e', 2, False),
}
CHIPS_OF_A_HOST = 4  # a slice may have fewer, on a host of its own
# libtpu looks for the TPU that it is on, complains where there is none, and locks it for itself;
# here it only compiles.
_NO_TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
# Slices by their chips, as Google Cloud makes them where only a number is given.
_FLAT = {
  1: '1x1',
  4: '2x2',
  8: '2x4',
  16: '4x4',
  32: '4x8',
  64: '8x8',
  128: '8x16',
  256: '16x16',
}
_CUBES = {
  4: '2x2x1',
  8: '2x2x2',
  16: '2x2x4',
  32: '2x4x4',
  64: '4x4x4',
  128: '4x4x8',
  256: '4x8x8',
  512: '8x8x8',
  1024: '8x8x16',
  2048: '8x16x16',
}
EXAMPLES = 'v5e:4x4, v5e-16, v5p:4x4x4, v5e:4x4*2 (two slices), cpu:8'


def parse(topology: str) -> tuple[str, tuple[int, ...], int]:
  """(generation, chips along each dimension, slices) of a name.

  Raises:
    ValueError: a name of another form, or an unknown generation.
  """
  match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?', _by_shape(topology))
  if not match:
    raise ValueError(
      f'--topology={topology} is not the name of a machine; give one such as {EXAMPLES}.'
    )
  kind, slices = match[1], int(match[3] or 1)
  shape = tuple(map(int, match[2].split('x')))
  if kind != 'cpu' and kind not in KINDS:
    known = [*KINDS, 'cpu']
    raise ValueError(
      f'--topology={topology}: {kind!r} is not a known kind of chip{nearest(kind, known)}; known: '
      f'{", ".join(known)}.'
    )
  wanted = 1 if kind == 'cpu' else KINDS[kind].dimensions
  if len(shape) != wanted or min(shape) < 1 or slices < 1 or (kind == 'cpu' and slices > 1):
    example = {1: 'cpu:8', 2: f'{kind}:4x4', 3: f'{kind}:4x4x4'}[wanted]
    raise ValueError(f'--topology={topology}: {kind} has {wanted} dimension(s), as in {example}.')
  return kind, shape, slices


def _by_shape(topology: str) -> str:
  """The name with a slice's shape for one of Google Cloud, which counts: chips of v5e and v6e,
  cores of v4 and v5p, two to a chip. Other names are as they are.

  Raises:
    ValueError: a count of which there is no slice.
  """
  match = re.fullmatch(r'(\w+)-(\d+)((?:\*\d+)?)', topology)
  kind = match and {'v5litepod': 'v5e'}.get(match[1], match[1])
  if kind not in KINDS:
    return topology
  shapes = _FLAT
  if KINDS[kind].dimensions == 3:
    shapes = {2 * chips: shape for chips, shape in _CUBES.items()}
  count = int(match[2])
  if count not in shapes:
    raise ValueError(
      f'--topology={topology}: there is no such slice; the numbers of {kind} are '
      f'{", ".join(map(str, shapes))}.'
    )
  return f'{kind}:{shapes[count]}{match[3]}'


def prepare(topologies: Sequence[str]) -> None:
  """Before JAX starts: checks the names, and has JAX make as many CPU devices as they need."""
  counts = [1]
  for name in topologies:
    kind, shape, _ = parse(name)
    if kind == 'cpu':
      counts.append(shape[0])
  jax.config.update('jax_num_cpu_devices', max(counts))


def devices(topology: str) -> list[jax.Device]:
  """The devices of a topology, as a mesh and the compiler take them; of a CPU the real ones, which
  `prepare` asks JAX for.

  Raises:
    ValueError: a name of another form, a shape that does not exist, no TPU compiler on this
      machine, too few CPU devices.
  """
  kind, shape, slices = parse(topology)
  if kind == 'cpu':
    return _cpu_devices(topology, shape[0])
  check_compiler()
  chip = KINDS[kind]
  for name, value in _NO_TPU.items():
    os.environ.setdefault(name, value)
  options: dict[str, Any] = {}
  if chip.megacore:
    options = {'chip_config_name': 'megacore', 'chips_per_host_bounds': (2, 2, 1)}
  if math.prod(shape) < CHIPS_OF_A_HOST:
    options['chips_per_host_bounds'] = (*shape, 1)[:3]
  try:
    described = topologies.get_topology_desc(
      platform='tpu',
      topology_name=f'{chip.name}:{"x".join(map(str, shape))}',
      num_slices=slices,
      wrap=chip.closed(shape),
      **options,
    )
  # jaxlib's own error type, and IndexError for what is smaller than a host.
  except Exception as error:
    raise ValueError(
      f'--topology={topology}: the TPU compiler knows no such slice '
      f'({str(error).splitlines()[0]}); shapes are multiples of the 2x2 chips of a host, or parts '
      'of one.'
    ) from error
  return list(described.devices)


def check_compiler() -> None:
  """Raises ValueError, with how to install it, where the TPU compiler is not installed."""
  if importlib.util.find_spec('libtpu') is not None:
    return
  required = importlib.metadata.requires('jax') or ()
  matching = [line.split(';')[0].strip() for line in required if line.startswith('libtpu')]
  raise ValueError(
    'plans for TPUs need the TPU compiler, which runs without a TPU: pip install '
    f"'{next(iter(matching), 'libtpu')}', or plan for this machine with --topology=cpu:8."
  )


def _cpu_devices(topology: str, count: int) -> list[jax.Device]:
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
