"""Mistral (arXiv:2310.06825): LLaMA with a window."""

from collections.abc import Mapping
from typing import Any

from llm_jax.hf.families import _decoders as shared
from llm_jax.hf.family import Rule
from llm_jax.hf.fields import field

MODEL = 'decoder'


def _read_window(config: Mapping[str, Any]) -> dict[str, Any]:
  given = {'sliding_window': 4096} | config  # null, which means no window, is not left out
  return {'window': field(given, 'sliding_window', int, None)}


_WINDOW = Rule(_read_window, lambda options: {'sliding_window': options['window']})

FAMILIES = {
  'mistral': shared.llama(
    'Mistral', rank=70, fields=shared.KV_HEADS, options=shared.PLAIN, rules=(_WINDOW,)
  )
}
