"""The safetensors format: named arrays in one file, or in several with an index. Reading executes
nothing, unlike pickle.

A file is 8 bytes, the length N of the header as a little-endian integer; N bytes of JSON, {name:
{"dtype", "shape", "data_offsets"}} and "__metadata__" (a dictionary of strings); then the arrays,
little-endian, row-major, one after the other without holes. A folder holds `model.safetensors`, or
shards named by the "weight_map" of `model.safetensors.index.json`. (Format:
huggingface.co/docs/safetensors.)

What a header says is checked before anything of it is used; a wrong one is a ValueError that names
the file.

The library `safetensors` (0.8) reads and writes the same files, and tests hold this module to it.
It would be one more dependency of the plain install, and leaves the following to its user:

- Reading: it copies a whole array, or a slice along its axes. A view of the mapped file can be
  reshaped, transposed and cut first (`tensors.Tensor.part`), so that only the part of one device is
  copied, into the array and the type in which the device gets it.
- Writing: it takes all arrays of a file at once. Here each is made when its bytes are due, so that
  one at a time is in memory, gathered from all hosts.
- Folders: it knows no shards and no index, and its errors do not name the file.
- Types: with NumPy it has no float8.

It has what is not here: compiled code, other ways to read than mapping, torch and other frameworks.
"""

import collections
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llm_jax.core import files

DTYPES = {
  'F64': np.dtype('<f8'),
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'I64': np.dtype('<i8'),
  'I32': np.dtype('<i4'),
  'I16': np.dtype('<i2'),
  'I8': np.dtype('i1'),
  'U64': np.dtype('<u8'),
  'U32': np.dtype('<u4'),
  'U16': np.dtype('<u2'),
  'U8': np.dtype('u1'),
  'BOOL': np.dtype('?'),
}
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10**9  # the most that one file of a folder holds, as transformers has it
_LONGEST_HEADER = 10**8  # bytes, as in the reference implementation
_MOST_AXES = 32

Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class Entry(NamedTuple):
  """One array: its type and shape, and which bytes it is, of a file or of what stands for it."""

  dtype: np.dtype
  shape: tuple[int, ...]
  path: str
  data: mmap.mmap | bytes
  start: int

  @property
  def end(self) -> int:
    """The byte after its last one."""
    return self.start + _bytes(self.dtype, self.shape)


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
    """Type, shape and bytes of one array."""
    return self._entries[name]

  def view(self, name: str) -> np.ndarray:
    """The array `name`, read-only and memory-mapped: it takes no memory of its own."""
    entry = self._entries[name]
    count = math.prod(entry.shape)
    if not count:
      return np.zeros(entry.shape, entry.dtype)
    return np.frombuffer(entry.data, entry.dtype, count, entry.start).reshape(entry.shape)

  def replaced(self, arrays: Mapping[str, np.ndarray]) -> 'Tensors':
    """The same, with these in place of some."""
    paths = {name: self._entries[name].path for name in arrays}
    new = {name: Entry(x.dtype, x.shape, paths[name], x.tobytes(), 0) for name, x in arrays.items()}
    return Tensors(self._entries | new)


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
  first = 8 + length
  entries = {name: _entry(path, name, values, data, first) for name, values in header.items()}
  _check_neighbours(path, entries, first, size)
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
  header = _header_of(tensors)
  with files.whole_file(path, 'wb') as file:
    file.write(len(header).to_bytes(8, 'little') + header)
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


def write_folder(directory: str, tensors: Shapes, produce: Callable[[str], np.ndarray]) -> None:
  """Writes `model.safetensors`, or shards of at most `SHARD_BYTES` (but for larger arrays) and
  their index, the index last.
  """
  shards = _shards(tensors)
  if len(shards) == 1:
    write(os.path.join(directory, SINGLE), tensors, produce)
    return
  where: dict[str, str] = {}
  for i, shard in enumerate(shards, start=1):
    name = f'model-{i:05d}-of-{len(shards):05d}.safetensors'
    write(os.path.join(directory, name), shard, produce)
    where |= dict.fromkeys(shard, name)
  total = sum(_bytes(dtype, shape) for dtype, shape in tensors.values())
  with open(os.path.join(directory, INDEX), 'w') as file:
    json.dump({'metadata': {'total_size': total}, 'weight_map': where}, file, indent=2)


