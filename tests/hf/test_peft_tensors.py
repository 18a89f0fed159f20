"""Tensors beside the maps of a base, and prompts: by brute force, without the library peft."""

import json

import numpy as np
import pytest

from llm_jax.adapters import adalora, ia3, prefix
from llm_jax.core.params import LAYERS, Info
from llm_jax.hf import peft, peft_tensors, safetensors, writing
from llm_jax.hf.tensors import Location, Tensor

RNG = np.random.default_rng(0)
KERNEL = Info(('embed', 'heads', 'head_dim'), inputs=(0,))


def drawn(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def folder_of(path, arrays, **said):
  path.mkdir()
  (path / peft.CONFIG).write_text(json.dumps(said))
  arrays = {f'base_model.model.{name}': x for name, x in arrays.items()}
  shapes = {name: (x.dtype, x.shape) for name, x in arrays.items()}
  safetensors.write(str(path / peft.WEIGHTS), shapes, arrays.__getitem__)
  return path


def test_ranks_that_were_taken_out_are_zeros(tmp_path):
  """Whether the folder still has them or not; of one map nothing is left."""
  pieces = adalora.Adapter(steps=9).ported().pieces
  whole = {'m.lora_A': drawn(4, 5), 'm.lora_B': drawn(6, 4), 'm.lora_E': drawn(4, 1)}
  kept = [True, False, False, True]
  left = {
    'm.lora_A': whole['m.lora_A'][kept],
    'm.lora_B': whole['m.lora_B'][:, kept],
    'm.lora_E': whole['m.lora_E'][kept],
  }
  none = {'n.lora_A': drawn(0, 5), 'n.lora_B': drawn(6, 0), 'n.lora_E': drawn(0, 1)}
  pattern = {'m.lora_E': kept, 'n.lora_E': [False] * 4}
  for number, arrays in enumerate((whole | none, left | none)):
    path = folder_of(tmp_path / str(number), arrays, rank_pattern=pattern)
    found = peft_tensors.read(path, pieces)
    mask = np.array(kept)
    a, b, e = (found.view(f'base_model.model.m.lora_{x}') for x in 'ABE')
    np.testing.assert_array_equal(a, whole['m.lora_A'] * mask[:, None])
    np.testing.assert_array_equal(b, whole['m.lora_B'] * mask)
    np.testing.assert_array_equal(e, whole['m.lora_E'] * mask[:, None])
    assert not np.any(found.view('base_model.model.n.lora_A'))
    assert peft.rank(path, pieces) == 4
  path = folder_of(tmp_path / 'wrong', left, rank_pattern={'m.lora_E': [True, True, True, False]})
  with pytest.raises(ValueError, match=r'm.lora_A has 2 ranks, and rank_pattern .* keeps 3 of 4'):
    peft_tensors.read(path, pieces)
  path = folder_of(tmp_path / 'lost', none, rank_pattern=pattern)
  with pytest.raises(ValueError, match=r'has no base_model.model.m.lora_A, of which'):
    peft_tensors.read(path, pieces)


@pytest.mark.parametrize('stacked', [True, False])
def test_a_prompt_is_all_layers(stacked):
  """[P, layers of keys and values], whether the layers are stacked, here in two groups, or not."""
  P, L, K, H = 3, 4, 2, 5
  piece = prefix.Adapter(P).ported().prompt
  theirs = drawn(P, L * 2 * K * H)
  names = (None, None, 'kv_heads', 'head_dim')
  if stacked:
    infos = {f'{g}/prefix': Info((LAYERS, *names), layer=g, period=2) for g in range(2)}
    shapes = {path: (2, P, 2, K, H) for path in infos}
  else:
    infos = {f'{g}/prefix': Info(names, layer=g) for g in range(L)}
    shapes = {path: (P, 2, K, H) for path in infos}
  assert peft_tensors.prompt_shape(piece, shapes, infos) == theirs.shape
  found = {path: peft_tensors.of_prompt(theirs, piece, path, shapes, infos) for path in infos}
  layer = theirs.reshape(P, L, 2, K, H)[:, 3]
  np.testing.assert_array_equal(found['1/prefix'][1] if stacked else found['3/prefix'], layer)
  np.testing.assert_array_equal(peft_tensors.prompt(piece, found, infos), theirs)


def test_what_is_one_tensor_there_has_one_vector_for_its_inputs():
  """And one way to be adapted."""
  paths = tuple(f'm/{name}/kernel' for name in ('query', 'key', 'value'))
  tensor = Tensor('qkv.weight', '(SNH)D->DNH', paths)
  sources = {path: (path, None) for path in paths}
  bodies = {
    'qkv.weight': writing.Piece(Location(tensor, paths[0], ('qkv.weight',), False), sources)
  }
  infos, pieces = dict.fromkeys(paths, KERNEL), ia3.Adapter().ported().pieces
  outputs = {'m/key/ia3_output': drawn(2, 3), 'm/value/ia3_output': drawn(2, 3)}
  arrays = lambda values: dict(
    pair
    for name, group in peft_tensors.groups(bodies, pieces, values, infos)
    for pair in group.arrays(name, values, 1, np.float32)
  )
  (vector,) = arrays(outputs).values()  # the queries are as they were
  expected = [np.ones(6), *(x.reshape(-1) for x in outputs.values())]
  np.testing.assert_array_equal(vector, np.concatenate(expected)[:, None])
  inputs = {f'm/{name}/ia3_input': np.arange(4.0) for name in ('query', 'key', 'value')}
  (vector,) = arrays(inputs).values()
  np.testing.assert_array_equal(vector, np.arange(4.0)[None])
  with pytest.raises(ValueError, match='peft has one .ia3_l for their inputs, where each has its'):
    arrays(inputs | {'m/key/ia3_input': np.zeros(4)})
  with pytest.raises(ValueError, match='and only some of them are adapted; --export=merged'):
    arrays({'m/key/ia3_input': np.zeros(4)})
  with pytest.raises(ValueError, match='is adapted by outputs and by inputs, and in peft by one'):
    arrays(inputs | outputs)
