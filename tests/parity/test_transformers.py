"""The same weights in Hugging Face's models and in ours: the same logits, and for BERT and GPT-2 the same gradients.

The reference runs in float32 on the CPU with eager attention and no dropout; weights are random. Two rows, one of them padded.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import heads
from llm_jax.models import decoder, encoder

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

V, D, N, F, T = 60, 32, 4, 48, 12
OURS = dict(vocab_size=V, dim=D, heads=N, mlp_dim=F, max_len=16, dropout=0.0, attention_dropout=0.0)
THEIRS = dict(vocab_size=V, hidden_size=D, num_attention_heads=N, intermediate_size=F, attn_implementation='eager',
              pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
SEGMENTS = np.array([[1] * T, [1] * 8 + [0] * 4])
TOKENS = np.where(SEGMENTS > 0, np.random.default_rng(0).integers(3, V, (2, T)), 0)
TYPES = np.where(SEGMENTS > 0, np.arange(T)[None] // 5 % 2, 0)


class MLM(nn.Module):
  model: nn.Module
  head: nn.Module

  def __call__(self, tokens_BT, **kwargs):
    x_BTD, bias_V = self.head(self.model(tokens_BT, **kwargs))
    return self.model.logits(x_BTD) + bias_V[None, None]


class LM(nn.Module):
  model: nn.Module

  def __call__(self, tokens_BT, **kwargs):
    return self.model.logits(self.model(tokens_BT, **kwargs))


# Our path within a layer -> their name within a layer, and their array (as its transpose, if of a Linear) -> ours without axis L.
def into_heads(x):
  return x.reshape(D, -1, D // N)


def out_of_heads(x):
  return x.reshape(N, D // N, D)


def bias_of_heads(x):
  return x.reshape(-1, D // N)


def same(x):
  return x


BERT_LAYER = {f'attention/{ours}/{leaf}': (f'attention.self.{ours}.{theirs}', into_heads if leaf == 'kernel' else bias_of_heads)
              for ours in ('query', 'key', 'value') for leaf, theirs in (('kernel', 'weight'), ('bias', 'bias'))}
BERT_LAYER |= {f'{ours}/{leaf}': (f'{theirs}.{kind}', out_of_heads if ours == 'attention/out' and leaf == 'kernel' else same)
               for ours, theirs in (('attention/out', 'attention.output.dense'), ('mlp/up', 'intermediate.dense'),
                                    ('mlp/down', 'output.dense')) for leaf, kind in (('kernel', 'weight'), ('bias', 'bias'))}
BERT_LAYER |= {f'{ours}/{leaf}': (f'{theirs}.{kind}', same)
               for ours, theirs in (('attention_norm', 'attention.output.LayerNorm'), ('mlp_norm', 'output.LayerNorm'))
               for leaf, kind in (('scale', 'weight'), ('bias', 'bias'))}
BERT_REST = {
    'model/embedder/token/embedding': 'embeddings.word_embeddings.weight',
    'model/embedder/position/embedding': 'embeddings.position_embeddings.weight',
    'model/embedder/token_type/embedding': 'embeddings.token_type_embeddings.weight',
    'model/embedder/embedding_norm/scale': 'embeddings.LayerNorm.weight',
    'model/embedder/embedding_norm/bias': 'embeddings.LayerNorm.bias',
}
GPT2_LAYER = {f'attention/{name}/{leaf}': (f'attn.c_attn.{kind}', lambda x, i=i, f=f: f(np.split(x, 3, axis=-1)[i]))
              for i, name in enumerate(('query', 'key', 'value'))
              for leaf, kind, f in (('kernel', 'weight', into_heads), ('bias', 'bias', bias_of_heads))}
GPT2_LAYER |= {f'{ours}/{leaf}': (f'{theirs}.{kind}', out_of_heads if ours == 'attention/out' and leaf == 'kernel' else same)
               for ours, theirs in (('attention/out', 'attn.c_proj'), ('mlp/up', 'mlp.c_fc'), ('mlp/down', 'mlp.c_proj'))
               for leaf, kind in (('kernel', 'weight'), ('bias', 'bias'))}
GPT2_LAYER |= {f'{ours}/{leaf}': (f'{theirs}.{kind}', same) for ours, theirs in (('attention_norm', 'ln_1'), ('mlp_norm', 'ln_2'))
               for leaf, kind in (('scale', 'weight'), ('bias', 'bias'))}
LLAMA_LAYER = {
    'attention/query/kernel': ('self_attn.q_proj.weight', into_heads),
    'attention/key/kernel': ('self_attn.k_proj.weight', into_heads),
    'attention/value/kernel': ('self_attn.v_proj.weight', into_heads),
    'attention/out/kernel': ('self_attn.o_proj.weight', out_of_heads),
    'mlp/up/kernel': ('mlp.up_proj.weight', same),
    'mlp/gate/kernel': ('mlp.gate_proj.weight', same),
    'mlp/down/kernel': ('mlp.down_proj.weight', same),
    'attention_norm/scale': ('input_layernorm.weight', same),
    'mlp_norm/scale': ('post_attention_layernorm.weight', same),
}
MODERN_LAYER = {f'attention/{name}/kernel': ('attn.Wqkv.weight', lambda x, i=i: into_heads(np.split(x, 3, axis=-1)[i]))
                for i, name in enumerate(('query', 'key', 'value'))}
MODERN_LAYER |= {
    'attention/out/kernel': ('attn.Wo.weight', out_of_heads),
    'mlp/gate/kernel': ('mlp.Wi.weight', lambda x: x[:, :F]),
    'mlp/up/kernel': ('mlp.Wi.weight', lambda x: x[:, F:]),
    'mlp/down/kernel': ('mlp.Wo.weight', same),
    'attention_norm/scale': ('attn_norm.weight', same),
    'mlp_norm/scale': ('mlp_norm.weight', same),
}


def fetch(reference, name, which):
  """Their array (or its gradient), with Linear weights turned to [in, out]; GPT-2's Conv1D has them that way already."""
  owner = reference.get_submodule(name.rpartition('.')[0])
  value = reference.get_parameter(name)
  value = (value if which == 'weights' else value.grad).detach().numpy()
  return value.T if isinstance(owner, torch.nn.Linear) and value.ndim == 2 else value


