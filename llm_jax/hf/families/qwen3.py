"""Qwen3 (arXiv:2505.09388): LLaMA with norms on queries and keys."""

from llm_jax.hf.families import _decoders as shared

MODEL = 'decoder'

FAMILIES = {
  'qwen3': shared.llama(
    'Qwen3',
    rank=90,
    fields={**shared.KV_HEADS, 'head_dim': ('head_dim', int, 128)},
    options={**shared.PLAIN, 'qk_norm': True, 'window': None},
    rules=(shared.FULL_ATTENTION,),
    fixed={'use_sliding_window': (False, False), 'attention_bias': (False, False)},
  )
}
