"""Folders of Hugging Face's: what is written is read again, what is refused and how, meshes,
memory, and damaged files.

That the numbers are those of transformers is shown in `parity/test_hf.py`. The mesh of eight
devices needs processes of its own (this file as a script).
"""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.hf import families, family, safetensors
from llm_jax.hf import folders as hf
from llm_jax.hf.tensors import POSITION, TOKEN
from llm_jax.models import decoder, encoder
from llm_jax.parallel import hosts, sharding

FAMILIES = families.known()
MODELS = {'encoder': encoder.Model, 'decoder': decoder.Model}


def folder(path, config):
  """A folder with a config.json, and a file of weights that holds nothing."""
  path.mkdir(exist_ok=True)
  (path / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
  safetensors.write(str(path / 'model.safetensors'), {}, {}.get)
  return path


def boxed_shapes(model):
  batch = {'tokens': jnp.zeros((1, 2), jnp.int32)}
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method=everything))
  return {'model': variables['params']}


def everything(model, batch):
  """Touches all parameters."""
  return model(batch).hidden, model.table()


def abstract(model):
  return tree.flatten(nn.unbox(boxed_shapes(model)))


def infos(model, params):
  """What each of these parameters is; what is no part of the model is a head's."""
  found = params_lib.infos(boxed_shapes(model))
  return {path: found.get(path, params_lib.Info((None,) * x.ndim)) for path, x in params.items()}


def random_params(model, extra=()):
  rng = np.random.default_rng(0)
  shapes = abstract(model) | dict(extra)
  return {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}


