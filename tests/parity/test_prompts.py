"""Prefix tuning, prompt tuning and P-tuning as `peft` computes them: the same weights give the same
logits and gradients, in float32.
"""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.adapters import p_tuning, prefix, prompt
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.hf import families
from llm_jax.hf import folders as hf
from llm_jax.models import decoder, encoder
from llm_jax.programs import network as networks

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]

V, D, N, K, F, L, T, P, R = 40, 16, 4, 2, 24, 2, 9, 3, 5
TOKENS = np.random.default_rng(0).integers(3, V, (2, T))
SHARED = dict(
  vocab_size=V, hidden_size=D, num_attention_heads=N, num_hidden_layers=L, intermediate_size=F
)
MODELS = {
  'llama': (
    'LlamaForCausalLM',
    SHARED | dict(num_key_value_heads=K, max_position_embeddings=16),
    decoder.Model,
  ),
  'gpt2': (
    'GPT2LMHeadModel',
    dict(vocab_size=V, n_embd=D, n_head=N, n_layer=L, n_inner=F, n_positions=16),
    decoder.Model,
  ),
  'bert': ('BertModel', SHARED | dict(max_position_embeddings=16), encoder.Model),
}
METHODS = {
  'prefix': (lambda: prefix.Adapter(P), lambda **kw: peft.PrefixTuningConfig(**kw)),
  'prefix_mlp': (
    lambda: prefix.Adapter(P, hidden=R),
    lambda **kw: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=R, **kw),
  ),
  'prompt': (lambda: prompt.Adapter(P), lambda **kw: peft.PromptTuningConfig(**kw)),
  'p_tuning': (
    lambda: p_tuning.Adapter(P, hidden=R),
    lambda **kw: peft.PromptEncoderConfig(encoder_hidden_size=R, **kw),
  ),
}
PAIRS = [
  *(('llama', method) for method in ('prefix', 'prompt')),  # with an mlp peft's table is narrower
  *(('gpt2', method) for method in METHODS),
  ('bert', 'prompt'),
]


def drawn(model, scale, seed):
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      around_one = value.ndim == 1 and name.endswith('weight')
      value.copy_(torch.randn(value.shape, generator=generator) * scale + around_one)


@pytest.fixture(scope='module', params=PAIRS, ids=str)
def pair(request, tmp_path_factory):
  """Both networks with the same weights, and how theirs of the adapter become ours."""
  name, method = request.param
  kind, config, model_class = MODELS[name]
  ours, theirs = METHODS[method]
  made = getattr(transformers, kind)
  base = made(made.config_class(**config, attn_implementation='eager', pad_token_id=0)).eval()
  drawn(base, 0.2, 1)
  folder = tmp_path_factory.mktemp(f'{name}-{method}')
  base.save_pretrained(folder)
  task = 'FEATURE_EXTRACTION' if name == 'bert' else 'CAUSAL_LM'
  reference = peft.get_peft_model(base, theirs(task_type=task, num_virtual_tokens=P)).eval()
  drawn(reference.prompt_encoder, 0.5, 2)
  options = hf.model_options(folder, families.known())
  options.pop('name')
  model = model_class(**options | dict(dropout=0.0, attention_dropout=0.0))
  net = networks.Network(model, {}, None, ours())
  shapes, infos = described(net)
  wanted = {path: leaf for path, leaf in shapes.items() if not is_own(path)}
  params = dict(hf.load(folder, families.known(), wanted, infos).params)
  given = {path: x.detach().numpy() for path, x in reference.prompt_encoder.named_parameters()}
  own = converted(given, method, model.options)
  assert own.keys() == shapes.keys() - wanted.keys()
  assert all(own[path].shape == shapes[path].shape for path in own)
  return types.SimpleNamespace(
    net=net, params=params, own=own, reference=reference, method=method, name=name
  )


def is_own(path):
  return path.split('/')[-1].startswith(('prefix', 'prompt'))


def described(net):
  def init():
    with nn.intercept_methods(net.adapter.intercept):
      return net.init(jax.random.key(0), batch_of(net), method=read)['params']

  boxed = jax.eval_shape(init)
  return tree.flatten(nn.unbox(boxed)), params_lib.infos(boxed)


def converted(given, method, options):
  """Our parameters of the adapter from theirs, or gradients likewise."""
  given = {path.removeprefix('default.'): x for path, x in given.items()}
  sizes = L, 2, options.kv_heads or N, D // N
  block = 'model/stack/layers/block/attention'
  if method == 'prefix':
    x = given['embedding.weight'].reshape(P, *sizes)
    return {f'{block}/prefix': np.moveaxis(x, 0, 1)}
  if method == 'prefix_mlp':
    up = given['transform.2.weight'].T.reshape(R, *sizes)
    return {
      'model/stack/prefix_embedding': given['embedding.weight'],
      'model/stack/prefix_hidden': given['transform.0.weight'].T,
      'model/stack/prefix_hidden_bias': given['transform.0.bias'],
      f'{block}/prefix_up': np.moveaxis(up, 0, 1),
      f'{block}/prefix_up_bias': given['transform.2.bias'].reshape(sizes),
    }
  own = {'model/embedder/prompt_embedding': given['embedding.weight']}
  if method == 'p_tuning':
    for i, name in enumerate(p_tuning.KERNELS):
      own[f'model/embedder/{name}'] = given[f'mlp_head.{2 * i}.weight'].T
      own[f'model/embedder/{name}_bias'] = given[f'mlp_head.{2 * i}.bias']
  return own


def batch_of(net):
  """Two texts, with the virtual tokens before them where there are any."""
  virtual = np.tile(V + np.arange(net.adapter.tokens), (2, 1))
  tokens = jnp.asarray(np.concatenate([virtual, TOKENS], axis=1), jnp.int32)
  return {'tokens': tokens, 'segments': jnp.ones_like(tokens)}


def read(net, batch):
  """What is compared: logits, or the states of a model without them."""
  x_BTD = net.model(batch).hidden
  return net.model.logits(x_BTD) if net.model.causal else x_BTD


def test_logits_and_gradients_are_those_of_peft(pair):
  output = pair.reference(input_ids=torch.tensor(TOKENS))
  expected = output.last_hidden_state if pair.name == 'bert' else output.logits
  shape = tuple(expected.shape)
  weight = np.random.default_rng(3).normal(size=shape).astype(np.float32) / T

  def loss(own):
    params = tree.nest(pair.params | own)
    found = networks.apply(pair.net, params, batch_of(pair.net), method=read)
    return jnp.sum(jax.nn.log_softmax(found) * weight), found

  gradients, found = jax.jit(jax.grad(loss, has_aux=True))(pair.own)
  np.testing.assert_allclose(found, expected.detach(), rtol=1e-4, atol=1e-4)
  torch.sum(torch.log_softmax(expected, -1) * torch.tensor(weight)).backward()
  theirs = {path: x.grad.numpy() for path, x in pair.reference.prompt_encoder.named_parameters()}
  for path, judge in converted(theirs, pair.method, pair.net.model.options).items():
    atol = 1e-4 * np.abs(judge).max() + 1e-6
    np.testing.assert_allclose(gradients[path], judge, rtol=1e-4, atol=atol)
    assert np.abs(judge).max() > 1e-3
  # Other vectors are another network.
  moved, _ = jax.jit(lambda own: loss(own)[::-1])(jax.tree.map(lambda x: 1.2 * x, pair.own))
  assert np.abs(moved - found).max() > 1e-2
