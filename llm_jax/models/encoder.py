"""Bidirectional Transformer encoder: BERT (arXiv:1810.04805), RoBERTa (1907.11692), ModernBERT
(2412.13663), by options.

Parameters: `embedder`, `stack/first` (ModernBERT's first layer), `stack/layers/block*` (stacked),
  `final_norm` where norms come
first, `output` where the vocabulary projection is not tied.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.hf import family as F
from llm_jax.nn import layers as L


class Model(nn.Module):
  """Tokens to hidden states.

  Attributes (the rest as in `layers.Options` and `layers.Stack`): vocab_size: V. max_len: longest
    row; rows of the position table, if there is one. positions: 'learned' or 'rope'.
    position_offset: rows of the position table left free before position 0 (RoBERTa: 2).
    rope_theta: base of the rotations of layers that see everywhere. rope_local_theta: base of those
    with a window. token_types: kinds of text in a pair that are told apart by an embedding; 0 for
    no such embedding. embedding_norm: a norm on the embeddings; layer 0 of a pre-norm stack then
    has none before its attention. window: how far local layers see, half to either side; None where
    there are none. global_every: one layer in so many sees everywhere, layer 0 first. tied: logits
    use the token table; otherwise a matrix of their own. remat: what backpropagation keeps, one of
    `layers.REMAT`, or 'auto'. unroll: layer groups a turn of the compiled loop; 0 for all.
  """

  vocab_size: int
  dim: int = 768
  layers: int = 12
  heads: int = 12
  kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int = 3072
  max_len: int = 512
  positions: str = 'learned'
  position_offset: int = 0
  rope_theta: float = 10000.0
  rope_local_theta: float = 10000.0
  token_types: int = 2
  embedding_norm: bool = True
  norm: str = 'layernorm'
  norm_order: str = 'post'
  norm_bias: bool = True
  norm_eps: float = 1e-12
  bias: bool = True
  qkv_bias: bool | None = None
  qk_norm: bool = False
  activation: str = 'gelu'
  gated: bool = False
  window: int | None = None
  global_every: int = 1
  tied: bool = True
  dropout: float = 0.1
  attention_dropout: float = 0.1
  init_distribution: str = 'truncated_normal'
  init_std: float = 0.02
  depth_scaled_init: bool = False
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  attention: str = 'auto'
  remat: str = 'none'
  unroll: int = 1

  causal = False

  def __post_init__(self):
    super().__post_init__()
    L.check_model(self)
    for name in ('position_offset', 'token_types'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 0.')
    L.check_pattern(self.layers, self.window, self.global_every, self.first_bare)

  @property
  def options(self) -> L.Options:
    """What all layers share; heads are made from it too."""
    return L.Options(
      **{field.name: getattr(self, field.name) for field in dataclasses.fields(L.Options)}
    )

  @property
  def first_bare(self) -> bool:
    """Whether layer 0 has no norm before its attention."""
    return self.embedding_norm and self.norm_order == 'pre'

  def setup(self):
    self.embedder = L.Embedder(
      self.vocab_size,
      self.options,
      positions=self.max_len + self.position_offset if self.positions == 'learned' else 0,
      position_offset=self.position_offset,
      token_types=self.token_types,
      norm=self.embedding_norm,
    )
    self.stack = L.Stack(
      self.options,
      window=self.window,
      global_every=self.global_every,
      first_bare=self.first_bare,
      remat=self.remat,
      unroll=self.unroll,
    )
    if self.norm_order == 'pre':
      self.final_norm = L.Norm(self.options)
    if not self.tied:
      self.output = L.Output(self.vocab_size, self.options)

  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    token_types_BT: jax.Array | None = None,
    places_BP: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Hidden states [B, T, D], or [B, P, D], in the compute type, last norm included.

    Args: tokens_BT: ids. segments_BT: document of each token, 0 for padding; a token sees only its
      own document. None: one document a row. positions_BT: place of each token in its document;
      None: its place in the row. token_types_BT: 0 or 1, first or second text; None: all first.
      places_BP: places of each row whose states are wanted; None for all. train: dropout is on,
      from the stream `dropout`.

    Raises:
      ValueError: a row longer than `max_len`.
    """
    L.check_length(tokens_BT.shape[1], self.max_len)
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    turns = (None, None)
    if self.positions == 'rope':
      turns = tuple(
        L.rope(positions_BT, L.rope_frequencies(self.options.head_dim, theta), self.options.wide)
        for theta in (self.rope_theta, self.rope_local_theta)
      )
    x_BTD = self.embedder(tokens_BT, positions_BT, token_types_BT, train)
    x_BTD = self.stack(x_BTD, segments_BT, turns, train, places_BP=places_BP)
    return self.final_norm(x_BTD) if self.norm_order == 'pre' else x_BTD

  def table(self) -> jax.Array:
    """The projection on the vocabulary, [V, D]: logits are inner products with its rows
    (`vocabulary.cross_entropy`).
    """
    return self.embedder.token.embedding if self.tied else self.output.kernel.T

  def logits(self, x_BMD: jax.Array) -> jax.Array:
    """Projection on the vocabulary, [B, M, V], at least float32, all at once; the losses go through
    it in chunks.
    """
    return jnp.einsum(
      '...D,VD->...V',
      x_BMD,
      self.table().astype(x_BMD.dtype),
      preferred_element_type=self.options.wide,
    )


VARIANTS = {
  # Norms first and rotary positions, as in ModernBERT: BERT's own order needs far more text before
  # it beats a unigram model.
  'bert_tiny': dict(
    dim=128,
    layers=4,
    heads=2,
    mlp_dim=512,
    positions='rope',
    norm_order='pre',
    embedding_norm=False,
    token_types=0,
    dropout=0.0,
    attention_dropout=0.0,
  ),
  'bert_base': dict(),
  'bert_large': dict(dim=1024, layers=24, heads=16, mlp_dim=4096),
  'roberta_base': dict(position_offset=2, token_types=1, norm_eps=1e-5),
  'modernbert_base': dict(
    layers=22,
    mlp_dim=1152,
    max_len=8192,
    positions='rope',
    rope_theta=160000.0,
    rope_local_theta=10000.0,
    token_types=0,
    norm_order='pre',
    norm_bias=False,
    norm_eps=1e-5,
    bias=False,
    gated=True,
    window=128,
    global_every=3,
    dropout=0.0,
    attention_dropout=0.0,
    depth_scaled_init=True,
  ),
}


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
