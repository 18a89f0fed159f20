"""Families that `models.encoder` holds."""

import dataclasses

from llm_jax.hf import family as F


_SHAPE = {
  'vocab_size': ('vocab_size', int),
  'hidden_size': ('dim', int),
  'num_hidden_layers': ('layers', int),
  'num_attention_heads': ('heads', int),
  'intermediate_size': ('mlp_dim', int),
  'initializer_range': ('init_std', float, 0.02),
  'tie_word_embeddings': ('tied', bool, True),
}
_BERT = _SHAPE | {
  'layer_norm_eps': ('norm_eps', float, 1e-12),
  'hidden_dropout_prob': ('dropout', float, 0.1),
  'attention_probs_dropout_prob': ('attention_dropout', float, 0.1),
}
_POST = dict(
  positions='learned',
  embedding_norm=True,
  norm='layernorm',
  norm_order='post',
  norm_bias=True,
  bias=True,
  gated=False,
  window=None,
  global_every=1,
)
_ABSOLUTE = {'position_embedding_type': ('absolute', 'absolute')}
_IDS = (r'(embeddings\.)?position_ids',)


def _roberta_positions(config):
  """RoBERTa counts places from pad_token_id + 1; the rows before are free."""
  offset = F.field(config, 'pad_token_id', int, 1) + 1 if config.get('pad_token_id') != 0 else 1
  rows = F.field(config, 'max_position_embeddings', int)
  if rows <= offset:
    raise ValueError(
      f'max_position_embeddings={rows} must be more than pad_token_id + 1 = {offset}.'
    )
  return dict(position_offset=offset, max_len=rows - offset)


def _modernbert_layers(config):
  """Which layers see everywhere, and the bases of the rotations: `layer_types`, `rope_parameters`
  or their older spellings.
  """
  layers = F.field(config, 'num_hidden_layers', int)
  every = F.field(config, 'global_attn_every_n_layers', int, 3)
  types = config.get('layer_types')
  if types is not None:
    pattern = lambda n: ['sliding_attention' if i % n else 'full_attention' for i in range(layers)]
    every = next((n for n in range(1, layers + 1) if pattern(n) == types), None)
    if every is None:
      raise ValueError(
        f'layer_types={types!r} cannot be done here; only full_attention in layer 0 and every n-th '
        'after it.'
      )
  window = F.field(config, 'local_attention', int, 128)
  if window % 2:
    raise ValueError(f'local_attention={window} must be even.')
  said = config.get('rope_parameters') or {}
  local = config.get('local_rope_theta', 10000.0)
  thetas = {'full_attention': config.get('global_rope_theta', 160000.0)}
  thetas['sliding_attention'] = thetas['full_attention'] if local is None else local
  bases = []
  for kind, theta in thetas.items():
    parameters = said.get(kind) if isinstance(said, dict) else said
    base, scaling = F.rope({'rope_parameters': parameters or config.get('rope_scaling')}, theta)
    if scaling is not None:
      raise ValueError(
        f'rope_parameters={parameters!r} cannot be done here; in ModernBERT only '
        'rope_type="default" can.'
      )
    bases.append(base)
  return dict(
    window=None if every == 1 else window,
    global_every=every,
    rope_theta=bases[0],
    rope_local_theta=bases[1],
  )


_ROBERTA_POSITIONS = F.Rule(
  _roberta_positions,
  lambda o: {
    'pad_token_id': o['position_offset'] - 1,
    'max_position_embeddings': o['max_len'] + o['position_offset'],
  },
)
_MODERNBERT_LAYERS = F.Rule(
  _modernbert_layers,
  lambda o: {
    'global_attn_every_n_layers': o['global_every'],
    'local_attention': o['window'] or 128,
    'global_rope_theta': o['rope_theta'],
    'local_rope_theta': o['rope_local_theta'],
  },
)

