"""What a folder of the library peft says before its weights are read."""

import json

import numpy as np
import pytest

from llm_jax.adapters import lora
from llm_jax.hf import peft, safetensors

PIECES = lora.Adapter().ported().pieces


def folder_of(path, said, **shapes):
  """A folder with a config and arrays of these shapes."""
  path.mkdir()
  (path / peft.CONFIG).write_text(json.dumps(said))
  arrays = {
    f'base_model.model.{name}': np.zeros(shape, np.float32) for name, shape in shapes.items()
  }
  held = {name: (array.dtype, array.shape) for name, array in arrays.items()}
  safetensors.write(str(path / peft.WEIGHTS), held, arrays.__getitem__)
  return path


def test_a_folder_is_known_by_its_config(tmp_path):
  assert not peft.is_folder(tmp_path)
  folder = folder_of(tmp_path / 'a', dict(peft_type='LORA'))
  assert peft.is_folder(folder) and peft.read_config(folder) == dict(peft_type='LORA')
  (folder / peft.WEIGHTS).unlink()
  with pytest.raises(ValueError, match='holds no adapter_model.safetensors; save it by peft'):
    peft.read_config(folder)
  (folder / peft.CONFIG).write_text('{}')
  with pytest.raises(ValueError, match='must name its peft_type'):
    peft.read_config(folder)


def test_a_base_is_found_from_here_or_from_the_adapter(tmp_path):
  (tmp_path / 'base').mkdir()
  (tmp_path / 'base' / 'config.json').write_text('{"model_type": "bert"}')
  said = dict(peft_type='LORA', base_model_name_or_path='../base')
  folder = folder_of(tmp_path / 'a', said)
  assert peft.base(folder) == str(tmp_path / 'base')
  for number, name in enumerate(('bert-base-uncased', None)):
    other = folder_of(tmp_path / f'b{number}', said | dict(base_model_name_or_path=name))
    with pytest.raises(ValueError, match='is no Hugging Face folder here; write the path'):
      peft.base(other)


def test_rank_and_outputs_are_those_of_the_arrays(tmp_path):
  one = {'h.c.lora_A.weight': (3, 8), 'h.c.lora_B.weight': (6, 3)}
  folder = folder_of(tmp_path / 'a', dict(peft_type='LORA'), **one, **{'score.weight': (5, 8)})
  assert peft.rank(folder, PIECES) == 3 and peft.outputs(folder) == 5
  two = {name.replace('h.c', 'h.d'): (4, 4) for name in one}
  folder = folder_of(tmp_path / 'b', dict(peft_type='LORA'), **one, **two)
  assert peft.outputs(folder) is None
  with pytest.raises(ValueError, match='matrices of the ranks 3, 4, and an adapter here has one'):
    peft.rank(folder, PIECES)
