"""LLaMA 1 to 3 (arXiv:2302.13971, 2307.09288, 2407.21783)."""

from llm_jax.hf.families import _decoders as shared

MODEL = 'decoder'

FAMILIES = {
  'llama': shared.llama(
    'Llama',
    rank=60,
    fields={'attention_bias': ('bias', bool, False), 'mlp_bias': ('bias', bool, False)},
    options=dict(qkv_bias=None, qk_norm=False, window=None),
  )
}