_EMBEDDINGS = (
  *F.table('embeddings.word_embeddings', 'model/embedder/token'),
  *F.table('embeddings.position_embeddings', 'model/embedder/position'),
  *F.table('embeddings.token_type_embeddings', 'model/embedder/token_type'),
  *F.norm('embeddings.LayerNorm', 'model/embedder/embedding_norm'),
)
_LAYER = (
  *(
    tensor
    for name in ('query', 'key', 'value')
    for tensor in F.linear(
      f'encoder.layer.{{}}.attention.self.{name}', f'attention/{name}', axes=F.HEADS_OUT
    )
  ),
  *F.linear('encoder.layer.{}.attention.output.dense', 'attention/out', axes=F.HEADS_IN),
  *F.linear('encoder.layer.{}.intermediate.dense', 'mlp/up'),
  *F.linear('encoder.layer.{}.output.dense', 'mlp/down'),
)
_POST_NORMS = (
  *F.norm('encoder.layer.{}.attention.output.LayerNorm', 'attention_norm'),
  *F.norm('encoder.layer.{}.output.LayerNorm', 'mlp_norm'),
)
_POOLER = F.linear('pooler.dense', 'heads_pooler/dense')
# RoBERTa's names of heads, which ESM has too.
_LM_HEAD = (
  *F.linear('lm_head.dense', 'heads_mlm/dense'),
  *F.norm('lm_head.layer_norm', 'heads_mlm/norm'),
  *F.bias('lm_head.bias', 'heads_mlm/bias'),
  *F.vocabulary('lm_head.decoder.weight'),
)
_CLASSIFIER = (
  *F.linear('classifier.dense', 'heads_pooler/dense', beside='heads_classifier'),
  *F.linear('classifier.out_proj', 'heads_classifier/dense'),
)

_ROBERTA = F.Family(
  prefix='roberta.',
  options=_POST,
  fixed=_ABSOLUTE,
  rules=(_ROBERTA_POSITIONS,),
  ignored=_IDS,
  fields=_BERT
  | {
    'hidden_act': ('activation', {'gelu': 'gelu'}, 'gelu'),
    'type_vocab_size': ('token_types', int, 2),
  },
  body=(*_EMBEDDINGS, *_LAYER, *_POST_NORMS, *_POOLER),
  heads=(*_LM_HEAD, *_CLASSIFIER),
  copies={'lm_head.decoder.bias': 'lm_head.bias'},
  classes={
    'RobertaForSequenceClassification': ('pooler', 'classifier'),
    'RobertaForMaskedLM': ('mlm',),
    'RobertaModel': (),
  },
)

