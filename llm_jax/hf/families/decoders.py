"""Families that `models.decoder` holds."""

from llm_jax.hf import family as F


def _rope(config):
  theta, scaling = F.rope(config, config.get('rope_theta', 10000.0))
  return dict(rope_theta=theta, rope_scaling=scaling)


def _neox_rope(config):
  part = {'partial_rotary_factor': config.get('rotary_pct', 0.25)}
  theta, scaling = F.rope(part | config, config.get('rotary_emb_base', 10000.0))
  return dict(rope_theta=theta, rope_scaling=scaling)


def _full_attention(config):
  types = config.get('layer_types') or []
  if not isinstance(types, list) or any(kind != 'full_attention' for kind in types):
    raise ValueError(f'layer_types={types!r} cannot be done here; only full_attention can.')
  return {}


_ROPE = F.Rule(
  _rope,
  lambda o: {'rope_theta': o['rope_theta'], 'rope_scaling': F.rope_scaling(o['rope_scaling'])},
)
_NEOX_ROPE = F.Rule(
  _neox_rope,
  lambda o: {
    'rotary_emb_base': o['rope_theta'],
    'rotary_pct': 1.0,
    'rope_scaling': F.rope_scaling(o['rope_scaling']),
  },
)
_FULL = F.Rule(_full_attention, lambda o: {})
_GPT2_MLP = F.Rule(
  lambda config: {
    'mlp_dim': F.field(config, 'n_inner', int, None) or 4 * F.field(config, 'n_embd', int)
  },
  lambda o: {'n_inner': o['mlp_dim']},
)
_MISTRAL_WINDOW = F.Rule(
  lambda config: {
    'window': F.field({'sliding_window': 4096} | config, 'sliding_window', int, None)
  },
  lambda o: {'sliding_window': o['window']},
)

_LLAMA_FIELDS = {
  'vocab_size': ('vocab_size', int),
  'hidden_size': ('dim', int),
  'num_hidden_layers': ('layers', int),
  'num_attention_heads': ('heads', int),
  'num_key_value_heads': ('kv_heads', int, None),
  'head_dim': ('head_dim', int, None),
  'intermediate_size': ('mlp_dim', int),
  'hidden_act': ('activation', F.ACTIVATIONS, 'silu'),
  'max_position_embeddings': ('max_len', int),
  'rms_norm_eps': ('norm_eps', float, 1e-6),
  'initializer_range': ('init_std', float, 0.02),
  'tie_word_embeddings': ('tied', bool, False),
  'attention_dropout': ('attention_dropout', float, 0.0),
}
_KV_HEADS = {'num_key_value_heads': ('kv_heads', int)}
_LLAMA_OPTIONS = dict(
  positions='rope', norm='rmsnorm', norm_order='pre', norm_bias=False, gated=True, dropout=0.0
)
_PLAIN = dict(bias=False, qkv_bias=False, qk_norm=False)
_LLAMA_LAYER = tuple(
  tensor
  for theirs, ours, axes in (
    ('self_attn.q_proj', 'attention/query', F.HEADS_OUT),
    ('self_attn.k_proj', 'attention/key', F.HEADS_OUT),
    ('self_attn.v_proj', 'attention/value', F.HEADS_OUT),
    ('self_attn.o_proj', 'attention/out', F.HEADS_IN),
    ('mlp.gate_proj', 'mlp/gate', F.LINEAR),
    ('mlp.up_proj', 'mlp/up', F.LINEAR),
    ('mlp.down_proj', 'mlp/down', F.LINEAR),
  )
  for tensor in F.linear(f'layers.{{}}.{theirs}', ours, axes=axes)
)
_GPT_OPTIONS = dict(
  norm='layernorm', norm_order='pre', norm_bias=True, bias=True, gated=False, window=None
)
_SCORE = (F.Tensor('score.weight', 'OI->IO', ('heads_classifier/dense/kernel',)),)


def _llama(name, fields, options, rules=(_ROPE,), fixed=None):
  """A family with LLaMA's names of tensors."""
  return F.Family(
    prefix='model.',
    fields=_LLAMA_FIELDS | fields,
    options=_LLAMA_OPTIONS | options,
    body=(
      *F.table('embed_tokens', 'model/embedder/token'),
      *_LLAMA_LAYER,
      *F.norm('layers.{}.input_layernorm', 'attention_norm'),
      *F.norm('layers.{}.post_attention_layernorm', 'mlp_norm'),
      F.Tensor('layers.{}.self_attn.q_norm.weight', 'H->H', ('attention/query_norm/scale',)),
      F.Tensor('layers.{}.self_attn.k_norm.weight', 'H->H', ('attention/key_norm/scale',)),
      *F.norm('norm', 'model/final_norm'),
    ),
    heads=(*F.vocabulary('lm_head.weight'), *_SCORE),
    rules=rules,
    fixed=fixed or {},
    ignored=(r'.*rotary_emb\.inv_freq',),
    classes={
      f'{name}ForSequenceClassification': ('classifier',),
      f'{name}ForCausalLM': ('vocabulary',),
      f'{name}Model': (),
    },
  )


