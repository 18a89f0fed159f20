"""The safetensors format: named arrays in one file, or in several with an index. Reading executes
nothing, unlike pickle.

A file is 8 bytes, the length N of the header as little-endian integer; N bytes of JSON, {name:
{"dtype", "shape", "data_offsets"}} and "__metadata__" (a dictionary of strings); then the arrays,
little-endian, row-major, one after the other without holes. A folder holds `model.safetensors`, or
shards named by the "weight_map" of `model.safetensors.index.json`. (Format:
huggingface.co/docs/safetensors.)

What a header says is checked before anything of it is used; a wrong one is a ValueError that names
the file.
"""

import collections
import contextlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
  name: np.dtype(dtype)
  for name, dtype in {
    'F64': '<f8',
    'F32': '<f4',
    'F16': '<f2',
    'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn,
    'F8_E5M2': ml_dtypes.float8_e5m2,
    'I64': '<i8',
    'I32': '<i4',
    'I16': '<i2',
    'I8': 'i1',
    'U64': '<u8',
    'U32': '<u4',
    'U16': '<u2',
    'U8': 'u1',
    'BOOL': '?',
  }.items()
}
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10**9
_LONGEST_HEADER = 10**8  # bytes, as in the reference implementation

Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class Entry(NamedTuple):
  """One array: its type and shape, and which bytes of which file it is."""

  dtype: np.dtype
  shape: tuple[int, ...]
  path: str
  data: mmap.mmap | None
  start: int


class Tensors:
  """The arrays of a file or folder by name; their bytes are read when they are touched."""

  def __init__(self, entries: Mapping[str, Entry]):
    self._entries = dict(entries)

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __contains__(self, name: str) -> bool:
    return name in self._entries

  def __len__(self) -> int:
    return len(self._entries)

  def __getitem__(self, name: str) -> Entry:
    """Type, shape and place of one array."""
    return self._entries[name]

  def view(self, name: str) -> np.ndarray:
    """The array `name`, read-only and memory-mapped: it takes no memory of its own."""
    entry = self._entries[name]
    count = math.prod(entry.shape)
    flat = (
      np.frombuffer(entry.data, entry.dtype, count, entry.start)
      if count
      else np.zeros(0, entry.dtype)
    )
    return flat.reshape(entry.shape)


def read(path: str) -> Tensors:
  """The arrays of one file.

  Raises:
    ValueError: the file is cut off, or its header is not what the format wants.
  """
  with open(path, 'rb') as file:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > size - 8:
      raise ValueError(
        f'{path}: the file ends within its header ({size} bytes); it was cut off, fetch it again.'
      )
    if length > _LONGEST_HEADER:
      raise ValueError(
        f'{path}: a header of {length} bytes is longer than the format allows, {_LONGEST_HEADER}.'
      )
    header = _header(path, file.read(length))
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  entries = {name: _entry(path, name, said, data, 8 + length) for name, said in header.items()}
  end = 8 + length
  for name, entry in sorted(
    entries.items(), key=lambda item: (item[1].start, math.prod(item[1].shape))
  ):
    if entry.start != end:
      raise ValueError(
        f'{path}: the bytes of {name!r} '
        f'{"overlap those before" if entry.start < end else "leave a hole before"}; '
        'the header is wrong.'
      )
    end += math.prod(entry.shape) * entry.dtype.itemsize
  if end != size:
    said = 'it was cut off, fetch it again' if end > size else 'the header is wrong'
    raise ValueError(f'{path}: the arrays end at byte {end} and the file at byte {size}; {said}.')
  return Tensors(entries)


def read_folder(directory: str) -> Tensors:
  """The arrays of a folder, from `model.safetensors` or from the shards that its index names.

  Raises:
    ValueError: neither is there; a shard is missing, or does not hold what the index says; whatever
      `read` raises.
  """
  single, index = (os.path.join(directory, name) for name in (SINGLE, INDEX))
  if os.path.exists(single):
    return read(single)
  if not os.path.exists(index):
    raise ValueError(f'{directory} holds neither {SINGLE} nor {INDEX}.')
  where = _weight_map(index)
  entries: dict[str, Entry] = {}
  for shard in sorted(set(where.values())):
    path = os.path.join(directory, shard)
    if not os.path.exists(path):
      raise ValueError(f'{index} names the shard {shard}, which is not there; fetch it again.')
    found = read(path)
    twice = [name for name in found if name in entries]
    if twice:
      raise ValueError(f'{path} and {entries[twice[0]].path} both hold {twice[0]!r}.')
    lacking = [name for name, file in where.items() if file == shard and name not in found]
    if lacking:
      raise ValueError(f'{index} says that {shard} holds {lacking[0]!r}; it does not.')
    entries |= {name: found[name] for name in found}
  return Tensors(entries)


