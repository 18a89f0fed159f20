"""The file format: what is written is read again, what is not right is refused by name, and nothing
is half written.
"""

import json

import ml_dtypes
import numpy as np
import pytest

from llm_jax.hf import safetensors

RNG = np.random.default_rng(0)
ARRAYS = {
  'a': RNG.normal(size=(3, 4)).astype(np.float32),
  'b.half': RNG.normal(size=(5,)).astype(ml_dtypes.bfloat16),
  'c': np.array(2.5),
  'empty': np.zeros((0, 3), np.float16),
  'flags': np.array([[True], [False]]),
  'whole': np.arange(-3, 3, dtype=np.int8),
}


def shapes(arrays):
  return {name: (array.dtype, array.shape) for name, array in arrays.items()}


def write(path, arrays=ARRAYS):
  safetensors.write(str(path), shapes(arrays), arrays.__getitem__)
  return path


def in_shards(folder, monkeypatch):
  """A folder of two shards."""
  monkeypatch.setattr(safetensors, 'SHARD_BYTES', 30)
  safetensors.write_folder(str(folder), shapes(ARRAYS), ARRAYS.__getitem__)


def raw(path, header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)
  return str(path)


def one(**changes):
  return {'w': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]} | changes}


def test_what_is_written_is_read(tmp_path):
  found = safetensors.read(str(write(tmp_path / 'x')))
  assert list(found) == list(ARRAYS) and len(found) == 6 and 'a' in found and 'd' not in found
  for name, array in ARRAYS.items():
    view = found.view(name)
    assert (
      (found[name].dtype, found[name].shape)
      == (array.dtype, array.shape)
      == (view.dtype, view.shape)
    )
    np.testing.assert_array_equal(view, array)
    assert not (view.size and view.flags.writeable)
  assert [file.name for file in tmp_path.iterdir()] == ['x']


def test_a_view_reads_the_file_when_it_is_touched(tmp_path):
  path = write(tmp_path / 'x', {'a': ARRAYS['a']})
  view = safetensors.read(str(path)).view('a')
  with open(path, 'r+b') as file:
    file.seek(-4, 2)
    file.write(np.float32(7).tobytes())
  assert view[-1, -1] == 7


@pytest.mark.parametrize(
  ('header', 'data', 'message'),
  [
    (b'[]', b'', 'does not begin with {'),
    (b'{"w": ', b'', 'broken JSON'),
    (b'{"w": 1, "w": 2}', b'', "'w' is there twice"),
    (b'{"w": NaN}', b'', 'NaN is no JSON'),
    (b'{"\\ud800": 1}', b'', 'broken JSON'),
    (b'{"w": ' + b'[' * 100_000, b'', 'broken JSON'),
    ({'w': [1]}, b'', "'w' in the header must have dtype, shape and data_offsets"),
    ({'__metadata__': {'format': 1}}, b'', '__metadata__'),
    (
      one(dtype='F33'),
      bytes(8),
      "'w' in the header has the type 'F33', which is not known; known: F64, F32",
    ),
    (one(shape=[2.0]), bytes(8), 'lists of whole numbers'),
    (one(shape=[True, 2]), bytes(8), 'lists of whole numbers'),
    (one(shape=[-2], data_offsets=[0, 8]), bytes(8), 'lists of whole numbers'),
    (
      one(shape=[3]),
      bytes(8),
      r"'w' in the header: F32\[3\] takes 12 bytes, and data_offsets=\[0, 8\]",
    ),
    (one(shape=[0, 2**63], data_offsets=[0, 0]), b'', 'lists of whole numbers'),
    (one(shape=[1] * 40, data_offsets=[0, 4]), bytes(4), 'at most 32'),
    (one(data_offsets=[8, 0]), bytes(8), 'takes 8 bytes'),
    (one(data_offsets=[0, 8, 8]), bytes(8), 'takes 8 bytes'),
    (one(), bytes(7), 'end at byte .* and the file at byte .*; it was cut off'),
    (one(), bytes(9), 'end at byte .* and the file at byte .*; the header is wrong'),
    (one(data_offsets=[1, 9]), bytes(9), "bytes of 'w' leave a hole before"),
    (one() | {'v': one(data_offsets=[4, 12])['w']}, bytes(12), "bytes of 'v' overlap those before"),
  ],
)
def test_a_wrong_header_is_refused(tmp_path, header, data, message):
  path = raw(tmp_path / 'x.safetensors', header, data)
  with pytest.raises(ValueError, match=message) as error:
    safetensors.read(path)
  assert path in str(error.value)


