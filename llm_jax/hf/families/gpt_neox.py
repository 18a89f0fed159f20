"""GPT-NeoX (arXiv:2204.06745) and Pythia (2304.01373), where they are built as ours is: with one
residual after the other, and rotations of all dimensions of a head.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.hf.families import _decoders as shared
from llm_jax.hf.family import Family, Rule
from llm_jax.hf.fields import ACTIVATIONS, rope, rope_scaling
from llm_jax.hf.tensors import HEADS_IN, linear, norm, table, vocabulary

MODEL = 'decoder'


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
  part = {'partial_rotary_factor': config.get('rotary_pct', 0.25)}
  theta, scaling = rope(part | config, config.get('rotary_emb_base', 10000.0))
  return {'rope_theta': theta, 'rope_scaling': scaling}


def _write_rope(options: Mapping[str, Any]) -> dict[str, Any]:
  return {
    'rotary_emb_base': options['rope_theta'],
    'rotary_pct': 1.0,
    'rope_scaling': rope_scaling(options['rope_scaling']),
  }


_BODY = (
  *table('embed_in', 'model/embedder/token'),
  *norm('layers.{}.input_layernorm', 'attention_norm'),
  *linear(
    'layers.{}.attention.query_key_value',
    'attention/query',
    'attention/key',
    'attention/value',
    axes=('(NSH)D->DNH', '(NSH)->NH'),
  ),
  *linear('layers.{}.attention.dense', 'attention/out', axes=HEADS_IN),
  *norm('layers.{}.post_attention_layernorm', 'mlp_norm'),
  *linear('layers.{}.mlp.dense_h_to_4h', 'mlp/up'),
  *linear('layers.{}.mlp.dense_4h_to_h', 'mlp/down'),
  *norm('final_layer_norm', 'model/final_norm'),
)

FAMILIES = {
  'gpt_neox': Family(
    rank=100,
    prefix='gpt_neox.',
    fields={
      'vocab_size': ('vocab_size', int),
      'hidden_size': ('dim', int),
      'num_hidden_layers': ('layers', int),
      'num_attention_heads': ('heads', int),
      'intermediate_size': ('mlp_dim', int),
      'hidden_act': ('activation', ACTIVATIONS, 'gelu'),
      'max_position_embeddings': ('max_len', int, 2048),
      'layer_norm_eps': ('norm_eps', float, 1e-5),
      'initializer_range': ('init_std', float, 0.02),
      'tie_word_embeddings': ('tied', bool, False),
      'hidden_dropout': ('dropout', float, 0.0),
      'attention_dropout': ('attention_dropout', float, 0.0),
    },
    fixed={'use_parallel_residual': (False, True), 'attention_bias': (True, True)},
    rules=(Rule(_read_rope, _write_rope),),
    options={**shared.GPT_OPTIONS, 'positions': 'rope'},
    body=_BODY,
    heads=(*vocabulary('embed_out.weight'), *shared.SCORE),
    copies={'lm_head.weight': 'embed_out.weight'},
    ignored=(r'layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)',),
    classes={
      'GPTNeoXForSequenceClassification': ('classifier',),
      'GPTNeoXForCausalLM': ('vocabulary',),
      'GPTNeoXModel': (),
    },
  )
}
