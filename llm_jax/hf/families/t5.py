"""T5 (arXiv:1910.10683), its version 1.1, Flan-T5 and mT5 (2010.11934)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax.hf.families import _encoder_decoders as shared
from llm_jax.hf.family import Family, Rule
from llm_jax.hf.fields import field
from llm_jax.hf.tensors import LINEAR, Tensor, linear, table, vocabulary

MODEL = 'encoder_decoder'

_MLPS = {  # feed_forward_proj -> what the mlp is
  'relu': ('relu', False),
  'gated-gelu': ('gelu_tanh', True),
  'gated-silu': ('silu', True),
}


def _read_mlp(config: Mapping[str, Any]) -> dict[str, Any]:
  kind = config.get('feed_forward_proj', 'relu')
  if kind not in _MLPS:
    raise ValueError(f'feed_forward_proj={kind!r} is not supported; supported: {", ".join(_MLPS)}.')
  activation, gated = _MLPS[kind]
  return {'activation': activation, 'gated': gated}


def _write_mlp(options: Mapping[str, Any]) -> dict[str, Any]:
  ours = options['activation'], options['gated']
  return {'feed_forward_proj': next((k for k, has in _MLPS.items() if has == ours), None)}


def _read_rest(config: Mapping[str, Any]) -> dict[str, Any]:
  layers = field(config, 'num_decoder_layers', int, None) or field(config, 'num_layers', int)
  # Before transformers 5, where it was written nowhere, what is tied is scaled.
  scaled = config.get('scale_decoder_outputs', config.get('tie_word_embeddings', True))
  rate = field(config, 'dropout_rate', float, 0.1)
  return {'layers': layers, 'output_scaled': bool(scaled), 'attention_dropout': rate}


def _read_unscaled(config: Mapping[str, Any]) -> dict[str, Any]:
  return _read_rest(config) | {'output_scaled': False}


def _write_rest(options: Mapping[str, Any]) -> dict[str, Any]:
  return {
    'num_decoder_layers': options['layers'],
    'scale_decoder_outputs': options['output_scaled'],
  }


def _attention(theirs: str, ours: str) -> tuple[Tensor, ...]:
  weights = {
    name: Tensor(f'{theirs}.{name[0]}.weight', '(NH)D->DNH', (f'{ours}/{name}/kernel',))
    for name in ('query', 'key', 'value')
  }
  return (*weights.values(), Tensor(f'{theirs}.o.weight', 'D(NH)->NHD', (f'{ours}/out/kernel',)))


def _scale(theirs: str, ours: str) -> Tensor:
  return Tensor(f'{theirs}.weight', 'D->D', (f'{ours}/scale',))


def _layer(side: str, mlp: int) -> tuple[Tensor, ...]:
  layer = f'{side}.block.{{}}.layer'
  dense = f'{layer}.{mlp}.DenseReluDense'
  gate = f'{side}/mlp/gate'
  return (
    *_attention(f'{layer}.0.SelfAttention', f'{side}/attention'),
    _scale(f'{layer}.0.layer_norm', f'{side}/attention_norm'),
    Tensor(f'{dense}.wi_0.weight', LINEAR[0], (f'{gate}/kernel',)),
    Tensor(f'{dense}.wi_1.weight', LINEAR[0], (f'{side}/mlp/up/kernel',), needs='mlp/gate'),
    Tensor(f'{dense}.wi.weight', LINEAR[0], (f'{side}/mlp/up/kernel',)),
    *linear(f'{dense}.wo', f'{side}/mlp/down'),
    _scale(f'{layer}.{mlp}.layer_norm', f'{side}/mlp_norm'),
    Tensor(
      f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
      'QN->QN',
      (f'model/{side}_bias/embedding',),
    ),
  )


_T5 = Family(
  rank=123,
  prefix='',
  fields={
    'vocab_size': ('vocab_size', int),
    'd_model': ('dim', int),
    'd_kv': ('head_dim', int, 64),
    'd_ff': ('mlp_dim', int),
    'num_layers': ('encoder_layers', int),
    'num_heads': ('heads', int),
    'n_positions': ('max_len', int, 512),
    'relative_attention_num_buckets': ('buckets', int, 32),
    'relative_attention_max_distance': ('farthest', int, 128),
    'dropout_rate': ('dropout', float, 0.1),
    'layer_norm_epsilon': ('norm_eps', float, 1e-6),
    'tie_word_embeddings': ('tied', bool, True),
  },
  fixed=shared.BOTH,
  rules=(Rule(_read_mlp, _write_mlp), Rule(_read_rest, _write_rest)),
  options=shared.PLAIN
  | dict(
    positions='relative',
    norm='rmsnorm',
    norm_order='pre',
    norm_bias=False,
    bias=False,
    scaled=False,
    position_offset=0,
    embedding_norm=False,
    embedding_scaled=False,
    output_biased=False,
  ),
  body=(
    *table('shared', 'model/embedder/token'),
    *_layer('encoder', 1),
    *_layer('decoder', 2),
    *_attention('decoder.block.{}.layer.1.EncDecAttention', 'decoder/cross_attention'),
    _scale('decoder.block.{}.layer.1.layer_norm', 'decoder/cross_attention_norm'),
    _scale('encoder.final_layer_norm', 'model/encoder_norm'),
    _scale('decoder.final_layer_norm', 'model/final_norm'),
  ),
  heads=vocabulary('lm_head.weight'),
  copies=shared.COPIES,
  ignored=(r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',),
  stacks=shared.STACKS,
  tied_by_values=True,
  classes={'T5ForConditionalGeneration': ('vocabulary',), 'T5Model': ()},
)

FAMILIES = {
  't5': _T5,
  'mt5': dataclasses.replace(
    _T5,
    rank=124,  # an export says T5
    rules=(Rule(_read_mlp, _write_mlp), Rule(_read_unscaled, _write_rest)),
    classes={f'M{name}': heads for name, heads in _T5.classes.items()},
  ),
}
