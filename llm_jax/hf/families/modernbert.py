"""ModernBERT (arXiv:2412.13663)."""

from collections.abc import Mapping
from typing import Any

from llm_jax.hf.families import _encoders as shared
from llm_jax.hf.family import Family, Rule
from llm_jax.hf.fields import ACTIVATIONS, field, rope
from llm_jax.hf.tensors import CLASSIFIES, HEADS_IN, bias, linear, norm, table, vocabulary

MODEL = 'encoder'
POOLS = {'cls': 'cls', 'mean': 'mean'}

_GLOBAL, _LOCAL = 'full_attention', 'sliding_attention'


def _read_layers(config: Mapping[str, Any]) -> dict[str, Any]:
  """Which layers see everywhere, and the bases of the rotations.

  A config.json gives them as `layer_types` and `rope_parameters`, or in their older spellings.
  """
  every = _global_every(config)
  window = field(config, 'local_attention', int, 128)
  if window % 2:
    raise ValueError(f'local_attention={window} must be even.')
  theta, local = _bases(config)
  return {
    'window': None if every == 1 else window,
    'global_every': every,
    'rope_theta': theta,
    'rope_local_theta': local,
  }


def _write_layers(options: Mapping[str, Any]) -> dict[str, Any]:
  return {
    'global_attn_every_n_layers': options['global_every'],
    'local_attention': options['window'] or 128,
    'global_rope_theta': options['rope_theta'],
    'local_rope_theta': options['rope_local_theta'],
  }


def _global_every(config: Mapping[str, Any]) -> int:
  """The n of: every n-th layer sees everywhere, layer 0 first."""
  layers = field(config, 'num_hidden_layers', int)
  every = field(config, 'global_attn_every_n_layers', int, 3)
  types = config.get('layer_types')
  if types is None:
    return every
  for n in range(1, layers + 1):
    if types == [_LOCAL if i % n else _GLOBAL for i in range(layers)]:
      return n
  raise ValueError(
    f'layer_types={types!r} is not supported; only {_GLOBAL} in layer 0 and every n-th after it is.'
  )


def _bases(config: Mapping[str, Any]) -> tuple[float, float]:
  """The bases of the rotations of global and of local layers."""
  given = config.get('rope_parameters') or {}
  theta = config.get('global_rope_theta', 160000.0)
  local = config.get('local_rope_theta', 10000.0)
  bases = []
  for kind, default in ((_GLOBAL, theta), (_LOCAL, theta if local is None else local)):
    parameters = given.get(kind) if isinstance(given, dict) else given
    base, scaling = rope({'rope_parameters': parameters or config.get('rope_scaling')}, default)
    if scaling is not None:
      raise ValueError(
        f'rope_parameters={parameters!r} is not supported; in ModernBERT only rope_type="default" '
        'is.'
      )
    bases.append(base)
  return bases[0], bases[1]


def _read_classifier(config: Mapping[str, Any]) -> dict[str, Any]:
  return {'pool': field(config, 'classifier_pooling', POOLS, 'cls'), 'transform': 'norm'}


def _write_classifier(objective: Mapping[str, Any]) -> dict[str, Any]:
  pool = objective.get('pool', 'cls')
  if pool not in POOLS:
    raise ValueError(
      f"objective.pool={pool!r} is none of ModernBERT's classifiers; they have cls or mean."
    )
  return {'classifier_pooling': pool}


_BODY = (
  *table('embeddings.tok_embeddings', 'model/embedder/token'),
  *norm('embeddings.norm', 'model/embedder/embedding_norm'),
  *linear(
    'layers.{}.attn.Wqkv',
    'attention/query',
    'attention/key',
    'attention/value',
    axes=('(SNH)D->DNH', '(SNH)->NH'),
  ),
  *linear('layers.{}.attn.Wo', 'attention/out', axes=HEADS_IN),
  *norm('layers.{}.attn_norm', 'attention_norm'),
  *linear('layers.{}.mlp.Wi', 'mlp/gate', 'mlp/up', axes=('(SO)I->IO', '(SO)->O')),
  *linear('layers.{}.mlp.Wo', 'mlp/down'),
  *norm('layers.{}.mlp_norm', 'mlp_norm'),
  *norm('final_norm', 'model/final_norm'),
)
_HEADS = (
  *linear('head.dense', 'heads_transform/dense'),  # the same tensors in both classes
  *norm('head.norm', 'heads_transform/norm'),
  *linear('classifier', 'heads_classifier/dense', of=CLASSIFIES),
  *shared.TAGGER,
  *linear('head.dense', 'heads_mlm/dense'),
  *norm('head.norm', 'heads_mlm/norm'),
  *bias('decoder.bias', 'heads_mlm/bias'),
  *vocabulary('decoder.weight'),
)

FAMILIES = {
  'modernbert': Family(
    rank=30,
    prefix='model.',
    fields={
      **shared.SHAPE_FIELDS,
      'hidden_activation': ('activation', ACTIVATIONS, 'gelu'),
      'classifier_activation': ('activation', ACTIVATIONS, 'gelu'),
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
    rules=(Rule(_read_layers, _write_layers),),
    options=dict(
      positions='rope',
      token_types=0,
      embedding_norm=True,
      norm='layernorm',
      norm_order='pre',
      gated=True,
    ),
    body=_BODY,
    heads=_HEADS,
    classes={
      'ModernBertForSequenceClassification': ('transform', 'classifier'),
      'ModernBertForTokenClassification': ('transform', 'tagger'),
      'ModernBertForMaskedLM': ('mlm',),
      'ModernBertModel': (),
    },
    classifier=Rule(_read_classifier, _write_classifier),
  )
}