def read_json(path: str) -> Any:
  """What a JSON file holds; a ValueError that names the file where it is broken, or holds a name
  twice.
  """
  with open(path, 'rb') as file:
    return _parse(path, file.read())


def _header_of(tensors: Shapes) -> bytes:
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
  return text + b' ' * (-len(text) % 8)


def _shards(tensors: Shapes) -> list[dict[str, Any]]:
  shards: list[dict[str, Any]] = [{}]
  held = 0
  for name, (dtype, shape) in tensors.items():
    size = _bytes(dtype, shape)
    if shards[-1] and held + size > SHARD_BYTES:
      shards.append({})
      held = 0
    shards[-1][name] = (dtype, shape)
    held += size
  return shards


def _header(path: str, text: bytes) -> dict[str, Any]:
  if not text.startswith(b'{'):
    raise ValueError(f'{path}: the header does not begin with {{; this is no safetensors file.')
  header = _parse(path, text)
  metadata = header.pop('__metadata__', {})
  strings = isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values())
  if not strings:
    raise ValueError(f'{path}: __metadata__ in the header must be a dictionary of strings.')
  return header


def _parse(path: str, text: bytes) -> Any:
  def once(pairs):
    for name, count in collections.Counter(name for name, _ in pairs).items():
      name.encode()  # raises for half a surrogate pair
      if count > 1:
        raise ValueError(f'{name!r} is there twice')
    return dict(pairs)

  def number(constant):
    raise ValueError(f'{constant} is no JSON')

  try:
    return json.loads(text.decode(), object_pairs_hook=once, parse_constant=number)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: broken JSON: {error}.') from None


def _entry(path: str, name: str, values: Any, data: mmap.mmap, first: int) -> Entry:
  """The entry of a header, checked by itself; `_check_neighbours` checks them together."""
  where = f'{path}: {name!r} in the header'
  if not isinstance(values, dict) or set(values) != {'dtype', 'shape', 'data_offsets'}:
    raise ValueError(f'{where} must have dtype, shape and data_offsets.')
  code, shape, offsets = values['dtype'], values['shape'], values['data_offsets']
  if not isinstance(code, str) or code not in DTYPES:
    raise ValueError(
      f'{where} has the type {code!r}, which is not known; known: {", ".join(DTYPES)}.'
    )
  for numbers in (shape, offsets):
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
      raise ValueError(
        f'{where}: shape and data_offsets must be lists of whole numbers, not {numbers!r}.'
      )
  size = _bytes(DTYPES[code], shape)
  if len(offsets) != 2 or offsets[1] - offsets[0] != size:
    raise ValueError(f'{where}: {code}{shape} takes {size} bytes, and data_offsets={offsets}.')
  if len(shape) > _MOST_AXES:
    raise ValueError(f'{where} has {len(shape)} dimensions; at most {_MOST_AXES} can be read.')
  return Entry(DTYPES[code], tuple(shape), path, data, first + offsets[0])


def _check_neighbours(path: str, entries: Mapping[str, Entry], first: int, size: int) -> None:
  """Raises ValueError unless the arrays fill the bytes from `first` to `size`, none twice."""
  end = first
  for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
    if entry.start != end:
      fault = 'overlap those before' if entry.start < end else 'leave a hole before'
      raise ValueError(f'{path}: the bytes of {name!r} {fault}; the header is wrong.')
    end = entry.end
  if end != size:
    fault = 'it was cut off, fetch it again' if end > size else 'the header is wrong'
    raise ValueError(f'{path}: the arrays end at byte {end} and the file at byte {size}; {fault}.')


def _weight_map(index: str) -> dict[str, str]:
  content = read_json(index)
  where = content.get('weight_map') if isinstance(content, dict) else None
  named = isinstance(where, dict) and all(isinstance(file, str) for file in where.values())
  if not where or not named:
    raise ValueError(f'{index} must have a "weight_map" that gives the file of each array.')
  for file in where.values():
    if os.path.basename(file) != file or not file.endswith('.safetensors'):
      raise ValueError(
        f'{index}: the shard {file!r} must be a .safetensors file of the same folder.'
      )
  return where


def _bytes(dtype: Any, shape: Any) -> int:
  return math.prod(shape) * np.dtype(dtype).itemsize