@pytest.mark.parametrize(
  'content', [b'', b'\x01\x02', (9).to_bytes(8, 'little') + b'{}', (2**40).to_bytes(8, 'little')]
)
def test_a_file_shorter_than_its_header_is_refused(tmp_path, content):
  (tmp_path / 'x').write_bytes(content)
  with pytest.raises(ValueError, match='x: the file ends within its header .* it was cut off'):
    safetensors.read(str(tmp_path / 'x'))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
  whole = write(tmp_path / 'x').read_bytes()
  for length in range(len(whole)):
    (tmp_path / 'y').write_bytes(whole[:length])
    with pytest.raises(ValueError, match='y: '):
      safetensors.read(str(tmp_path / 'y'))


def test_shards_and_their_index(tmp_path, monkeypatch):
  in_shards(tmp_path, monkeypatch)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata'] == {'total_size': 48 + 10 + 8 + 0 + 2 + 6} and set(
    index['weight_map']
  ) == set(ARRAYS)
  # The first array is larger than a shard may be and has one for itself; the others fit into one.
  assert sorted(file.name for file in tmp_path.glob('*.safetensors')) == [
    f'model-0000{i}-of-00002.safetensors' for i in (1, 2)
  ]
  found = safetensors.read_folder(str(tmp_path))
  assert set(found) == set(ARRAYS)
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(found.view(name), array)


def test_one_file_where_it_is_enough(tmp_path):
  safetensors.write_folder(str(tmp_path), shapes(ARRAYS), ARRAYS.__getitem__)
  assert [file.name for file in tmp_path.iterdir()] == ['model.safetensors']
  assert set(safetensors.read_folder(str(tmp_path))) == set(ARRAYS)


def index_of(folder, monkeypatch, change):
  """A folder of two shards whose index is changed."""
  in_shards(folder, monkeypatch)
  path = folder / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  path.write_text(json.dumps(change(index)))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda index: (
        index | {'weight_map': index['weight_map'] | {'z': 'model-00003-of-00003.safetensors'}}
      ),
      'names the shard model-00003-of-00003.safetensors, which is not there',
    ),
    (
      lambda index: (
        index | {'weight_map': index['weight_map'] | {'z': 'model-00001-of-00002.safetensors'}}
      ),
      "says that model-00001-of-00002.safetensors holds 'z'; it does not",
    ),
    (
      lambda index: index | {'weight_map': {'a': '../x.safetensors'}},
      "shard '../x.safetensors' must be .* of the same folder",
    ),
    (lambda index: index | {'weight_map': {'a': 'model.bin'}}, "shard 'model.bin' must be"),
    (lambda index: index | {'weight_map': {'a': 1}}, 'must have a "weight_map"'),
    (lambda index: [], 'must have a "weight_map"'),
  ],
)
def test_a_wrong_index_is_refused(tmp_path, monkeypatch, change, message):
  index_of(tmp_path, monkeypatch, change)
  with pytest.raises(ValueError, match=message):
    safetensors.read_folder(str(tmp_path))


def test_shards_that_overlap_and_folders_without_weights_are_refused(tmp_path, monkeypatch):
  index_of(tmp_path, monkeypatch, lambda index: index)
  (tmp_path / 'model-00002-of-00002.safetensors').write_bytes(
    (tmp_path / 'model-00001-of-00002.safetensors').read_bytes()
  )
  with pytest.raises(ValueError, match="both hold 'a'"):
    safetensors.read_folder(str(tmp_path))
  with pytest.raises(ValueError, match='holds neither model.safetensors nor'):
    safetensors.read_folder(str(tmp_path / 'other'))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  def fails(name):
    if name == 'c':
      raise RuntimeError('no more')
    return ARRAYS[name]

  write(tmp_path / 'x', {'a': ARRAYS['a']})
  before = (tmp_path / 'x').read_bytes()
  with pytest.raises(RuntimeError, match='no more'):
    safetensors.write(str(tmp_path / 'x'), shapes(ARRAYS), fails)
  with pytest.raises(
    ValueError, match=r"x: 'a' was announced as float32\[3, 4\] and became float32\[4, 3\]"
  ):
    safetensors.write(str(tmp_path / 'x'), shapes(ARRAYS), lambda name: ARRAYS[name].T)
  assert [file.name for file in tmp_path.iterdir()] == ['x'] and (
    tmp_path / 'x'
  ).read_bytes() == before
