"""Fully sharded data parallel (arXiv:2304.11277) by hand, for the machines whose compiler does not
get there.

A weight that is cut over the mesh axis `fsdp` is gathered where it is used, and its gradient is
summed over the devices so that each keeps its part (reduce-scatter). XLA finds both by itself, and
overlaps them with the products, on most machines. On the three-dimensional torus of TPU v4 and v5p
it does not: for a group that is a whole torus it expects to all-reduce by an algorithm of all
dimensions at once, takes no reduce-scatter, and so sums whole gradients on each device, twice the
traffic. Here the reduce-scatter is taken in two rounds, each over a part of the torus where the
compiler takes it as it is: over planes, then over lines. Its operands are matrices whose rows are
what is cut, as other shapes come out padded and shifted.

Letters are those of `llm_jax.nn.options`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from llm_jax.parallel import sharding

AXIS = 'fsdp'
TILE = 8, 128  # of a matrix in a TPU's memory
TILES = 32  # each device's part of a plane's sum must be a multiple of so many tiles
TORI = ('TPU v4', 'TPU v5', 'TPU v5p')
# All transfers of weights and gradients by the sparse cores, beside the products on the tensor one.
_OFFLOAD = 'xla_tpu_enable_sparse_core_collective_offload'
ASYNCHRONOUS = {
  f'{_OFFLOAD}_{which}': True for which in ('all_gather', '3d_all_gather', 'reduce_scatter')
}


def line(mesh: Mesh) -> int | None:
  """How many neighbours on the axis are a line of a three-dimensional torus that the axis covers;
  None where it covers none.
  """
  devices = mesh.devices.reshape(mesh.devices.shape[0], mesh.shape[AXIS], -1)
  if devices.shape[2] > 1 or devices.flat[0].device_kind not in TORI:
    return None
  if len({getattr(device, 'slice_index', 0) for device in devices[0, :, 0]}) > 1:
    return None
  coordinates = np.array([device.coords for device in devices[0, :, 0]])
  sides = [len(set(coordinates[:, d])) for d in range(3)]
  if min(sides) < 4:  # shorter ones have no links that close the ring
    return None
  along = coordinates[1] != coordinates[0]
  off_the_line = np.any((coordinates != coordinates[0])[:, ~along], axis=1)
  return int(np.argmax(off_the_line))


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
  """Options for a program over a mesh; None for none."""
  return ASYNCHRONOUS if mesh.devices.flat[0].device_kind != 'TPU v4' and line(mesh) else None


@dataclasses.dataclass(frozen=True)
class Gathering:
  """How one weight is gathered.

  Attributes:
    mesh: the devices.
    cut: how the weight lies on them.
    dimension: of the weight, which the axis cuts.
    rows: the mesh axes that cut the rows of the activations.
    line: as the function `line` returns it.
  """

  mesh: Mesh
  cut: P
  dimension: int
  rows: sharding.Axes
  line: int

  def product(self, spec: str, x: jax.Array, kernel: jax.Array, result: DTypeLike) -> jax.Array:
    """The einsum `spec` of activations and the weight, summed in and returned as `result`."""
    run = functools.partial(
      _local,
      spec=_cut_first(spec, self.dimension),
      dimension=self.dimension,
      result=result,
      line=self.line,
      size=self.mesh.shape[AXIS],
    )
    specs = P(self.rows), self.cut
    mapped = jax.shard_map(
      run, mesh=self.mesh, in_specs=specs, out_specs=P(self.rows), check_vma=False
    )
    return mapped(x, kernel)


def gathering(names: Sequence[str | None], shape: Sequence[int], rows: int) -> Gathering | None:
  """How a weight is to be gathered by hand in the program that is being traced.

  Args:
    names: logical axes of the weight's dimensions.
    shape: its shape.
    rows: B of the activations, whose first dimension is the row.

  Returns:
    None where the compiler does it by itself, or the axis does not cut this weight or these rows.
  """
  layout = sharding.current()
  length = None if layout is None else line(layout.mesh)
  if length is None:
    return None
  cut = layout.parameter_spec(names, shape)
  by_row = layout.spec(('batch',), (rows,))[0]
  dimension = next((d for d, axes in enumerate(cut) if axes in (AXIS, (AXIS,))), None)
  if dimension is None or by_row is None:
    return None
  return Gathering(layout.mesh, cut, dimension, by_row, length)


def scatter_sum(x: jax.Array, size: int, length: int | None) -> jax.Array:
  """In shard_map: the sum over the axis of all devices' `x` [n r, ...], of which each keeps its own
  part [r, ...].

  Args:
    x: the same shape on each device.
    size: n, devices of the axis.
    length: as `line` returns it.
  """
  if length is None or length == size:
    return jax.lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True)
  planes = [list(range(first, size, length)) for first in range(length)]
  lines = [list(range(first, first + length)) for first in range(0, size, length)]
  matrix = x.reshape(x.shape[0], -1)
  columns = matrix.shape[1]
  matrix = jnp.pad(matrix, ((0, 0), (0, -columns % _columns(x.shape[0] * length // size))))
  for groups in (planes, lines):
    matrix = jax.lax.psum_scatter(
      matrix, AXIS, scatter_dimension=0, axis_index_groups=groups, tiled=True
    )
  return matrix[:, :columns].reshape(-1, *x.shape[1:])


def _columns(rows: int) -> int:
  """What the columns of a matrix must be a multiple of, so that `rows` of it are whole tiles, and
  enough of them.
  """
  tiles = math.gcd(TILES, max(rows // TILE[0], 1))
  return TILE[1] * TILES // tiles


def _cut_first(spec: str, dimension: int) -> str:
  """The einsum for a kernel whose `dimension` has become its first."""
  left, _, rest = spec.partition(',')
  letters, _, out = rest.partition('->')
  return f'{left},{letters[dimension]}{letters[:dimension]}{letters[dimension + 1 :]}->{out}'


def _local(
  x: jax.Array,
  kernel: jax.Array,
  *,
  spec: str,
  dimension: int,
  result: DTypeLike,
  line: int,
  size: int,
) -> jax.Array:
  """On each device: its rows with the whole weight."""
  part = jnp.moveaxis(kernel, dimension, 0)
  whole = _gathered(size, line, part.reshape(part.shape[0], -1))
  return jnp.einsum(spec, x, whole.reshape(-1, *part.shape[1:]), preferred_element_type=result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(size: int, line: int, part: jax.Array) -> jax.Array:
  """All devices' rows of a matrix; differentiated, the sum of their gradients, of which each device
  keeps its rows'.
  """
  del size, line
  return jax.lax.all_gather(part, AXIS, axis=0, tiled=True)


def _gathered_forward(size, line, part):
  return _gathered(size, line, part), None


def _gathered_backward(size, line, _, gradient):
  return (scatter_sum(gradient, size, line),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
