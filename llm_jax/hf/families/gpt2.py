"""GPT-2 (Radford et al., 2019)."""

from collections.abc import Mapping
from typing import Any

from llm_jax.hf.families import _decoders as shared
from llm_jax.hf.family import Family, Rule
from llm_jax.hf.fields import ACTIVATIONS, field
from llm_jax.hf.tensors import linear, norm, table, vocabulary

MODEL = 'decoder'

_AS_OURS = ('IO->IO', 'O->O')  # transformers' Conv1D: weights lie [in, out]


def _read_mlp(config: Mapping[str, Any]) -> dict[str, Any]:
  return {'mlp_dim': field(config, 'n_inner', int, None) or 4 * field(config, 'n_embd', int)}


_BODY = (
  *table('wte', 'model/embedder/token'),
  *table('wpe', 'model/embedder/position'),
  *norm('h.{}.ln_1', 'attention_norm'),
  *linear(
    'h.{}.attn.c_attn',
    'attention/query',
    'attention/key',
    'attention/value',
    axes=('D(SNH)->DNH', '(SNH)->NH'),
  ),
  *linear('h.{}.attn.c_proj', 'attention/out', axes=('(NH)D->NHD', 'D->D')),
  *norm('h.{}.ln_2', 'mlp_norm'),
  *linear('h.{}.mlp.c_fc', 'mlp/up', axes=_AS_OURS),
  *linear('h.{}.mlp.c_proj', 'mlp/down', axes=_AS_OURS),
  *norm('ln_f', 'model/final_norm'),
)

FAMILIES = {
  'gpt2': Family(
    rank=50,
    prefix='transformer.',
    fields={
      'vocab_size': ('vocab_size', int),
      'n_embd': ('dim', int),
      'n_layer': ('layers', int),
      'n_head': ('heads', int),
      'n_positions': ('max_len', int, 1024),
      'activation_function': ('activation', ACTIVATIONS, 'gelu_new'),
      'layer_norm_epsilon': ('norm_eps', float, 1e-5),
      'initializer_range': ('init_std', float, 0.02),
      'tie_word_embeddings': ('tied', bool, True),
      'resid_pdrop': ('dropout', float, 0.1),
      'embd_pdrop': ('dropout', float, 0.1),
      'attn_pdrop': ('attention_dropout', float, 0.1),
    },
    fixed={'scale_attn_weights': (True, True), 'scale_attn_by_inverse_layer_idx': (False, False)},
    rules=(Rule(_read_mlp, lambda options: {'n_inner': options['mlp_dim']}),),
    options={**shared.GPT_OPTIONS, 'positions': 'learned'},
    body=_BODY,
    heads=(*vocabulary('lm_head.weight'), *shared.SCORE),
    ignored=(r'h\.\d+\.attn\.(bias|masked_bias)',),
    classes={
      'GPT2ForSequenceClassification': ('classifier',),
      'GPT2LMHeadModel': ('vocabulary',),
      'GPT2Model': (),
    },
  )
}
