"""Marian's translation models (arXiv:1804.00344)."""

import dataclasses

from llm_jax.hf.families import _encoder_decoders as shared

MODEL = 'encoder_decoder'

_MARIAN = shared.bart(
  'Marian',
  rank=122,
  options=dict(positions='sinusoidal', position_offset=0, embedding_norm=False, norm_order='post'),
  fixed={'share_encoder_decoder_embeddings': (True, True)},
  ignored=(r'(en|de)coder\.embed_positions\.weight',),
)

FAMILIES = {
  'marian': dataclasses.replace(
    _MARIAN, classes={'MarianMTModel': ('vocabulary',), 'MarianModel': ()}
  )
}