def convert(shapes, reference, layer, layer_names, rest, which='weights'):
  """Their weights or gradients in the tree of ours; every leaf of ours is asked for."""
  def leaf(path, ours):
    name = '/'.join(key.key for key in path)
    if '/stack/' not in name:
      value = fetch(reference, rest[name], which)
    else:
      _, _, group, *tail = name.split('/')
      inner = '/'.join(tail if group == 'first' else tail[1:])
      theirs, reshape = layer[inner]
      names = layer_names[group if group == 'first' else tail[0]]
      value = [reshape(fetch(reference, f'{n}.{theirs}', which)) for n in names]
      value = value[0] if group == 'first' else np.stack(value)
    assert value.shape == ours.shape, (name, value.shape, ours.shape)
    return jnp.asarray(value)
  return jax.tree_util.tree_map_with_path(leaf, shapes)


def shapes(network):
  return jax.eval_shape(lambda: nn.unbox(network.init(jax.random.key(0), TOKENS)))['params']


def randomised(reference):
  """All weights redrawn, norms and biases too, so that none can hide behind its initial value."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in reference.named_parameters():
      scale = value.ndim == 1 and name.endswith('weight')
      value.copy_(torch.randn(value.shape, generator=generator) * 0.15 + scale)
  return reference.eval()


def compare(network, reference, layer, layer_names, rest, gradients=False, **inputs):
  """Logits at real tokens within 1e-4; gradients of a weighted sum of log-probabilities within 1e-3 of each leaf's size."""
  reference = randomised(reference)
  params = convert(shapes(network), reference, layer, layer_names, rest)
  weights = np.random.default_rng(1).normal(size=(2, T, V)).astype(np.float32) * (SEGMENTS > 0)[:, :, None] / T

  def loss(params):
    logits = network.apply({'params': params}, TOKENS, segments_BT=jnp.asarray(SEGMENTS),
                           token_types_BT=inputs.get('token_type_ids'))
    return jnp.sum(jax.nn.log_softmax(logits) * weights), logits

  grads, logits = jax.jit(jax.grad(loss, has_aux=True) if gradients else lambda p: (None, loss(p)[1]))(params)
  theirs = reference(input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(np.int64(SEGMENTS > 0)),
                     **{name: torch.tensor(value) for name, value in inputs.items()}).logits
  real = SEGMENTS > 0
  assert theirs.std() > 0.3
  np.testing.assert_allclose(np.asarray(logits)[real], theirs.detach().numpy()[real], atol=1e-4)
  if gradients:
    torch.sum(torch.log_softmax(theirs, -1) * torch.tensor(weights)).backward()
    expected = convert(shapes(network), reference, layer, layer_names, rest, 'gradients')
    def close(path, ours, theirs):
      # A key's bias moves all scores of a query alike: its gradient is zero but for rounding, hence the floor.
      error, size = np.abs(ours - theirs).max(), max(np.abs(theirs).max(), 1e-3)
      assert error < 1e-3 * size, (jax.tree_util.keystr(path), error, size)
    jax.tree_util.tree_map_with_path(close, grads, expected)


def mlm(model):
  return MLM(model, heads.MLMHead(model.options, V))


def numbered(prefix, numbers):
  return [f'{prefix}.{i}' for i in numbers]