def head(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


LLAMA = decoder.Model(
  vocab_size=50,
  **decoder.VARIANTS['llama_tiny'] | dict(dim=16, layers=3, heads=4, mlp_dim=24, max_len=32),
)
BERT = encoder.Model(vocab_size=50, dim=16, layers=3, heads=2, mlp_dim=24, max_len=32)
MODERN = encoder.Model(
  vocab_size=50,
  **encoder.VARIANTS['modernbert_base']
  | dict(dim=16, layers=7, heads=2, mlp_dim=24, max_len=32, window=4),
)


def save(path, model, params, **options):
  name = 'decoder' if model.causal else 'encoder'
  return hf.save(path, FAMILIES, name, model, params, infos(model, params), **options)


def saved(path, model, params=None, **options):
  """A folder; the parameters that were written."""
  params = random_params(model) if params is None else params
  save(path, model, params, **options)
  return params


def model_type(path):
  return hf.read_config(path)['model_type']


def load(path, model, wanted=None):
  wanted = abstract(model) if wanted is None else wanted
  return hf.load(path, FAMILIES, wanted, infos(model, wanted))


def test_which_folders_are_known(tmp_path):
  assert not hf.is_folder(tmp_path) and not hf.is_folder(tmp_path / 'none')
  (tmp_path / 'config.json').write_text('{"steps": 3}')
  assert not hf.is_folder(tmp_path)
  assert hf.is_folder(folder(tmp_path / 'a', {'model_type': 'bert'}))
  assert hf.is_folder(folder(tmp_path / 'b', '{'))
  (tmp_path / 'c').mkdir()
  (tmp_path / 'c' / 'pytorch_model.bin').touch()
  assert hf.is_folder(tmp_path / 'c')


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ('{', 'config.json: broken JSON'),
    ('[]', 'config.json must name its model_type'),
    ('{"model_type": 3}', 'must name its'),
    (
      '{"model_type": "birt"}',
      r"model_type='birt' is not known \(did you mean 'bert'\?\); known: bert, roberta",
    ),
  ],
)
def test_broken_and_unknown_configs(config, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    hf.model_options(folder(tmp_path, config), FAMILIES)


def test_folders_that_are_not_whole(tmp_path):
  with pytest.raises(ValueError, match='holds no config.json'):
    hf.read_config(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
  neither = 'holds neither model.safetensors nor model.safetensors.index.json'
  with pytest.raises(ValueError, match=neither):
    hf.read_config(tmp_path)
  (tmp_path / 'pytorch_model.bin').touch()
  pickled = 'pytorch_model.bin, which could execute code .* safe_serialization=True'
  with pytest.raises(ValueError, match=pickled):
    hf.read_config(tmp_path)


def test_labels(tmp_path):
  config = {'model_type': 'bert'}
  assert hf.labels(folder(tmp_path, config)) is None
  config['architectures'] = ['BertForSequenceClassification']
  assert hf.labels(folder(tmp_path, config)) == ('LABEL_0', 'LABEL_1')
  names = {'1': 'no', '0': 'yes', '2': 'both'}
  assert hf.labels(folder(tmp_path, config | {'id2label': names})) == ('yes', 'no', 'both')
  with pytest.raises(ValueError, match='must name the classes 0, 1'):
    hf.labels(folder(tmp_path, config | {'id2label': {'1': 'no'}}))
  assert hf.labels(folder(tmp_path, config | {'num_labels': 3})) == (
    'LABEL_0',
    'LABEL_1',
    'LABEL_2',
  )
  numbers = {'no': 1, 'yes': 0}
  assert hf.labels(folder(tmp_path, config | {'label2id': numbers})) == ('yes', 'no')


@pytest.mark.parametrize(
  'model',
  [LLAMA, LLAMA.clone(tied=False), BERT, MODERN],
  ids=['llama', 'untied', 'bert', 'modernbert'],
)
def test_round_trip(model, tmp_path):
  params = saved(tmp_path / 'x', model)
  name, _ = FAMILIES[model_type(tmp_path / 'x')]
  options = hf.model_options(tmp_path / 'x', FAMILIES)
  assert options.pop('name') == name
  assert family.differences(model, MODELS[name](**options)) == []
  wanted = abstract(model)
  loaded = hf.load(tmp_path / 'x', FAMILIES, tree.nest(wanted), infos(model, wanted))
  assert loaded.new == () == loaded.unused and loaded.step is None
  assert loaded.params.keys() == params.keys()
  for path, value in params.items():
    np.testing.assert_array_equal(loaded.params[path], value)


@pytest.mark.parametrize(
  ('dtype', 'ours'),
  [('bfloat16', jnp.float32), ('float16', jnp.bfloat16), ('float64', jnp.float32)],
)
def test_types(dtype, ours, tmp_path):
  params = saved(tmp_path / 'x', LLAMA, dtype=dtype)
  wanted = {path: jax.ShapeDtypeStruct(leaf.shape, ours) for path, leaf in abstract(LLAMA).items()}
  for path, value in load(tmp_path / 'x', LLAMA, wanted).params.items():
    np.testing.assert_array_equal(value, params[path].astype(jnp.dtype(dtype)).astype(ours))
  with pytest.raises(ValueError, match="dtype='int8' must be one of float32"):
    saved(tmp_path / 'y', LLAMA, dtype='int8')


def no_view(self, name):
  raise AssertionError(f'{name} was read')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda t: t.pop('model.layers.1.self_attn.k_proj.weight'),
      'layers.1.self_attn.k_proj.weight is missing, which '
      'model/stack/layers/block/attention/key/kernel is made of',
    ),
    (
      lambda t: t.update({'model.norm.weight': np.zeros(17, np.float32)}),
      r'model.norm.weight of shape \[17\] does not fit model/final_norm/scale of shape \[16\]',
    ),
    (
      lambda t: t.update({'model.embed_tokens.weight': np.zeros((40, 16), np.float32)}),
      r'embed_tokens.weight of shape \[40, 16\] does not fit model/embedder/token/embedding of '
      r'shape \[50, 16\].*vocab',
    ),
    (
      lambda t: t.update({'model.layers.0.self_attn.q_proj.bias': np.zeros(16, np.float32)}),
      'model.layers.0.self_attn.q_proj.bias is a part of a layer for which this model has no',
    ),
    (
      lambda t: t.update({'model.layers.3.mlp.up_proj.weight': np.zeros((24, 16), np.float32)}),
      'layers.3.mlp.up_proj.weight is',
    ),
    (
      lambda t: t.update({'model.norm.weight': np.zeros(16, np.int32)}),
      'model.norm.weight is of type int32',
    ),
    (
      lambda t: t.update({'norm.weight': np.zeros(16, np.float32)}),
      'are two names of the same tensor',
    ),
  ],
)
def test_nothing_is_read_where_something_is_wrong(change, message, tmp_path, monkeypatch):
  saved(tmp_path / 'x', LLAMA)
  found = safetensors.read_folder(str(tmp_path / 'x'))
  tensors = {name: np.array(found.view(name)) for name in found}
  change(tensors)
  rewrite(tmp_path / 'x', tensors)
  monkeypatch.setattr(safetensors.Tensors, 'view', no_view)
  with pytest.raises(ValueError, match=message) as error:
    load(tmp_path / 'x', LLAMA)
  assert str(tmp_path) in str(error.value)


def rewrite(path, tensors):
  safetensors.write(
    str(path / 'model.safetensors'),
    {name: (x.dtype, x.shape) for name, x in tensors.items()},
    tensors.get,
  )


