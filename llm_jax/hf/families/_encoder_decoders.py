"""What several families of encoder-decoders share: BART's keys and names of tensors are mBART's and
Marian's too.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.hf.family import Family
from llm_jax.hf.fields import ACTIVATIONS
from llm_jax.hf.tensors import (
  HEADS_IN,
  HEADS_OUT,
  TABLE_BIAS,
  Tensor,
  linear,
  norm,
  table,
  vocabulary,
)

STACKS = {'model/encoder/': 'encoder/', 'model/decoder/': 'decoder/'}
PLAIN = dict(qkv_bias=None, qk_norm=False, window=None, kv_heads=None)  # what none of them has
COPIES = {f'{side}.embed_tokens.weight': 'shared.weight' for side in ('encoder', 'decoder')}
BOTH = {'is_encoder_decoder': (True, True)}

_FIELDS = {
  'vocab_size': ('vocab_size', int),
  'd_model': ('dim', int),
  'encoder_layers': ('encoder_layers', int),
  'decoder_layers': ('layers', int),
  'encoder_attention_heads': ('heads', int),
  'decoder_attention_heads': ('heads', int),
  'encoder_ffn_dim': ('mlp_dim', int),
  'decoder_ffn_dim': ('mlp_dim', int),
  'max_position_embeddings': ('max_len', int),
  'activation_function': ('activation', ACTIVATIONS, 'gelu'),
  'dropout': ('dropout', float, 0.1),
  'attention_dropout': ('attention_dropout', float, 0.0),
  'init_std': ('init_std', float, 0.02),
  'scale_embedding': ('embedding_scaled', bool, False),
  'tie_word_embeddings': ('tied', bool, True),
}
_OPTIONS = PLAIN | dict(
  norm='layernorm',
  norm_bias=True,
  norm_eps=1e-5,
  bias=True,
  gated=False,
  scaled=True,
  output_scaled=False,
  output_biased=True,
)


def _attention(theirs: str, ours: str) -> tuple[Tensor, ...]:
  return (
    *linear(f'{theirs}.q_proj', f'{ours}/query', axes=HEADS_OUT),
    *linear(f'{theirs}.k_proj', f'{ours}/key', axes=HEADS_OUT),
    *linear(f'{theirs}.v_proj', f'{ours}/value', axes=HEADS_OUT),
    *linear(f'{theirs}.out_proj', f'{ours}/out', axes=HEADS_IN),
  )


def _layer(side: str) -> tuple[Tensor, ...]:
  layer = f'{side}.layers.{{}}'
  return (
    *_attention(f'{layer}.self_attn', f'{side}/attention'),
    *norm(f'{layer}.self_attn_layer_norm', f'{side}/attention_norm'),
    *linear(f'{layer}.fc1', f'{side}/mlp/up'),
    *linear(f'{layer}.fc2', f'{side}/mlp/down'),
    *norm(f'{layer}.final_layer_norm', f'{side}/mlp_norm'),
  )


_BODY = (
  *table('shared', 'model/embedder/token'),
  *table('encoder.embed_positions', 'model/embedder/position'),
  *table('decoder.embed_positions', 'model/decoder_embedder/position'),
  *norm('encoder.layernorm_embedding', 'model/embedder/embedding_norm'),
  *norm('decoder.layernorm_embedding', 'model/decoder_embedder/embedding_norm'),
  *norm('encoder.layer_norm', 'model/encoder_norm'),
  *norm('decoder.layer_norm', 'model/final_norm'),
  *_layer('encoder'),
  *_layer('decoder'),
  *_attention('decoder.layers.{}.encoder_attn', 'decoder/cross_attention'),
  *norm('decoder.layers.{}.encoder_attn_layer_norm', 'decoder/cross_attention_norm'),
)


def bart(name: str, *, rank: int, options: Mapping[str, Any], **others: Any) -> Family:
  """A family with BART's names of tensors.

  Args:
    name: what its classes begin with.
    rank: as in `Family`.
    options: options of ours that the whole family has, in addition to those of all such families.
    **others: further arguments of `Family`.
  """
  return Family(
    rank=rank,
    prefix='model.',
    fields=_FIELDS,
    fixed=BOTH | others.pop('fixed', {}),
    options=_OPTIONS | dict(options),
    body=_BODY,
    heads=(*vocabulary('lm_head.weight'), Tensor('final_logits_bias', '1V->V', (TABLE_BIAS,))),
    copies=COPIES,
    stacks=STACKS,
    classes={f'{name}ForConditionalGeneration': ('vocabulary',), f'{name}Model': ()},
    **others,
  )
