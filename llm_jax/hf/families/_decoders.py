"""What several families of decoders share: GPT's options, LLaMA's keys and names of tensors."""

from collections.abc import Mapping
from typing import Any

from llm_jax.hf import fields as config_fields
from llm_jax.hf.family import Family, Rule
from llm_jax.hf.fields import ACTIVATIONS
from llm_jax.hf.tensors import HEADS_IN, HEADS_OUT, Tensor, linear, norm, table, vocabulary

GPT_OPTIONS = dict(
  norm='layernorm', norm_order='pre', norm_bias=True, bias=True, gated=False, window=None
)
SCORE = (Tensor('score.weight', 'OI->IO', ('heads_classifier/dense/kernel',)),)

PLAIN = dict(bias=False, qkv_bias=False, qk_norm=False)  # of LLaMA's successors
KV_HEADS = {'num_key_value_heads': ('kv_heads', int)}  # which LLaMA's config.json may leave out
_LLAMA_FIELDS = {
  'vocab_size': ('vocab_size', int),
  'hidden_size': ('dim', int),
  'num_hidden_layers': ('layers', int),
  'num_attention_heads': ('heads', int),
  'num_key_value_heads': ('kv_heads', int, None),
  'head_dim': ('head_dim', int, None),
  'intermediate_size': ('mlp_dim', int),
  'hidden_act': ('activation', ACTIVATIONS, 'silu'),
  'max_position_embeddings': ('max_len', int),
  'rms_norm_eps': ('norm_eps', float, 1e-6),
  'initializer_range': ('init_std', float, 0.02),
  'tie_word_embeddings': ('tied', bool, False),
  'attention_dropout': ('attention_dropout', float, 0.0),
}
_LLAMA_OPTIONS = dict(
  positions='rope', norm='rmsnorm', norm_order='pre', norm_bias=False, gated=True, dropout=0.0
)
_ATTENTION = 'layers.{}.self_attn'
_LLAMA_BODY = (
  *table('embed_tokens', 'model/embedder/token'),
  *linear(f'{_ATTENTION}.q_proj', 'attention/query', axes=HEADS_OUT),
  *linear(f'{_ATTENTION}.k_proj', 'attention/key', axes=HEADS_OUT),
  *linear(f'{_ATTENTION}.v_proj', 'attention/value', axes=HEADS_OUT),
  *linear(f'{_ATTENTION}.o_proj', 'attention/out', axes=HEADS_IN),
  *linear('layers.{}.mlp.gate_proj', 'mlp/gate'),
  *linear('layers.{}.mlp.up_proj', 'mlp/up'),
  *linear('layers.{}.mlp.down_proj', 'mlp/down'),
  *norm('layers.{}.input_layernorm', 'attention_norm'),
  *norm('layers.{}.post_attention_layernorm', 'mlp_norm'),
  Tensor(f'{_ATTENTION}.q_norm.weight', 'H->H', ('attention/query_norm/scale',)),
  Tensor(f'{_ATTENTION}.k_norm.weight', 'H->H', ('attention/key_norm/scale',)),
  *norm('norm', 'model/final_norm'),
)


def llama(
  name: str,
  *,
  rank: int,
  fields: Mapping[str, Any],
  options: Mapping[str, Any],
  rules: tuple[Rule, ...] = (),
  fixed: Mapping[str, tuple[Any, Any]] | None = None,
) -> Family:
  """A family with LLaMA's names of tensors.

  Args:
    name: what its classes begin with.
    rank: as in `Family`.
    fields: keys in addition to LLaMA's, or in their stead.
    options: options of ours that the whole family has, in addition to those of all such families.
    rules: in addition to the one for rotary positions.
    fixed: as in `Family`.
  """
  return Family(
    rank=rank,
    prefix='model.',
    fields={**_LLAMA_FIELDS, **fields},
    fixed=fixed or {},
    rules=(Rule(_read_rope, _write_rope), *rules),
    options={**_LLAMA_OPTIONS, **options},
    body=_LLAMA_BODY,
    heads=(*vocabulary('lm_head.weight'), *SCORE),
    ignored=(r'.*rotary_emb\.inv_freq',),
    classes={
      f'{name}ForSequenceClassification': ('classifier',),
      f'{name}ForCausalLM': ('vocabulary',),
      f'{name}Model': (),
    },
  )


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
  theta, scaling = config_fields.rope(config, config.get('rope_theta', 10000.0))
  return {'rope_theta': theta, 'rope_scaling': scaling}


def _write_rope(options: Mapping[str, Any]) -> dict[str, Any]:
  scaling = config_fields.rope_scaling(options['rope_scaling'])
  return {'rope_theta': options['rope_theta'], 'rope_scaling': scaling}


def _read_layer_types(config: Mapping[str, Any]) -> dict[str, Any]:
  types = config.get('layer_types') or []
  if not isinstance(types, list) or any(kind != 'full_attention' for kind in types):
    raise ValueError(f'layer_types={types!r} is not supported; only full_attention is.')
  return {}


FULL_ATTENTION = Rule(_read_layer_types, lambda options: {})
