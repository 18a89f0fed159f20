"""Folders of Hugging Face's: what a config.json may say, what is refused and how, meshes, memory,
and damaged files.

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

from llm_jax.core import tree
from llm_jax.hf import family, safetensors
from llm_jax.hf import folders as hf
from llm_jax.models import decoder, encoder
from llm_jax.parallel import hosts, sharding

FAMILIES = {
  kind: (name, held)
  for name, module in (('encoder', encoder), ('decoder', decoder))
  for kind, held in module.HF.items()
}
MODELS = {'encoder': encoder.Model, 'decoder': decoder.Model}
SHAPE = dict(
  vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
)
ROPE = {'rope_type': 'default', 'rope_theta': 10000.0}
CONFIGS = {
  kind: dict(model_type=kind) | config
  for kind, config in {
    'bert': SHAPE,
    'roberta': SHAPE | dict(max_position_embeddings=34, pad_token_id=1),
    'modernbert': SHAPE | dict(num_hidden_layers=4),
    'esm': SHAPE | dict(position_embedding_type='rotary'),
    'gpt2': dict(vocab_size=50, n_embd=16, n_layer=3, n_head=2),
    'llama': SHAPE | dict(max_position_embeddings=32),
    'mistral': SHAPE | dict(max_position_embeddings=32, num_key_value_heads=1),
    'qwen2': SHAPE | dict(max_position_embeddings=32, num_key_value_heads=1),
    'qwen3': SHAPE | dict(max_position_embeddings=32, num_key_value_heads=1, head_dim=4),
    'gpt_neox': SHAPE | dict(rotary_pct=1.0, use_parallel_residual=False),
  }.items()
}


def folder(path, config):
  """A folder with a config.json, and a file of weights that holds nothing."""
  path.mkdir(exist_ok=True)
  (path / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
  safetensors.write(str(path / 'model.safetensors'), {}, {}.get)
  return path


def read(path, kind, **changes):
  config = {key: value for key, value in (CONFIGS[kind] | changes).items() if value != 'left out'}
  return hf.model_options(folder(path, config), FAMILIES)


def boxed_shapes(model):
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method=every)
  )['params']


def abstract(model):
  return tree.flatten({'model': nn.unbox(boxed_shapes(model))})


def every(model, tokens_BT):
  return model.logits(model(tokens_BT))


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


def saved(path, model, params=None, **options):
  params = random_params(model) if params is None else params
  hf.save(path, FAMILIES, 'decoder' if model.causal else 'encoder', model, params, **options)
  return params


@pytest.mark.parametrize('kind', CONFIGS)
def test_the_shortest_config_gives_a_model(kind, tmp_path):
  options = read(tmp_path, kind)
  model = MODELS[options.pop('name')](**options)
  assert (model.dim, model.layers, model.heads, model.mlp_dim) == (
    16,
    4 if kind == 'modernbert' else 3,
    2,
    64 if kind == 'gpt2' else 24,
  )
  held = FAMILIES[kind][1]
  assert family.differences(model, type(model)(**held.read(held.write(family.values(model))))) == []


@pytest.mark.parametrize(
  ('kind', 'changes', 'message'),
  [
    (
      'bert',
      dict(is_decoder=True),
      'is_decoder=True cannot be done here; only is_decoder=False can',
    ),
    ('bert', dict(add_cross_attention=True), 'add_cross_attention=True'),
    (
      'bert',
      dict(position_embedding_type='relative_key'),
      "position_embedding_type='relative_key'",
    ),
    ('bert', dict(hidden_act='mish'), "hidden_act='mish' cannot be done here; known: gelu"),
    ('bert', dict(quantization_config={'bits': 4}), 'quantization_config='),
    ('bert', dict(pruned_heads={'0': [1]}), 'pruned_heads='),
    ('bert', dict(hidden_size='left out'), 'hidden_size is missing'),
    ('bert', dict(hidden_size='16'), "hidden_size='16' must be a whole number, at least 1"),
    ('bert', dict(num_hidden_layers=0), 'num_hidden_layers=0 must be a whole number, at least 1'),
    ('bert', dict(num_hidden_layers=10**6), '1000000 layers cannot be'),
    ('bert', dict(tie_word_embeddings='yes'), "tie_word_embeddings='yes' must be true or false"),
    ('bert', dict(layer_norm_eps=-1), 'layer_norm_eps=-1 must be a number, at least 0'),
    ('roberta', dict(hidden_act='relu'), "hidden_act='relu'"),
    ('roberta', dict(max_position_embeddings=2), 'must be more than pad_token_id'),
    ('modernbert', dict(layer_types=['sliding_attention'] * 4), 'layer_types='),
    ('modernbert', dict(layer_types=['full_attention'] * 3), 'layer_types='),
    ('modernbert', dict(local_attention=5), 'local_attention=5 must be even'),
    ('modernbert', dict(decoder_bias=False), 'decoder_bias=False'),
    (
      'modernbert',
      dict(mlp_bias=True),
      'mlp_bias=True cannot be done here together with bias=False',
    ),
    (
      'modernbert',
      dict(rope_parameters={'full_attention': {'rope_type': 'linear', 'factor': 2}}),
      'in ModernBERT only',
    ),
    (
      'esm',
      dict(position_embedding_type='left out'),
      r"position_embedding_type='absolute' \(what it is where it is left out\)",
    ),
    ('esm', dict(token_dropout=True), 'token_dropout=True'),
    ('esm', dict(emb_layer_norm_before=True), 'emb_layer_norm_before=True'),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True'),
    ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights=False'),
    (
      'llama',
      dict(attention_bias=True),
      'mlp_bias=False cannot be done here together with bias=True',
    ),
    (
      'llama',
      dict(rope_scaling={'type': 'dynamic', 'factor': 2.0}),
      "rope_type='dynamic' cannot be done here; known: default",
    ),
    ('llama', dict(rope_parameters={'rope_type': 'yarn', 'factor': 2.0}), "rope_type='yarn'"),
    (
      'llama',
      dict(rope_parameters=ROPE | {'partial_rotary_factor': 0.5}),
      'partial_rotary_factor=0.5',
    ),
    ('llama', dict(rope_scaling={'type': 'linear'}), 'factor is missing'),
    ('llama', dict(rope_theta=None), 'rope_theta=None'),
    ('mistral', dict(sliding_window=0), 'sliding_window=0'),
    ('qwen2', dict(use_sliding_window=True), 'use_sliding_window=True'),
    ('qwen2', dict(layer_types=['sliding_attention'] * 3), 'layer_types='),
    ('qwen3', dict(attention_bias=True), 'attention_bias=True'),
    (
      'gpt_neox',
      dict(use_parallel_residual='left out'),
      r'use_parallel_residual=True \(what it is where it is left out\)',
    ),
    ('gpt_neox', dict(rotary_pct='left out'), 'partial_rotary_factor=0.25'),
  ],
)
def test_what_cannot_be_done_is_refused_by_name(kind, changes, message, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    read(tmp_path, kind, **changes)
  assert f'config.json: {kind}: ' in str(error.value)


LLAMA3 = {
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}


@pytest.mark.parametrize(
  ('kind', 'old', 'new', 'options'),
  [
    (
      'llama',
      dict(rope_theta=500.0, rope_scaling={'rope_type': 'llama3'} | LLAMA3),
      dict(rope_parameters={'rope_type': 'llama3', 'rope_theta': 500.0} | LLAMA3),
      dict(rope_theta=500.0, rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    ),
    (
      'llama',
      dict(rope_theta=500.0, rope_scaling={'type': 'linear', 'factor': 2}),
      dict(rope_parameters={'rope_type': 'linear', 'rope_theta': 500, 'factor': 2.0}),
      dict(rope_theta=500.0, rope_scaling=(2.0,)),
    ),
    (
      'llama',
      dict(rope_theta=500.0, rope_scaling=None),
      dict(rope_parameters={'rope_theta': 500.0}),
      dict(rope_theta=500.0, rope_scaling=None),
    ),
    (
      'gpt_neox',
      dict(rotary_emb_base=500),
      dict(
        rotary_pct='left out', rope_parameters={'rope_theta': 500.0, 'partial_rotary_factor': 1.0}
      ),
      dict(rope_theta=500.0),
    ),
    (
      'modernbert',
      dict(global_attn_every_n_layers=3, global_rope_theta=700.0, local_rope_theta=80.0),
      dict(
        layer_types=['full_attention', 'sliding_attention', 'sliding_attention', 'full_attention'],
        rope_parameters={
          'full_attention': ROPE | {'rope_theta': 700.0},
          'sliding_attention': ROPE | {'rope_theta': 80.0},
        },
      ),
      dict(global_every=3, window=128, rope_theta=700.0, rope_local_theta=80.0),
    ),
    (
      'modernbert',
      dict(global_attn_every_n_layers=1),
      dict(layer_types=['full_attention'] * 4),
      dict(global_every=1, window=None),
    ),
  ],
)
def test_old_and_new_spellings(kind, old, new, options, tmp_path):
  first, second = read(tmp_path, kind, **old), read(tmp_path, kind, **new)
  assert first == second and options.items() <= first.items()


def test_options_that_are_not_one_key(tmp_path):
  assert (
    read(tmp_path, 'gpt2')['mlp_dim'] == 64 and read(tmp_path, 'gpt2', n_inner=20)['mlp_dim'] == 20
  )
  assert (
    read(tmp_path, 'mistral')['window'] == 4096
    and read(tmp_path, 'mistral', sliding_window=None)['window'] is None
  )
  roberta = read(tmp_path, 'roberta', pad_token_id=0)
  assert (roberta['position_offset'], roberta['max_len']) == (1, 33)
  assert (
    read(tmp_path, 'llama', head_dim=4, num_key_value_heads=1).items()
    >= dict(head_dim=4, kv_heads=1, tied=False).items()
  )


def test_which_folders_are_known(tmp_path):
  assert not hf.is_folder(tmp_path) and not hf.is_folder(tmp_path / 'none')
  (tmp_path / 'config.json').write_text('{"steps": 3}')
  assert not hf.is_folder(tmp_path)
  assert hf.is_folder(folder(tmp_path / 'a', {'model_type': 'bert'})) and hf.is_folder(
    folder(tmp_path / 'b', '{')
  )
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
      '{"model_type": "bart"}',
      r"model_type='bart' is not known \(did you mean 'bert'\?\); known: bert, roberta",
    ),
  ],
)
def test_broken_and_unknown_configs(config, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    hf.model_options(folder(tmp_path, config), FAMILIES)


def test_folders_that_are_not_whole(tmp_path):
  with pytest.raises(ValueError, match='holds no config.json'):
    hf.read_config(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(CONFIGS['bert']))
  with pytest.raises(
    ValueError, match='holds neither model.safetensors nor model.safetensors.index.json'
  ):
    hf.read_config(tmp_path)
  (tmp_path / 'pytorch_model.bin').touch()
  with pytest.raises(
    ValueError, match='pytorch_model.bin, which could execute code .* safe_serialization=True'
  ):
    hf.read_config(tmp_path)


def test_labels(tmp_path):
  assert hf.labels(folder(tmp_path, CONFIGS['bert'])) is None
  config = CONFIGS['bert'] | {'architectures': ['BertForSequenceClassification']}
  assert hf.labels(folder(tmp_path, config)) == ('LABEL_0', 'LABEL_1')
  assert hf.labels(
    folder(tmp_path, config | {'id2label': {'1': 'no', '0': 'yes', '2': 'both'}})
  ) == ('yes', 'no', 'both')
  with pytest.raises(ValueError, match='must name the classes 0, 1'):
    hf.labels(folder(tmp_path, config | {'id2label': {'1': 'no'}}))


@pytest.mark.parametrize(
  'model',
  [LLAMA, LLAMA.clone(tied=False), BERT, MODERN],
  ids=['llama', 'untied', 'bert', 'modernbert'],
)
def test_round_trip(model, tmp_path):
  params = saved(tmp_path / 'x', model)
  name, held = FAMILIES[json.loads((tmp_path / 'x' / 'config.json').read_text())['model_type']]
  options = hf.model_options(tmp_path / 'x', FAMILIES)
  assert options.pop('name') == name and family.differences(model, MODELS[name](**options)) == []
  loaded = hf.load(tmp_path / 'x', FAMILIES, tree.nest(abstract(model)))
  assert loaded.new == () == loaded.unused and loaded.params.keys() == params.keys()
  for path, value in params.items():
    np.testing.assert_array_equal(loaded.params[path], value)


@pytest.mark.parametrize(
  ('dtype', 'ours'),
  [('bfloat16', jnp.float32), ('float16', jnp.bfloat16), ('float64', jnp.float32)],
)
def test_types(dtype, ours, tmp_path):
  params = saved(tmp_path / 'x', LLAMA, dtype=dtype)
  wanted = {path: jax.ShapeDtypeStruct(leaf.shape, ours) for path, leaf in abstract(LLAMA).items()}
  for path, value in hf.load(tmp_path / 'x', FAMILIES, wanted).params.items():
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
      'layers.1.self_attn.k_proj.weight is not there, which '
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
      'model.layers.0.self_attn.q_proj.bias is a part of a layer that this model has no place for',
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
    hf.load(tmp_path / 'x', FAMILIES, abstract(LLAMA))
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
  assert hf.load(tmp_path / 'x', FAMILIES, abstract(LLAMA)).unused == ()
  rewrite(tmp_path / 'x', tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'] + 1})
  with pytest.raises(
    ValueError, match='lm_head.weight and model.embed_tokens.weight differ, and must be the same'
  ):
    hf.load(tmp_path / 'x', FAMILIES, abstract(LLAMA))
  # Without the table, its copy is as good.
  table = tensors.pop('model.embed_tokens.weight')
  rewrite(tmp_path / 'x', tensors | {'lm_head.weight': table})
  loaded = hf.load(tmp_path / 'x', FAMILIES, abstract(LLAMA))
  np.testing.assert_array_equal(loaded.params[family.TOKEN], params[family.TOKEN])


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
  left = hf.save(tmp_path / 'x', FAMILIES, 'encoder', BERT, params, classes=('a', 'b', 'c'))
  assert (
    left == ('heads_sop/dense/kernel',)
    and 'heads_sop/dense/kernel has no place in a BertForSequenceClass' in caplog.text
  )
  assert hf.labels(tmp_path / 'x') == ('a', 'b', 'c')
  one = params | {
    'heads_classifier/dense/kernel': np.zeros((16, 1)),
    'heads_classifier/dense/bias': np.zeros(1),
  }
  hf.save(tmp_path / 'y', FAMILIES, 'encoder', BERT, one, classes=('no', 'yes'))
  assert hf.labels(tmp_path / 'y') == ('yes',)
  with pytest.raises(
    ValueError,
    match=r'classifier.weight of shape \[3, 16\] does not fit heads_classifier/dense/kernel',
  ):
    hf.load(
      tmp_path / 'x',
      FAMILIES,
      abstract(BERT) | CLASSIFIER | {'heads_classifier/dense/kernel': head(16, 4)},
    )


@pytest.mark.parametrize('model', [BERT, MODERN, LLAMA])
def test_a_classifier_that_transformers_does_not_have(model, tmp_path):
  """The mean of all places, say: there is no class for it."""
  with pytest.raises(
    ValueError, match=r'transformers has no \w+ that classifies as this model does'
  ):
    saved(
      tmp_path / 'x',
      model,
      random_params(
        model, {path: leaf for path, leaf in CLASSIFIER.items() if 'pooler' not in path}
      ),
    )


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
  assert json.loads((tmp_path / 'x' / 'config.json').read_text())['model_type'] == 'roberta'
  saved(tmp_path / 'y', model, extra={'pad_token_id': 0})
  assert json.loads((tmp_path / 'y' / 'config.json').read_text())['model_type'] == 'bert'
  loaded = hf.load(tmp_path / 'y', FAMILIES, abstract(BERT))
  np.testing.assert_array_equal(loaded.params[hf.POSITION], params[hf.POSITION][2:])


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
  def fails(path):
    assert sorted(os.listdir(path)) == ['config.json', 'model.safetensors']
    raise RuntimeError('no tokenizer')

  with pytest.raises(RuntimeError, match='no tokenizer'):
    saved(tmp_path / 'x', LLAMA, also=fails)
  assert list(tmp_path.iterdir()) == []
  (tmp_path / 'x').mkdir()
  saved(tmp_path / 'x', LLAMA, also=lambda path: (pathlib.Path(path) / 'tokenizer.json').touch())
  assert sorted(os.listdir(tmp_path / 'x')) == [
    'config.json',
    'model.safetensors',
    'tokenizer.json',
  ]
  with pytest.raises(ValueError, match='x exists already and is not empty'):
    saved(tmp_path / 'x', LLAMA)


def test_memory_is_that_of_the_arrays_and_two_parts(tmp_path):
  """NumPy's memory, as tracemalloc sees it. JAX takes some of NumPy's arrays over, and lets go of
  the others one call later.
  """
  model = LLAMA.clone(vocab_size=2000, dim=256, mlp_dim=512, layers=4, kv_heads=4)
  params = random_params(model)
  largest = max(value.nbytes for value in params.values())
  one = max(value.nbytes // (4 if 'layers' in path else 1) for path, value in params.items())
  tracemalloc.start()
  saved(tmp_path / 'x', model, params, dtype='bfloat16')
  write = tracemalloc.get_traced_memory()
  tracemalloc.reset_peak()
  loaded = hf.load(tmp_path / 'x', FAMILIES, abstract(model)).params
  after, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert sum(value.nbytes for value in loaded.values()) > 5 * largest > 2**23
  assert write[1] - write[0] < one + 2**18
  assert peak - after < 2 * largest + 2**18


@functools.cache
def shapes_of(options):
  return abstract(decoder.Model(**dict(options)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_config(fuzzed, place, value, cut):
  """A changed byte, or an early end: a ValueError, or a model that the weights fit."""
  path, params, whole = fuzzed
  content = bytearray(whole)
  place %= len(whole)
  content[place:] = b'' if cut else bytes([value]) + content[place + 1 :]
  (path / 'config.json').write_bytes(bytes(content))
  try:
    options = hf.model_options(path, FAMILIES)
    if options.pop('name') != 'decoder':
      return
    loaded = hf.load(path, FAMILIES, shapes_of(tuple(options.items())))
  except ValueError:
    return
  assert loaded.params.keys() == params.keys()
  assert all(np.array_equal(loaded.params[name], value) for name, value in params.items())


@pytest.fixture(scope='module')
def fuzzed(tmp_path_factory):
  path = tmp_path_factory.mktemp('fuzz') / 'x'
  params = saved(path, LLAMA)
  return path, params, (path / 'config.json').read_bytes()


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
    boxed = {'model': boxed_shapes(model)}
    where = sharding.parameter_shardings(layout, boxed)
    wanted = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), where
    )
    loaded = hf.load(parent / f'{i}', FAMILIES, wanted).params
    for path, place in tree.flatten(where).items():
      assert (
        loaded[path].sharding == place and len(loaded[path].addressable_shards) == 8 // processes
      )
      for shard in loaded[path].addressable_shards:
        np.testing.assert_array_equal(shard.data, params[path][shard.index])
      cut += not place.is_fully_replicated
    saved(parent / f'{i}_again', model, loaded)
    files = [(parent / name / 'model.safetensors').read_bytes() for name in (f'{i}', f'{i}_again')]
    assert files[0] == files[1]
  print(json.dumps({'cut': cut}))
  hosts.finish()


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
