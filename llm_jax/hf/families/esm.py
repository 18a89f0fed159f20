"""ESM-2 (doi:10.1126/science.ade2574), a model for proteins.

Of all encoders in transformers it is the one with norms first, rotary positions and a plain mlp, so
that a `bert_tiny` of ours can be exported.
"""

from llm_jax.hf.families import _encoders as shared
from llm_jax.hf.family import Family, Rule
from llm_jax.hf.tensors import norm

MODEL = 'encoder'

_BODY = (
  *shared.TOKEN_TABLE,
  *shared.LAYER,
  *norm('encoder.layer.{}.attention.LayerNorm', 'attention_norm'),
  *norm('encoder.layer.{}.LayerNorm', 'mlp_norm'),
  *norm('encoder.emb_layer_norm_after', 'model/final_norm'),
  *shared.POOLER,
)

FAMILIES = {
  'esm': Family(
    rank=40,
    prefix='esm.',
    fields={
      **shared.BERT_FIELDS,
      'rope_theta': ('rope_theta', float, 10000.0),
      'max_position_embeddings': ('max_len', int, 1026),
    },
    fixed={
      'position_embedding_type': ('rotary', 'absolute'),
      'emb_layer_norm_before': (False, False),
      'token_dropout': (False, False),
      'is_folding_model': (False, False),
    },
    rules=(Rule(lambda config: {}, lambda options: {'pad_token_id': 0}),),
    options=dict(
      positions='rope',
      token_types=0,
      embedding_norm=False,
      norm='layernorm',
      norm_order='pre',
      norm_bias=True,
      bias=True,
      activation='gelu',
      gated=False,
      window=None,
      global_every=1,
    ),
    body=_BODY,
    heads=(*shared.LM_HEAD, *shared.CLASSIFIER, *shared.TAGGER),
    ignored=(*shared.POSITION_IDS, r'.*inv_freq', r'contact_head\..*'),
    classes={
      'EsmForSequenceClassification': ('pooler', 'classifier'),
      'EsmForTokenClassification': ('tagger',),
      'EsmForMaskedLM': ('mlm',),
      'EsmModel': (),
    },
  )
}
