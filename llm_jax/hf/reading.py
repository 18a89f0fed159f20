"""From the tensors of a folder to our parameters; `folders.load` says what of it a user sees.

`choose`, `check_shapes` and `left_over` work with names and shapes alone, before any weight is
read. `read` then fills one parameter, one device's part at a time.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.core.params import Info
from llm_jax.hf import safetensors
from llm_jax.hf.family import Family
from llm_jax.hf.tensors import FLOATS, OUTPUT, TOKEN, Location

Bounds = tuple[tuple[int, int], ...]  # start and stop of each axis

_COMPARED = 1 << 22  # elements of two tensors that are compared at once


def choose(
  family: Family,
  wanted: Mapping[str, Any],
  infos: Mapping[str, Info],
  names: Mapping[str, str],
  architectures: Sequence[str],
) -> dict[str, Location]:
  """Where each parameter is read from; a head that is not there as a whole is left out.

  Args:
    family: the folder's.
    wanted: the parameters by path, or their shapes.
    infos: what each of them is.
    names: the folder's tensors, as `Family.canonical` gives them.
    architectures: the classes that the folder says it is.

  Raises:
    ValueError: a parameter of the model is not there.
  """
  chosen: dict[str, Location] = {}
  for path, locations in family.locations(wanted, infos).items():
    whole = [
      each
      for each in locations
      if each.tensor.held_by(architectures) and all(name in names for name in each.names)
    ]
    if whole:
      chosen[path] = whole[0]
    elif path.startswith('model/') and path != OUTPUT:
      lacking = [name for each in locations for name in each.names if name not in names]
      raise ValueError(f'{(lacking or ["a tensor"])[0]} is missing, which {path} is made of.')
  missing = [path for path in wanted if path not in chosen and path != OUTPUT]
  partial = {path.split('/')[0] for path in missing}
  return {path: each for path, each in chosen.items() if path.split('/')[0] not in partial}


def check_shapes(
  chosen: Mapping[str, Location],
  wanted: Mapping[str, Any],
  tensors: safetensors.Tensors,
  names: Mapping[str, str],
) -> None:
  """Raises ValueError for a tensor of another shape than needed, or of no floating-point type."""
  for path, location in chosen.items():
    needed = location.tensor.shape(location.in_layer(wanted[path].shape))
    for name in location.names:
      found = tensors[names[name]]
      if found.shape != needed:
        way_out = ''
        if path in (TOKEN, OUTPUT):
          way_out = ' The vocabularies differ; leave model.vocab_size unset.'
        raise ValueError(
          f'{names[name]} of shape {list(found.shape)} does not fit {path} of shape '
          f'{list(wanted[path].shape)}, which needs {list(needed)} there.{way_out}'
        )
      if found.dtype.name not in FLOATS:
        raise ValueError(
          f'{names[name]} is of type {found.dtype.name}; {path} can be read from '
          f'{", ".join(FLOATS)}.'
        )


def left_over(
  family: Family,
  config: Mapping[str, Any],
  chosen: Mapping[str, Location],
  names: Mapping[str, str],
) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
  """The tensors that are not read, and those that must be equal to others, both by the folder's
  names.

  Raises:
    ValueError: a tensor in a layer would not be read, so that the layer would compute something
      else.
  """
  used = {name for location in chosen.values() for name in location.names}
  copies = family.equal(config)
  unused, pairs = [], []
  for name, actual in names.items():
    if name in used or any(re.fullmatch(pattern, name) for pattern in family.ignored):
      continue
    if copies.get(name) in names:
      pairs.append((actual, names[copies[name]]))
    elif family.within_layers(name):
      raise ValueError(
        f'{actual} is a part of a layer for which this model has no parameter; config.json does '
        'not mention it.'
      )
    else:
      unused.append(actual)
  return tuple(unused), pairs


def check_equal(tensors: safetensors.Tensors, name: str, other: str) -> None:
  """Raises ValueError unless two tensors are the same."""
  if not equal(tensors, name, other):
    raise ValueError(
      f'{name} and {other} differ, and must be the same. Where the model has a projection on the '
      'vocabulary of its own, config.json must say tie_word_embeddings=false.'
    )


def equal(tensors: safetensors.Tensors, name: str, other: str) -> bool:
  """Whether two tensors are the same."""
  return _equal(tensors.view(name), tensors.view(other))


def read(
  leaf: Any, location: Location, tensors: safetensors.Tensors, names: Mapping[str, str]
) -> jax.Array:
  """One parameter: each part is copied from the file for the devices that hold it, then the next.

  Args:
    leaf: shape, type and sharding of the parameter; without a sharding it is on the first device.
    location: where the folder holds it.
    tensors: of the folder.
    names: as in `choose`.
  """
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  arrays = []
  for bounds, devices in _holders(sharding, leaf.shape).items():
    part = _part(leaf, bounds, location, tensors, names)
    # Waiting, so that no more than two parts are on the host.
    arrays += [jax.block_until_ready(jax.device_put(part, device)) for device in devices]
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _holders(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[Bounds, list[Any]]:
  """The parts of an array that this process holds, and the devices that hold each."""
  holders: dict[Bounds, list[Any]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
    holders.setdefault(bounds, []).append(device)
  return holders


def _part(
  leaf: Any,
  bounds: Bounds,
  location: Location,
  tensors: safetensors.Tensors,
  names: Mapping[str, str],
) -> np.ndarray:
  part = np.empty([stop - start for start, stop in bounds], leaf.dtype)
  cuts = tuple(slice(*bound) for bound in bounds)
  layers, rows = location.names, part[None]
  if location.stacked:
    layers, rows = location.names[cuts[0]], part
    cuts = cuts[1:]
  shape = location.in_layer(leaf.shape)
  for name, row in zip(layers, rows, strict=True):
    view = location.tensor.part(tensors.view(names[name]), location.path, shape)
    row[...] = view[cuts]
  return part


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  a, b = a.reshape(-1), b.reshape(-1)
  blocks = (slice(i, i + _COMPARED) for i in range(0, a.size, _COMPARED))
  return all(np.array_equal(a[block], b[block]) for block in blocks)