def write(path: str, tensors: Shapes, produce: Callable[[str], np.ndarray]) -> None:
  """Writes one file, whole or not at all.

  Args:
    path: the file.
    tensors: type and shape of each array, in the order in which they are written.
    produce: makes the array of a name; called once for each, one at a time.

  Raises:
    ValueError: `produce` gave another type or shape.
  """
  codes = {dtype: code for code, dtype in DTYPES.items()}
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, (dtype, shape) in tensors.items():
    start, end = end, end + _bytes(dtype, shape)
    header[name] = {
      'dtype': codes[np.dtype(dtype)],
      'shape': list(shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  partial = f'{path}.partial'
  try:
    with open(partial, 'wb') as file:
      file.write(len(text).to_bytes(8, 'little') + text)
      for name, (dtype, shape) in tensors.items():
        array = produce(name)
        if array.dtype != dtype or array.shape != tuple(shape):
          raise ValueError(
            f'{path}: {name!r} was announced as {np.dtype(dtype)}{list(shape)} and became '
            f'{array.dtype}{list(array.shape)}.'
          )
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
    raise


def write_folder(
  directory: str,
  tensors: Shapes,
  produce: Callable[[str], np.ndarray],
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes `model.safetensors`, or shards of at most `shard_bytes` (but for larger arrays) and
  their index, the index last.
  """
  shards: list[dict[str, Any]] = [{}]
  held = 0
  for name, (dtype, shape) in tensors.items():
    size = _bytes(dtype, shape)
    if shards[-1] and held + size > shard_bytes:
      shards.append({})
      held = 0
    shards[-1][name] = (dtype, shape)
    held += size
  if len(shards) == 1:
    write(os.path.join(directory, SINGLE), tensors, produce)
    return
  files = [f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
  for file, shard in zip(files, shards, strict=True):
    write(os.path.join(directory, file), shard, produce)
  index = {
    'metadata': {'total_size': sum(_bytes(*said) for said in tensors.values())},
    'weight_map': {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
  }
  with open(os.path.join(directory, INDEX), 'w') as file:
    json.dump(index, file, indent=2)


def read_json(path: str) -> Any:
  """What a JSON file holds; a ValueError that names the file where it is broken, or says a name
  twice.
  """
  with open(path, 'rb') as file:
    return _parse(path, file.read())


def _header(path: str, text: bytes) -> dict[str, Any]:
  if not text.startswith(b'{'):
    raise ValueError(f'{path}: the header does not begin with {{; this is no safetensors file.')
  header = _parse(path, text)
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise ValueError(f'{path}: __metadata__ in the header must be a dictionary of strings.')
  return header


def _parse(path: str, text: bytes) -> Any:
  def once(pairs):
    for name, count in collections.Counter(name for name, _ in pairs).items():
      name.encode()  # raises for half a surrogate pair
      if count > 1:
        raise ValueError(f'{name!r} stands there twice')
    return dict(pairs)

  def number(constant):
    raise ValueError(f'{constant} is no JSON')

  try:
    return json.loads(text.decode(), object_pairs_hook=once, parse_constant=number)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: broken JSON: {error}.') from None


def _entry(path: str, name: str, said: Any, data: mmap.mmap, offset: int) -> Entry:
  """The entry of a header, checked in itself: neighbours are another matter."""
  where = f'{path}: {name!r} in the header'
  if not isinstance(said, dict) or set(said) != {'dtype', 'shape', 'data_offsets'}:
    raise ValueError(f'{where} must have dtype, shape and data_offsets.')
  if not isinstance(said['dtype'], str) or said['dtype'] not in DTYPES:
    raise ValueError(
      f'{where} has the type {said["dtype"]!r}, which is not known; known: {", ".join(DTYPES)}.'
    )
  shape, offsets = said['shape'], said['data_offsets']
  for numbers in (shape, offsets):
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
      raise ValueError(
        f'{where}: shape and data_offsets must be lists of whole numbers, not {numbers!r}.'
      )
  dtype = DTYPES[said['dtype']]
  if len(offsets) != 2 or offsets[1] - offsets[0] != _bytes(dtype, shape):
    raise ValueError(
      f'{where}: {said["dtype"]}{shape} takes {_bytes(dtype, shape)} bytes, and '
      f'data_offsets={offsets}.'
    )
  if len(shape) > 32:
    raise ValueError(f'{where} has {len(shape)} dimensions; at most 32 can be read.')
  return Entry(dtype, tuple(shape), path, data, offset + offsets[0])


def _weight_map(index: str) -> dict[str, str]:
  said = read_json(index)
  where = said.get('weight_map') if isinstance(said, dict) else None
  if (
    not isinstance(where, dict)
    or not where
    or not all(isinstance(file, str) for file in where.values())
  ):
    raise ValueError(f'{index} must have a "weight_map" that gives the file of each array.')
  for file in where.values():
    if os.path.basename(file) != file or not file.endswith('.safetensors'):
      raise ValueError(
        f'{index}: the shard {file!r} must be a .safetensors file of the same folder.'
      )
  return where


def _bytes(dtype: Any, shape: Any) -> int:
  return math.prod(shape) * np.dtype(dtype).itemsize
