"""Families: which there are, and what a config.json of each may say; what is refused, and how.

That the numbers are those of transformers is shown in `parity/test_hf.py`.
"""

import ast
import json
import pathlib
import types

import pytest

from llm_jax.hf import families, family, folders, safetensors
from llm_jax.hf.families import bert
from llm_jax.models import decoder, encoder

FAMILIES = families.known()
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


def read(path, kind, **changes):
  """The section `config.model` of a folder whose config.json has these changes."""
  config = {key: value for key, value in (CONFIGS[kind] | changes).items() if value != 'left out'}
  (path / 'config.json').write_text(json.dumps(config))
  safetensors.write(str(path / 'model.safetensors'), {}, {}.get)
  return folders.model_options(path, FAMILIES)


def test_which_families_there_are():
  """An export is the first family that holds the model, so their order matters."""
  encoders = ['bert', 'roberta', 'xlm-roberta', 'modernbert', 'esm']
  decoders = ['gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'gpt_neox']
  both = ['bart', 'mbart', 'marian', 't5', 'mt5']
  assert list(FAMILIES) == encoders + decoders + both
  ours = {kind: name for kind, (name, _) in FAMILIES.items()}
  kinds = {'encoder': encoders, 'decoder': decoders, 'encoder_decoder': both}
  assert ours == {kind: name for name, kinds_ in kinds.items() for kind in kinds_}


def test_families_of_a_model_of_ones_own():
  own = bert.FAMILIES['bert']
  module = types.SimpleNamespace(__name__='my.model', HF_FAMILIES={'bert': own, 'mine': own})
  found = families.known('my.model', module)
  assert found['bert'] == found['mine'] == ('my.model', own)
  assert found['roberta'] == FAMILIES['roberta'] and len(found) == len(FAMILIES) + 1
  assert families.known('my.other', types.SimpleNamespace(__name__='my.other')) == FAMILIES
  assert families.known() == FAMILIES


def test_families_are_known_by_their_files_alone():
  """No file names another family, but for what is shared, which has a name with an underscore."""
  for path in pathlib.Path(families.__file__).parent.glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and node.module == 'llm_jax.hf.families':
        assert all(alias.name.startswith('_') for alias in node.names), path


@pytest.mark.parametrize('kind', CONFIGS)
def test_the_shortest_config_gives_a_model(kind, tmp_path):
  options = read(tmp_path, kind)
  model = MODELS[options.pop('name')](**options)
  layers = 4 if kind == 'modernbert' else 3
  mlp_dim = 64 if kind == 'gpt2' else 24
  assert (model.dim, model.layers, model.heads, model.mlp_dim) == (16, layers, 2, mlp_dim)
  held = FAMILIES[kind][1]
  again = type(model)(**held.read(held.write(family.values(model))))
  assert family.differences(model, again) == []


@pytest.mark.parametrize(
  ('kind', 'changes', 'message'),
  [
    (
      'bert',
      dict(is_decoder=True),
      'is_decoder=True is not supported; only is_decoder=False is',
    ),
    ('bert', dict(add_cross_attention=True), 'add_cross_attention=True'),
    (
      'bert',
      dict(position_embedding_type='relative_key'),
      "position_embedding_type='relative_key'",
    ),
    ('bert', dict(hidden_act='mish'), "hidden_act='mish' is not supported; supported: gelu"),
    ('bert', dict(quantization_config={'bits': 4}), 'quantization_config='),
    ('bert', dict(pruned_heads={'0': [1]}), 'pruned_heads='),
    ('bert', dict(hidden_size='left out'), 'hidden_size is missing'),
    ('bert', dict(hidden_size='16'), "hidden_size='16' must be a whole number, at least 1"),
    ('bert', dict(num_hidden_layers=0), 'num_hidden_layers=0 must be a whole number, at least 1'),
    ('bert', dict(num_hidden_layers=10**6), '1000000 layers are too many'),
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
      'mlp_bias=True is not supported together with bias=False',
    ),
    (
      'modernbert',
      dict(rope_parameters={'full_attention': {'rope_type': 'linear', 'factor': 2}}),
      'in ModernBERT only',
    ),
    (
      'esm',
      dict(position_embedding_type='left out'),
      r"position_embedding_type='absolute' \(the default of a key that is left out\)",
    ),
    ('esm', dict(token_dropout=True), 'token_dropout=True'),
    ('esm', dict(emb_layer_norm_before=True), 'emb_layer_norm_before=True'),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True'),
    ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights=False'),
    (
      'llama',
      dict(attention_bias=True),
      'mlp_bias=False is not supported together with bias=True',
    ),
    (
      'llama',
      dict(rope_scaling={'type': 'dynamic', 'factor': 2.0}),
      "rope_type='dynamic' is not supported; supported: default",
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
      r'use_parallel_residual=True \(the default of a key that is left out\)',
    ),
    ('gpt_neox', dict(rotary_pct='left out'), 'partial_rotary_factor=0.25'),
  ],
)
def test_what_is_not_supported_is_refused_by_name(kind, changes, message, tmp_path):
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
  assert read(tmp_path, 'gpt2')['mlp_dim'] == 64
  assert read(tmp_path, 'gpt2', n_inner=20)['mlp_dim'] == 20
  assert read(tmp_path, 'mistral')['window'] == 4096
  assert read(tmp_path, 'mistral', sliding_window=None)['window'] is None
  roberta = read(tmp_path, 'roberta', pad_token_id=0)
  assert (roberta['position_offset'], roberta['max_len']) == (1, 33)
  llama = read(tmp_path, 'llama', head_dim=4, num_key_value_heads=1)
  assert llama.items() >= dict(head_dim=4, kv_heads=1, tied=False).items()
