"""Causal Transformer decoder: GPT-2 (Radford et al., 2019), LLaMA 2 (arXiv:2307.09288) and 3
(2407.21783), by options.

Parameters: `embedder`, `stack/layers/block` (stacked), `final_norm` where norms come first,
  `output` where the vocabulary
projection is not tied.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.hf import family as F
from llm_jax.nn import layers as L
from llm_jax.nn.attention.dispatch import KeyValues


class Cache(NamedTuple):
  """What is kept of rows that grow: the tokens of each so far, [B], and the keys and values that
  each layer has of them.
  """

  lengths_B: jax.Array
  layers: Any


class Model(nn.Module):
  """Tokens to hidden states; no place sees a later one.

  Attributes (the rest as in `layers.Options` and `layers.Stack`): vocab_size: V. max_len: longest
    row; rows of the position table, if there is one. positions: 'learned' or 'rope'. position_std:
    standard deviation of the position table at initialisation (0.01 in GPT-2's code). rope_theta:
    base of the rotations. rope_scaling: None, (factor,), or LLaMA 3's (factor, low, high, original
    length), as in `layers.rope_frequencies`. window: how many places each layer sees, its own among
    them (Mistral, arXiv:2310.06825); None for all. tied: logits use the token table; otherwise a
    matrix of their own. remat: what backpropagation keeps, one of `layers.REMAT`, or 'auto'.
    unroll: layers a turn of the compiled loop; 0 for all.
  """

  vocab_size: int
  dim: int = 768
  layers: int = 12
  heads: int = 12
  kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int = 3072
  max_len: int = 1024
  positions: str = 'learned'
  position_std: float = 0.01
  rope_theta: float = 10000.0
  rope_scaling: tuple[float, ...] | None = None
  window: int | None = None
  norm: str = 'layernorm'
  norm_order: str = 'pre'
  norm_bias: bool = True
  norm_eps: float = 1e-5
  bias: bool = True
  qkv_bias: bool | None = None
  qk_norm: bool = False
  activation: str = 'gelu_tanh'
  gated: bool = False
  tied: bool = True
  dropout: float = 0.1
  attention_dropout: float = 0.1
  init_distribution: str = 'normal'
  init_std: float = 0.02
  depth_scaled_init: bool = True
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  attention: str = 'auto'
  remat: str = 'none'
  unroll: int = 1

  causal = True

  def __post_init__(self):
    super().__post_init__()
    L.check_model(self)
    if self.window is not None:
      L.check_positive('window', self.window)
    if self.rope_scaling is not None:
      if self.positions != 'rope':
        raise ValueError(f"rope_scaling needs positions='rope'; it is {self.positions!r}.")
      L.rope_frequencies(self.options.head_dim, self.rope_theta, self.rope_scaling)

  @property
  def options(self) -> L.Options:
    """What all layers share; heads are made from it too."""
    return L.Options(
      **{field.name: getattr(self, field.name) for field in dataclasses.fields(L.Options)}
    )

  def setup(self):
    self.embedder = L.Embedder(
      self.vocab_size,
      self.options,
      positions=self.max_len if self.positions == 'learned' else 0,
      position_std=self.position_std,
    )
    self.stack = L.Stack(
      self.options,
      window=self.window,
      global_every=1 if self.window is None else 0,
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
    cache: Cache | None = None,
  ) -> Any:
    """Hidden states [B, T, D], or [B, P, D], in the compute type, last norm included; with a cache
    also the cache after them.

    Args: tokens_BT: ids. segments_BT: document of each token, 0 for padding; a token sees only its
      own document. None: one document a row. positions_BT: place of each token in its document;
      None: its place in the row. token_types_BT: which text of a pair; decoders have no embedding
      for it, the separators tell. places_BP: places of each row whose states are wanted, without a
      cache; None for all. train: dropout is on, from the stream `dropout`. cache: of `empty_cache`,
      or as it was returned. One token a row (T = 1) follows those in it. More are the first of
      their
        rows, whatever the cache held: where segments are 0 they are padding, after all others, and
          stay out of it.

    Raises:
      ValueError: a row longer than `max_len`.
    """
    del token_types_BT
    L.check_length(tokens_BT.shape[1], self.max_len)
    lengths_B = None
    if cache is not None and tokens_BT.shape[1] == 1:
      lengths_B, positions_BT, segments_BT = cache.lengths_B + 1, cache.lengths_B[:, None], None
    elif cache is not None:
      real_BT = jnp.ones_like(tokens_BT) if segments_BT is None else jnp.int32(segments_BT > 0)
      lengths_B = jnp.sum(real_BT, axis=1, dtype=jnp.int32)
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    turn = None
    if self.positions == 'rope':
      frequencies = L.rope_frequencies(self.options.head_dim, self.rope_theta, self.rope_scaling)
      turn = L.rope(positions_BT, frequencies, self.options.wide)
    x_BTD = self.embedder(tokens_BT, positions_BT, None, train)
    x_BTD = self.stack(
      x_BTD, segments_BT, (turn, turn), train, cache and cache.layers, lengths_B, places_BP
    )
    x_BTD, layers = (x_BTD, None) if cache is None else x_BTD
    x_BTD = self.final_norm(x_BTD) if self.norm_order == 'pre' else x_BTD
    return x_BTD if cache is None else (x_BTD, Cache(lengths_B, layers))

  def empty_cache(self, rows: int, slots: int) -> Cache:
    """A cache for `rows` rows of at most `slots` tokens, in the compute type; layers with a window
    keep no more than that.
    """
    options, S = self.options, min(slots, self.window or slots)
    shape = (self.layers, rows, options.kv_heads or options.heads, S, options.head_dim)
    zeros = lambda: jnp.zeros(shape, L.DTYPES[self.dtype])
    return Cache(jnp.zeros(rows, jnp.int32), {'layers': (KeyValues(zeros(), zeros()),)})

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


_LLAMA = dict(
  positions='rope',
  norm='rmsnorm',
  norm_bias=False,
  norm_eps=1e-5,
  bias=False,
  activation='silu',
  gated=True,
  dropout=0.0,
  attention_dropout=0.0,
  depth_scaled_init=False,
)
VARIANTS = {
  'gpt_tiny': dict(
    dim=128, layers=4, heads=2, mlp_dim=512, positions='rope', dropout=0.0, attention_dropout=0.0
  ),
  'gpt2_small': dict(),
  'gpt2_medium': dict(dim=1024, layers=24, heads=16, mlp_dim=4096),
  'gpt2_large': dict(dim=1280, layers=36, heads=20, mlp_dim=5120),
  'gpt2_xl': dict(dim=1600, layers=48, heads=25, mlp_dim=6400),
  'llama_tiny': _LLAMA | dict(dim=128, layers=4, heads=4, kv_heads=2, mlp_dim=344),
  'llama_3_2_1b': _LLAMA
  | dict(
    dim=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    mlp_dim=8192,
    max_len=131072,
    rope_theta=500000.0,
    rope_scaling=(32.0, 1.0, 4.0, 8192.0),
  ),
  'llama_2_7b': _LLAMA
  | dict(dim=4096, layers=32, heads=32, mlp_dim=11008, max_len=4096, tied=False),
}


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
