"""BART (arXiv:1910.13461) and mBART (2001.08210)."""

from llm_jax.hf.families import _encoder_decoders as shared

MODEL = 'encoder_decoder'

_POSITIONS = dict(positions='learned', position_offset=2, embedding_norm=True)

FAMILIES = {
  'bart': shared.bart('Bart', rank=120, options=_POSITIONS | dict(norm_order='post')),
  'mbart': shared.bart('MBart', rank=121, options=_POSITIONS | dict(norm_order='pre')),
}
