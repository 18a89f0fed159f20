"""Our reader and writer against the reference implementation: of a damaged file we read what it
reads, or raise a ValueError.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.hf import safetensors

judge = pytest.importorskip('safetensors')
pytestmark = pytest.mark.parity

ARRAYS = {
  'a': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b': np.arange(3, dtype=np.float16),
  'c': np.zeros((2, 0), np.int64),
  'd': np.arange(4, dtype=np.uint8),
  'e': np.arange(2.0),  # at an offset that its size does not divide
}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp('whole') / 'x.safetensors'
  safetensors.write(
    str(path),
    {name: (array.dtype, array.shape) for name, array in ARRAYS.items()},
    ARRAYS.__getitem__,
  )
  return path


def ours(path):
  """Type, shape and bytes of each array; None where the file is refused."""
  try:
    found = safetensors.read(str(path))
    return {
      name: (found[name].dtype, found[name].shape, found.view(name).tobytes()) for name in found
    }
  except ValueError:
    return None


def theirs(content):
  try:
    found = judge.deserialize(content)
  except judge.SafetensorError:
    return None
  return {
    name: (safetensors.DTYPES.get(x['dtype']), tuple(x['shape']), bytes(x['data']))
    for name, x in found
  }


def check(path, content):
  path.write_bytes(content)
  found = ours(path)
  assert found is None or found == theirs(content)


def test_each_reads_what_the_other_wrote(whole, tmp_path):
  assert ours(whole) == theirs(whole.read_bytes()) and set(ours(whole)) == set(ARRAYS)
  with judge.safe_open(whole, 'np') as file:
    assert file.metadata() == {'format': 'pt'}
    for name, array in ARRAYS.items():
      np.testing.assert_array_equal(file.get_tensor(name), array)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(offset=st.integers(0, 10**6), value=st.integers(1, 255))
def test_a_changed_byte(whole, tmp_path_factory, offset, value):
  content = bytearray(whole.read_bytes())
  end = 8 + int.from_bytes(content[:8], 'little')
  content[offset % end] ^= value
  check(tmp_path_factory.getbasetemp() / 'changed', bytes(content))


NUMBERS = st.one_of(
  st.integers(-1, 30), st.sampled_from([2**31, 2**63, 2**64, 10**400, 1.0, True, None, '2'])
)
ENTRY = st.fixed_dictionaries(
  {
    'dtype': st.sampled_from(['F32', 'F16', 'U8', 'BOOL', 'F31', 1]),
    'shape': st.lists(NUMBERS, max_size=3),
    'data_offsets': st.lists(NUMBERS, min_size=1, max_size=3),
  }
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
  header=st.dictionaries(
    st.sampled_from(['a', 'b', '', '__metadata__']), ENTRY | NUMBERS, max_size=3
  ),
  size=st.integers(0, 30),
  tail=st.sampled_from(['', ' ', '}', '\n', '\x00']),
)
def test_made_up_headers(tmp_path_factory, header, size, tail):
  text = (json.dumps(header) + tail).encode()
  check(
    tmp_path_factory.getbasetemp() / 'made', len(text).to_bytes(8, 'little') + text + bytes(size)
  )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 8), min_size=2, max_size=4), shift=st.integers(-1, 1))
def test_offsets_that_lie(tmp_path_factory, cuts, shift):
  """Neighbours that fit, overlap or leave holes: what the judge takes is taken, no more."""
  header, end = {}, 0
  for i, cut in enumerate(cuts):
    start = end + (shift if i == 1 else 0)
    end = start + cut
    header[f'w{i}'] = {'dtype': 'U8', 'shape': [cut], 'data_offsets': [start, end]}
  text = json.dumps(header).encode()
  content = len(text).to_bytes(8, 'little') + text + bytes(sum(cuts))
  path = tmp_path_factory.getbasetemp() / 'offsets'
  path.write_bytes(content)
  assert ours(path) == theirs(content)