def test_a_tied_projection_must_be_the_table(tmp_path):
  params = saved(tmp_path / 'x', LLAMA)
  found = safetensors.read_folder(str(tmp_path / 'x'))
  tensors = {name: np.array(found.view(name)) for name in found}
  rewrite(tmp_path / 'x', tensors | {'lm_head.weight': tensors['model.embed_tokens.weight']})
  assert load(tmp_path / 'x', LLAMA).unused == ()
  rewrite(tmp_path / 'x', tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'] + 1})
  with pytest.raises(
    ValueError, match='lm_head.weight and model.embed_tokens.weight differ, and must be the same'
  ):
    load(tmp_path / 'x', LLAMA)
  # Without the table, its copy is as good.
  table = tensors.pop('model.embed_tokens.weight')
  rewrite(tmp_path / 'x', tensors | {'lm_head.weight': table})
  loaded = load(tmp_path / 'x', LLAMA)
  np.testing.assert_array_equal(loaded.params[TOKEN], params[TOKEN])


CLASSIFIER = {
  'heads_pooler/dense/kernel': head(16, 16),
  'heads_pooler/dense/bias': head(16),
  'heads_classifier/dense/kernel': head(16, 3),
  'heads_classifier/dense/bias': head(3),
}


def test_classes_and_left_over_heads(tmp_path, caplog):
  params = random_params(BERT, CLASSIFIER | {'heads_sop/dense/kernel': head(16, 2)})
  with pytest.raises(ValueError, match='2 names of classes for 3 outputs: a, b'):
    saved(tmp_path / 'x', BERT, params, classes=('a', 'b'))
  assert list(tmp_path.iterdir()) == []
  left = save(tmp_path / 'x', BERT, params, classes=('a', 'b', 'c'))
  assert left == ('heads_sop/dense/kernel',)
  assert 'heads_sop/dense/kernel has no tensor in a BertForSequenceClass' in caplog.text
  assert hf.labels(tmp_path / 'x') == ('a', 'b', 'c')
  one = params | {
    'heads_classifier/dense/kernel': np.zeros((16, 1)),
    'heads_classifier/dense/bias': np.zeros(1),
  }
  save(tmp_path / 'y', BERT, one, classes=('no', 'yes'))
  assert hf.labels(tmp_path / 'y') == ('yes',)
  wanted = abstract(BERT) | CLASSIFIER | {'heads_classifier/dense/kernel': head(16, 4)}
  message = r'classifier.weight of shape \[3, 16\] does not fit heads_classifier/dense/kernel'
  with pytest.raises(ValueError, match=message):
    load(tmp_path / 'x', BERT, wanted)


@pytest.mark.parametrize('model', [BERT, MODERN, LLAMA])
def test_a_classifier_that_transformers_does_not_have(model, tmp_path):
  """The mean of all positions, say: there is no class for it."""
  without_pooler = {path: leaf for path, leaf in CLASSIFIER.items() if 'pooler' not in path}
  message = r'transformers has no \w+ that classifies as this model does'
  with pytest.raises(ValueError, match=message):
    saved(tmp_path / 'x', model, random_params(model, without_pooler))


@pytest.mark.parametrize(
  ('model', 'message'),
  [
    (
      BERT.clone(norm_order='pre'),
      "Nearest is bert, where these options stand in the way: norm_order='pre'",
    ),
    (
      LLAMA.clone(activation='gelu', norm='layernorm'),
      "Nearest is llama, where .* in the way: norm='layernorm'",
    ),
    (LLAMA.clone(qk_norm=True, window=4), 'Nearest is mistral, where .*: qk_norm=True'),
    (MODERN.clone(kv_heads=1), 'Nearest is modernbert, where .*: kv_heads=1'),
  ],
)
def test_a_model_of_no_family_is_refused(model, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    saved(tmp_path / 'x', model)
  assert list(tmp_path.iterdir()) == []


def test_roberta_with_another_padding_id_is_a_bert(tmp_path):
  model = BERT.clone(position_offset=2)
  params = saved(tmp_path / 'x', model, extra={'pad_token_id': 1})
  assert model_type(tmp_path / 'x') == 'roberta'
  saved(tmp_path / 'y', model, extra={'pad_token_id': 0})
  assert model_type(tmp_path / 'y') == 'bert'
  loaded = load(tmp_path / 'y', BERT)
  np.testing.assert_array_equal(loaded.params[POSITION], params[POSITION][2:])


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
  def fails(path):
    assert sorted(os.listdir(path)) == ['config.json', 'model.safetensors']
    raise RuntimeError('no tokenizer')

  with pytest.raises(RuntimeError, match='no tokenizer'):
    saved(tmp_path / 'x', LLAMA, also=fails)
  assert list(tmp_path.iterdir()) == []
  (tmp_path / 'x').mkdir()
  saved(tmp_path / 'x', LLAMA, also=lambda path: (pathlib.Path(path) / 'tokenizer.json').touch())
  files = ['config.json', 'model.safetensors', 'tokenizer.json']
  assert sorted(os.listdir(tmp_path / 'x')) == files
  saved(tmp_path / 'new' / 'y', LLAMA)  # the folder around it is made too
  with pytest.raises(ValueError, match='x exists already and is not empty'):
    saved(tmp_path / 'x', LLAMA)


def test_memory_is_that_of_the_arrays_and_two_parts(tmp_path):
  """NumPy's memory, as tracemalloc sees it. JAX takes some of NumPy's arrays over, and lets go of
  the others one call later.
  """
  model = LLAMA.clone(vocab_size=2000, dim=256, mlp_dim=512, layers=4, kv_heads=4)
  params, wanted = random_params(model), abstract(model)
  whats = infos(model, wanted)
  largest = max(value.nbytes for value in params.values())
  one = max(value.nbytes // (4 if 'layers' in path else 1) for path, value in params.items())
  tracemalloc.start()
  hf.save(tmp_path / 'x', FAMILIES, 'decoder', model, params, whats, dtype='bfloat16')
  write = tracemalloc.get_traced_memory()
  tracemalloc.reset_peak()
  loaded = hf.load(tmp_path / 'x', FAMILIES, wanted, whats).params
  after, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert sum(value.nbytes for value in loaded.values()) > 5 * largest > 2**23
  assert write[1] - write[0] < one + 2**18
  assert peak - after < 2 * largest + 2**18


@functools.cache
def shapes_of(options):
  model = decoder.Model(**dict(options))
  wanted = abstract(model)
  return wanted, infos(model, wanted)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(offset=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_config(fuzzed, offset, value, cut):
  """A changed byte, or an early end: a ValueError, or a model that the weights fit."""
  path, params, whole = fuzzed
  content = bytearray(whole)
  offset %= len(whole)
  content[offset:] = b'' if cut else bytes([value]) + content[offset + 1 :]
  (path / 'config.json').write_bytes(bytes(content))
  try:
    options = hf.model_options(path, FAMILIES)
    if options.pop('name') != 'decoder':
      return
    loaded = hf.load(path, FAMILIES, *shapes_of(tuple(options.items())))
  except ValueError:
    return
  assert loaded.params.keys() == params.keys()
  assert all(np.array_equal(loaded.params[name], value) for name, value in params.items())


@pytest.fixture(scope='module')
def fuzzed(tmp_path_factory):
  path = tmp_path_factory.mktemp('fuzz') / 'x'
  params = saved(path, LLAMA)
  return path, params, (path / 'config.json').read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_mesh_of_eight_devices(processes, tmp_path):
  """Every parameter, read onto a mesh and written from it, is what it is on one device; one process
  has all, or half.
  """
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  environment = os.environ | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={8 // processes}',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(pathlib.Path(__file__).parents[2]),
  }
  running = [
    subprocess.Popen(
      [sys.executable, __file__, str(tmp_path), address, str(processes), str(i)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]
  for process in running:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert json.loads(out.splitlines()[-1])['cut'] > 8
  assert 'partial' not in ' '.join(os.listdir(tmp_path))


def main(parent, address, processes, index):
  if processes > 1:
    hosts.start(address, processes, index)
  layout, cut = sharding.create_layout(data=2, fsdp=2, tensor=2), 0
  for i, model in enumerate((LLAMA.clone(tied=False), MODERN)[: 3 - processes]):
    params = saved(parent / f'{i}', model)
    boxed = boxed_shapes(model)
    shapes, whats = nn.unbox(boxed), params_lib.infos(boxed)
    where = sharding.parameter_shardings(layout, shapes, whats)
    wanted = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
    loaded = hf.load(parent / f'{i}', FAMILIES, wanted, whats).params
    for path, expected in tree.flatten(where).items():
      assert loaded[path].sharding == expected
      assert len(loaded[path].addressable_shards) == 8 // processes
      for shard in loaded[path].addressable_shards:
        np.testing.assert_array_equal(shard.data, params[path][shard.index])
      cut += not expected.is_fully_replicated
    saved(parent / f'{i}_again', model, loaded)
    files = [(parent / name / 'model.safetensors').read_bytes() for name in (f'{i}', f'{i}_again')]
    assert files[0] == files[1]
  print(json.dumps({'cut': cut}))
  hosts.finish()


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