HF = {
  'gpt2': F.Family(
    prefix='transformer.',
    rules=(_GPT2_MLP,),
    ignored=(r'h\.\d+\.attn\.(bias|masked_bias)',),
    fields={
      'vocab_size': ('vocab_size', int),
      'n_embd': ('dim', int),
      'n_layer': ('layers', int),
      'n_head': ('heads', int),
      'n_positions': ('max_len', int, 1024),
      'activation_function': ('activation', F.ACTIVATIONS, 'gelu_new'),
      'layer_norm_epsilon': ('norm_eps', float, 1e-5),
      'initializer_range': ('init_std', float, 0.02),
      'tie_word_embeddings': ('tied', bool, True),
      'resid_pdrop': ('dropout', float, 0.1),
      'embd_pdrop': ('dropout', float, 0.1),
      'attn_pdrop': ('attention_dropout', float, 0.1),
    },
    fixed={'scale_attn_weights': (True, True), 'scale_attn_by_inverse_layer_idx': (False, False)},
    options=_GPT_OPTIONS | dict(positions='learned'),
    body=(
      *F.table('wte', 'model/embedder/token'),
      *F.table('wpe', 'model/embedder/position'),
      *F.norm('h.{}.ln_1', 'attention_norm'),
      *F.linear(
        'h.{}.attn.c_attn',
        'attention/query',
        'attention/key',
        'attention/value',
        axes=('D(SNH)->DNH', '(SNH)->NH'),
      ),
      *F.linear('h.{}.attn.c_proj', 'attention/out', axes=('(NH)D->NHD', 'D->D')),
      *F.norm('h.{}.ln_2', 'mlp_norm'),
      *F.linear('h.{}.mlp.c_fc', 'mlp/up', axes=('IO->IO', 'O->O')),
      *F.linear('h.{}.mlp.c_proj', 'mlp/down', axes=('IO->IO', 'O->O')),
      *F.norm('ln_f', 'model/final_norm'),
    ),
    heads=(*F.vocabulary('lm_head.weight'), *_SCORE),
    classes={
      'GPT2ForSequenceClassification': ('classifier',),
      'GPT2LMHeadModel': ('vocabulary',),
      'GPT2Model': (),
    },
  ),
  'llama': _llama(
    'Llama',
    {'attention_bias': ('bias', bool, False), 'mlp_bias': ('bias', bool, False)},
    dict(qkv_bias=None, qk_norm=False, window=None),
  ),
  'mistral': _llama('Mistral', _KV_HEADS, _PLAIN, rules=(_ROPE, _MISTRAL_WINDOW)),
  'qwen2': _llama(
    'Qwen2',
    _KV_HEADS,
    _PLAIN | dict(qkv_bias=True, window=None),
    rules=(_ROPE, _FULL),
    fixed={'use_sliding_window': (False, False)},
  ),
  'qwen3': _llama(
    'Qwen3',
    _KV_HEADS | {'head_dim': ('head_dim', int, 128)},
    _PLAIN | dict(qk_norm=True, window=None),
    rules=(_ROPE, _FULL),
    fixed={'use_sliding_window': (False, False), 'attention_bias': (False, False)},
  ),
  'gpt_neox': F.Family(
    prefix='gpt_neox.',
    rules=(_NEOX_ROPE,),
    ignored=(r'layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)',),
    fields={
      'vocab_size': ('vocab_size', int),
      'hidden_size': ('dim', int),
      'num_hidden_layers': ('layers', int),
      'num_attention_heads': ('heads', int),
      'intermediate_size': ('mlp_dim', int),
      'hidden_act': ('activation', F.ACTIVATIONS, 'gelu'),
      'max_position_embeddings': ('max_len', int, 2048),
      'layer_norm_eps': ('norm_eps', float, 1e-5),
      'initializer_range': ('init_std', float, 0.02),
      'tie_word_embeddings': ('tied', bool, False),
      'hidden_dropout': ('dropout', float, 0.0),
      'attention_dropout': ('attention_dropout', float, 0.0),
    },
    fixed={'use_parallel_residual': (False, True), 'attention_bias': (True, True)},
    options=_GPT_OPTIONS | dict(positions='rope'),
    body=(
      *F.table('embed_in', 'model/embedder/token'),
      *F.norm('layers.{}.input_layernorm', 'attention_norm'),
      *F.linear(
        'layers.{}.attention.query_key_value',
        'attention/query',
        'attention/key',
        'attention/value',
        axes=('(NSH)D->DNH', '(NSH)->NH'),
      ),
      *F.linear('layers.{}.attention.dense', 'attention/out', axes=F.HEADS_IN),
      *F.norm('layers.{}.post_attention_layernorm', 'mlp_norm'),
      *F.linear('layers.{}.mlp.dense_h_to_4h', 'mlp/up'),
      *F.linear('layers.{}.mlp.dense_4h_to_h', 'mlp/down'),
      *F.norm('final_layer_norm', 'model/final_norm'),
    ),
    heads=(*F.vocabulary('embed_out.weight'), *_SCORE),
    copies={'lm_head.weight': 'embed_out.weight'},
    classes={
      'GPTNeoXForSequenceClassification': ('classifier',),
      'GPTNeoXForCausalLM': ('vocabulary',),
      'GPTNeoXModel': (),
    },
  ),
}
"""Hugging Face's families that this model can be, by `model_type`."""
