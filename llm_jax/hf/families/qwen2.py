"""Qwen2 and 2.5 (arXiv:2407.10671, 2412.15115): LLaMA with biases of queries, keys and values."""

from llm_jax.hf.families import _decoders as shared

MODEL = 'decoder'

FAMILIES = {
  'qwen2': shared.llama(
    'Qwen2',
    rank=80,
    fields=shared.KV_HEADS,
    options={**shared.PLAIN, 'qkv_bias': True, 'window': None},
    rules=(shared.FULL_ATTENTION,),
    fixed={'use_sliding_window': (False, False)},
  )
}