HF = {
  'bert': F.Family(
    prefix='bert.',
    options=_POST | dict(position_offset=0),
    fixed=_ABSOLUTE,
    ignored=_IDS,
    fields=_BERT
    | {
      'hidden_act': ('activation', F.ACTIVATIONS, 'gelu'),
      'type_vocab_size': ('token_types', int, 2),
      'max_position_embeddings': ('max_len', int, 512),
    },
    body=(*_EMBEDDINGS, *_LAYER, *_POST_NORMS, *_POOLER),
    heads=(
      *F.linear('cls.predictions.transform.dense', 'heads_mlm/dense'),
      *F.norm('cls.predictions.transform.LayerNorm', 'heads_mlm/norm'),
      *F.bias('cls.predictions.bias', 'heads_mlm/bias'),
      *F.vocabulary('cls.predictions.decoder.weight'),
      *F.linear('cls.seq_relationship', 'heads_nsp/dense'),
      *F.linear('classifier', 'heads_classifier/dense'),
    ),
    copies={'cls.predictions.decoder.bias': 'cls.predictions.bias'},
    classes={
      'BertForPreTraining': ('mlm', 'pooler', 'nsp'),
      'BertForSequenceClassification': ('pooler', 'classifier'),
      'BertForMaskedLM': ('mlm',),
      'BertForNextSentencePrediction': ('pooler', 'nsp'),
      'BertModel': (),
    },
  ),
  'roberta': _ROBERTA,
  'xlm-roberta': dataclasses.replace(
    _ROBERTA, classes={f'XLM{name}': heads for name, heads in _ROBERTA.classes.items()}
  ),
  'modernbert': F.Family(
    prefix='model.',
    rules=(_MODERNBERT_LAYERS,),
    options=dict(
      positions='rope',
      token_types=0,
      embedding_norm=True,
      norm='layernorm',
      norm_order='pre',
      gated=True,
    ),
    fields=_SHAPE
    | {
      'hidden_activation': ('activation', F.ACTIVATIONS, 'gelu'),
      'classifier_activation': ('activation', F.ACTIVATIONS, 'gelu'),
      'max_position_embeddings': ('max_len', int, 8192),
      'norm_eps': ('norm_eps', float, 1e-5),
      'norm_bias': ('norm_bias', bool, False),
      'attention_bias': ('bias', bool, False),
      'mlp_bias': ('bias', bool, False),
      'classifier_bias': ('bias', bool, False),
      'mlp_dropout': ('dropout', float, 0.0),
      'embedding_dropout': ('dropout', float, 0.0),
      'attention_dropout': ('attention_dropout', float, 0.0),
    },
    fixed={'decoder_bias': (True, True)},
    body=(
      *F.table('embeddings.tok_embeddings', 'model/embedder/token'),
      *F.norm('embeddings.norm', 'model/embedder/embedding_norm'),
      *F.linear(
        'layers.{}.attn.Wqkv',
        'attention/query',
        'attention/key',
        'attention/value',
        axes=('(SNH)D->DNH', '(SNH)->NH'),
      ),
      *F.linear('layers.{}.attn.Wo', 'attention/out', axes=F.HEADS_IN),
      *F.norm('layers.{}.attn_norm', 'attention_norm'),
      *F.linear('layers.{}.mlp.Wi', 'mlp/gate', 'mlp/up', axes=('(SO)I->IO', '(SO)->O')),
      *F.linear('layers.{}.mlp.Wo', 'mlp/down'),
      *F.norm('layers.{}.mlp_norm', 'mlp_norm'),
      *F.norm('final_norm', 'model/final_norm'),
    ),
    heads=(
      *F.linear('head.dense', 'heads_mlm/dense'),
      *F.norm('head.norm', 'heads_mlm/norm'),
      *F.bias('decoder.bias', 'heads_mlm/bias'),
      *F.vocabulary('decoder.weight'),
    ),
    classes={'ModernBertForMaskedLM': ('mlm',), 'ModernBertModel': ()},
  ),
  # A model for proteins; of all of transformers' encoders the one with norms first, rotary
  # positions and a plain mlp.
  'esm': F.Family(
    prefix='esm.',
    ignored=(*_IDS, r'.*inv_freq', r'contact_head\..*'),
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
    fields=_BERT
    | {
      'rope_theta': ('rope_theta', float, 10000.0),
      'max_position_embeddings': ('max_len', int, 1026),
    },
    fixed={
      'position_embedding_type': ('rotary', 'absolute'),
      'emb_layer_norm_before': (False, False),
      'token_dropout': (False, False),
      'is_folding_model': (False, False),
    },
    rules=(F.Rule(lambda config: {}, lambda options: {'pad_token_id': 0}),),
    body=(
      *_EMBEDDINGS[:1],
      *_LAYER,
      *F.norm('encoder.layer.{}.attention.LayerNorm', 'attention_norm'),
      *F.norm('encoder.layer.{}.LayerNorm', 'mlp_norm'),
      *F.norm('encoder.emb_layer_norm_after', 'model/final_norm'),
      *_POOLER,
    ),
    heads=(*_LM_HEAD, *_CLASSIFIER),
    classes={
      'EsmForSequenceClassification': ('pooler', 'classifier'),
      'EsmForMaskedLM': ('mlm',),
      'EsmModel': (),
    },
  ),
}
"""Hugging Face's families that this model can be, by `model_type`."""