def bert_names(prefix, transform):
  rest = {ours: f'{prefix}.{theirs}' for ours, theirs in BERT_REST.items()}
  return rest | {f'head/{ours}': theirs for ours, theirs in transform.items()}


def test_bert():
  config = transformers.BertConfig(**THEIRS, num_hidden_layers=3, max_position_embeddings=16)
  head = 'cls.predictions.transform'
  rest = bert_names('bert', {'dense/kernel': f'{head}.dense.weight', 'dense/bias': f'{head}.dense.bias',
                             'norm/scale': f'{head}.LayerNorm.weight', 'norm/bias': f'{head}.LayerNorm.bias',
                             'bias': 'cls.predictions.bias'})
  compare(mlm(encoder.Model(**OURS, layers=3)), transformers.BertForMaskedLM(config), BERT_LAYER,
          {'block': numbered('bert.encoder.layer', range(3))}, rest, gradients=True, token_type_ids=TYPES)


def test_roberta():
  config = transformers.RobertaConfig(**THEIRS | dict(pad_token_id=1), num_hidden_layers=2, max_position_embeddings=18,
                                      type_vocab_size=1, layer_norm_eps=1e-5)
  rest = bert_names('roberta', {'dense/kernel': 'lm_head.dense.weight', 'dense/bias': 'lm_head.dense.bias',
                                'norm/scale': 'lm_head.layer_norm.weight', 'norm/bias': 'lm_head.layer_norm.bias',
                                'bias': 'lm_head.bias'})
  model = encoder.Model(**encoder.VARIANTS['roberta_base'] | OURS, layers=2)
  compare(mlm(model), transformers.RobertaForMaskedLM(config), BERT_LAYER,
          {'block': numbered('roberta.encoder.layer', range(2))}, rest, position_ids=np.tile(np.arange(2, T + 2), (2, 1)))


def test_modernbert():
  config = transformers.ModernBertConfig(**THEIRS, num_hidden_layers=7, local_attention=4, max_position_embeddings=16)
  rest = {'model/embedder/token/embedding': 'model.embeddings.tok_embeddings.weight',
          'model/embedder/embedding_norm/scale': 'model.embeddings.norm.weight',
          'model/final_norm/scale': 'model.final_norm.weight', 'head/dense/kernel': 'head.dense.weight',
          'head/norm/scale': 'head.norm.weight', 'head/bias': 'decoder.bias'}
  names = {'first': ['model.layers.0']} | {f'block_{j}': numbered('model.layers', (1 + j, 4 + j)) for j in range(3)}
  model = encoder.Model(**encoder.VARIANTS['modernbert_base'] | OURS | dict(layers=7, window=4))
  reference = transformers.ModernBertForMaskedLM(config)
  compare(mlm(model), reference, MODERN_LAYER, names, rest)
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    compare(mlm(model.clone(window=6)), reference, MODERN_LAYER, names, rest)


def test_gpt2():
  config = transformers.GPT2Config(vocab_size=V, n_embd=D, n_head=N, n_inner=F, n_layer=3, n_positions=16,
                                   attn_implementation='eager', bos_token_id=1, eos_token_id=2)
  rest = {'model/embedder/token/embedding': 'transformer.wte.weight',
          'model/embedder/position/embedding': 'transformer.wpe.weight',
          'model/final_norm/scale': 'transformer.ln_f.weight', 'model/final_norm/bias': 'transformer.ln_f.bias'}
  compare(LM(decoder.Model(**OURS, layers=3)), transformers.GPT2LMHeadModel(config), GPT2_LAYER,
          {'block': numbered('transformer.h', range(3))}, rest, gradients=True)


@pytest.mark.parametrize('tied', [False, True], ids=['llama2', 'llama3'])
def test_llama(tied):
  scaling = dict(rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=32)
  config = transformers.LlamaConfig(**THEIRS, num_hidden_layers=2, num_key_value_heads=2 if tied else N, rms_norm_eps=1e-5,
                                    max_position_embeddings=16, tie_word_embeddings=tied,
                                    rope_parameters=scaling if tied else dict(rope_type='default', rope_theta=10000.0))
  rest = {'model/embedder/token/embedding': 'model.embed_tokens.weight', 'model/final_norm/scale': 'model.norm.weight',
          'model/output/kernel': 'lm_head.weight'}
  ours = dict(kv_heads=2, rope_theta=500.0, rope_scaling=(8.0, 1.0, 4.0, 32.0), tied=True) if tied else {}
  model = decoder.Model(**decoder.VARIANTS['llama_2_7b'] | OURS | dict(layers=2) | ours)
  reference, names = transformers.LlamaForCausalLM(config), {'block': numbered('model.layers', range(2))}
  compare(LM(model), reference, LLAMA_LAYER, names, rest)
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    compare(LM(model.clone(rope_scaling=None, rope_theta=400.0)), reference, LLAMA_LAYER, names, rest)
