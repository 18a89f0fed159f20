"""LoRA, rsLoRA, DoRA and AdaLoRA as `peft` computes them: the same weights give the same logits,
gradients and merged kernels, in float32; and ranks are chosen as there.
"""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.adapters import adalora, lora
from llm_jax.core import params as params_lib
from llm_jax.core import state as state_lib
from llm_jax.core import tree
from llm_jax.hf import families
from llm_jax.hf import folders as hf
from llm_jax.models import decoder, encoder
from llm_jax.nn.heads import MLMHead
from llm_jax.programs import network as networks

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]

V, D, N, K, F, T, R = 40, 16, 4, 2, 24, 9, 3
ALPHA = 7.0
THEIRS = dict(
  vocab_size=V,
  hidden_size=D,
  num_attention_heads=N,
  intermediate_size=F,
  num_hidden_layers=2,
  max_position_embeddings=16,
  pad_token_id=0,
)
TOKENS = np.random.default_rng(0).integers(3, V, (2, T))
# Our module within a layer -> theirs.
LLAMA = {
  'attention/query': 'model.layers.{}.self_attn.q_proj',
  'attention/key': 'model.layers.{}.self_attn.k_proj',
  'attention/value': 'model.layers.{}.self_attn.v_proj',
  'attention/out': 'model.layers.{}.self_attn.o_proj',
  'mlp/gate': 'model.layers.{}.mlp.gate_proj',
  'mlp/up': 'model.layers.{}.mlp.up_proj',
  'mlp/down': 'model.layers.{}.mlp.down_proj',
}
BERT = {
  'attention/query': 'bert.encoder.layer.{}.attention.self.query',
  'attention/value': 'bert.encoder.layer.{}.attention.self.value',
  'attention/out': 'bert.encoder.layer.{}.attention.output.dense',
  'mlp/up': 'bert.encoder.layer.{}.intermediate.dense',
  'mlp/down': 'bert.encoder.layer.{}.output.dense',
}
MODELS = {
  'llama': ('LlamaForCausalLM', THEIRS | dict(num_key_value_heads=K), LLAMA, decoder.Model),
  'bert': ('BertForMaskedLM', THEIRS, BERT, encoder.Model),
}
METHODS = {'lora': {}, 'rslora': dict(rslora=True), 'dora': dict(dora=True)}
PAIRS = [(model, method) for model in MODELS for method in METHODS] + [('llama', 'adalora')]


def theirs(kind, config, modules, method):
  """Their model with an adapter, everything drawn at random."""
  made = getattr(transformers, kind)
  base = made(made.config_class(**config, attn_implementation='eager'))
  names = [name.format(i) for name in modules.values() for i in range(2)]
  shared = dict(lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names)
  if method == 'adalora':
    return base, peft.AdaLoraConfig(init_r=R, target_r=1, total_step=10, **shared)
  return base, peft.LoraConfig(
    r=R, use_rslora=method == 'rslora', use_dora=method == 'dora', **shared
  )


def adapter_of(method, targets, alpha=ALPHA):
  """Ours."""
  if method == 'adalora':
    return adalora.Adapter(steps=10, rank=R, target_rank=1, alpha=alpha, targets=targets)
  return lora.Adapter(rank=R, alpha=alpha, targets=targets, **METHODS[method])


def randomised(model, scale=0.2):
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, value in model.named_parameters():
      around_one = value.ndim == 1 and name.endswith('weight')
      value.copy_(torch.randn(value.shape, generator=generator) * scale + around_one)
  return model.eval()


@pytest.fixture(scope='module', params=PAIRS, ids=str)
def pair(request, tmp_path_factory):
  """Both networks with the same weights."""
  name, method = request.param
  kind, config, modules, model_class = MODELS[name]
  base, settings = theirs(kind, config, modules, method)
  folder = tmp_path_factory.mktemp(f'{name}-{method}')
  randomised(base).save_pretrained(folder)
  adapted = peft.get_peft_model(base, settings)
  generator = torch.Generator().manual_seed(2)
  with torch.no_grad():
    for path, value in adapted.named_parameters():
      if 'lora_magnitude' in path:
        value.mul_(1 + 0.3 * torch.randn(value.shape, generator=generator))
      elif 'lora_' in path:
        value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
  targets = '|'.join(modules)
  adapter = adapter_of(method, targets)
  options = hf.model_options(folder, families.known())
  options.pop('name')
  model = model_class(**options | dict(dropout=0.0, attention_dropout=0.0))
  heads = {'mlm': MLMHead(model.options, V)} if name == 'bert' else {}
  net = networks.Network(model, heads, None, adapter)
  shapes, infos = described(net)
  wanted = {path: leaf for path, leaf in shapes.items() if 'lora_' not in path}
  params = dict(hf.load(folder, families.known(), wanted, infos).params)
  given = dict(adapted.base_model.model.named_parameters())
  for path in shapes.keys() - wanted.keys():
    params[path] = converted(given, path, modules, shapes[path].shape, params)
  return types.SimpleNamespace(
    net=net,
    params=params,
    infos=infos,
    reference=adapted,
    modules=modules,
    folder=folder,
    method=method,
  )


def described(net):
  batch = {'tokens': jnp.asarray(TOKENS), 'segments': jnp.ones_like(TOKENS)}

  def init():
    with nn.intercept_methods(net.adapter.intercept):
      return net.init(jax.random.key(0), batch, method=logits_of)['params']

  boxed = jax.eval_shape(init)
  return tree.flatten(nn.unbox(boxed)), params_lib.infos(boxed)


def converted(given, path, modules, shape, params):
  """One of our parameters from the arrays of theirs; the magnitude as a difference."""
  module, name = path.rsplit('/', 1)
  inner = module.split('/block/')[1]
  layers = []
  for i in range(2):
    prefix = modules[inner].format(i)
    ending = {
      'lora_a': 'lora_A.default.weight',
      'lora_b': 'lora_B.default.weight',
      'lora_magnitude': 'lora_magnitude_vector.default.weight',
      'adalora_a': 'lora_A.default',
      'adalora_b': 'lora_B.default',
      'adalora_values': 'lora_E.default',
    }[name]
    layers.append(given[f'{prefix}.{ending}'].detach().numpy().T.reshape(shape[1:]))
  found = np.stack(layers)
  if name == 'lora_magnitude':
    kernel = np.asarray(params[f'{module}/kernel'], np.float64)
    inputs = tuple(range(1, kernel.ndim - found.ndim + 1))
    found = found - np.sqrt(np.sum(kernel**2, axis=inputs))
  return jnp.asarray(found, jnp.float32)


def logits_of(net, batch):
  x_BTD = net.model(batch).hidden
  if 'mlm' not in net.heads:
    return net.model.logits(x_BTD)
  x_BTD, bias_V = net.heads['mlm'](x_BTD)
  return net.model.logits(x_BTD) + bias_V[None, None]


def ours(net, params):
  batch = {'tokens': jnp.asarray(TOKENS), 'segments': jnp.ones_like(TOKENS)}
  run = lambda params: networks.apply(net, params, batch, method=logits_of)
  return compiled(run, tree.nest(params))


def compiled(function, *args):
  """What a function gives, compiled with little care."""
  quick = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  return jax.jit(function).lower(*args).compile(quick)(*args)


def test_logits_and_gradients_are_those_of_peft(pair):
  weight = np.random.default_rng(3).normal(size=(2, T, V)).astype(np.float32) / T

  def loss(own):
    batch = {'tokens': jnp.asarray(TOKENS), 'segments': jnp.ones_like(TOKENS)}
    params = tree.nest(pair.params | own)
    logits = networks.apply(pair.net, params, batch, method=logits_of)
    return jnp.sum(jax.nn.log_softmax(logits) * weight), logits

  own = {path: x for path, x in pair.params.items() if 'lora_' in path}
  gradients, logits = compiled(jax.grad(loss, has_aux=True), own)
  expected = pair.reference(input_ids=torch.tensor(TOKENS)).logits
  np.testing.assert_allclose(logits, expected.detach(), rtol=1e-4, atol=1e-4)
  torch.sum(torch.log_softmax(expected, -1) * torch.tensor(weight)).backward()
  named = pair.reference.base_model.model.named_parameters()
  theirs = {name: x.grad for name, x in named if x.grad is not None}
  kernels = {path: jnp.zeros_like(x) for path, x in pair.params.items()}  # a difference has no norm
  for path, gradient in gradients.items():
    judge = converted(theirs, path, pair.modules, gradient.shape, kernels)
    np.testing.assert_allclose(gradient, judge, rtol=1e-4, atol=1e-4 * np.abs(judge).max() + 1e-6)
    assert np.abs(judge).max() > 1e-3
  # Another scale is another network.
  method = 'adalora' if pair.method == 'adalora' else 'lora'
  other = adapter_of(method, pair.net.adapter.targets, ALPHA * 1.1)
  moved = ours(pair.net.clone(adapter=other), pair.params) - np.asarray(expected.detach())
  assert np.abs(moved).max() > 1e-2


def test_merged_kernels_are_those_of_peft(pair):
  merged = pair.net.adapter.merged(tree.nest(pair.params), pair.infos)
  base = pair.net.clone(adapter=None)
  expected = pair.reference.merge_and_unload()
  folder = pair.folder / 'merged'
  expected.save_pretrained(folder)
  judge = hf.load(folder, families.known(), tree.flatten(merged), pair.infos).params
  assert judge.keys() == set(tree.paths(merged))
  for path, x in tree.flatten(merged).items():
    np.testing.assert_allclose(x, judge[path], rtol=1e-5, atol=1e-5)
  assert any(np.abs(judge[path] - pair.params[path]).max() > 1e-2 for path in judge)
  logits = expected(input_ids=torch.tensor(TOKENS)).logits.detach()
  np.testing.assert_allclose(ours(base, tree.flatten(merged)), logits, rtol=1e-4, atol=1e-4)


def test_the_first_values_are_drawn_as_peft_draws_them(pair):
  """A uniform within 1 / sqrt(inputs), B zero; in AdaLoRA both normal, the values zero."""
  net = pair.net
  batch = {'tokens': jnp.asarray(TOKENS), 'segments': jnp.ones_like(TOKENS)}

  def init(key):
    with nn.intercept_methods(net.adapter.intercept):
      return nn.unbox(net.init(key, batch, method=logits_of)['params'])

  drawn = []
  for path, x in tree.flatten(compiled(init, jax.random.key(0))).items():
    if path.endswith(('adalora_a', 'adalora_b')):
      drawn.append(np.ravel(x))
    elif path.endswith('lora_a'):
      inputs = np.prod(x.shape[1:-1])
      fresh = torch.empty(R, int(inputs))
      torch.nn.init.kaiming_uniform_(fresh, a=5**0.5)
      bound = inputs**-0.5
      assert 0.8 * bound < np.abs(x).max() <= bound and fresh.abs().max() <= bound
      assert np.std(x) == pytest.approx(bound / 3**0.5, rel=0.25)
    elif 'lora_' in path:
      assert not np.any(x)
  if drawn:
    drawn = np.concatenate(drawn)
    assert np.std(drawn) == pytest.approx(0.02, rel=0.1) and abs(np.mean(drawn)) < 0.002


def allocated(config, shapes, steps):
  """The values of each map after each step of `peft`'s allocator, from gradients that are given.

  Args:
    config: of the schedule.
    shapes: of A and B by map.
    steps: parameters and gradients of each step, by map and name.
  """
  model = torch.nn.Module()
  for name, (a, b) in shapes.items():
    for key, shape in (('lora_A', a), ('lora_B', b), ('lora_E', (a[0], 1))):
      holder = torch.nn.Module()
      holder.default = torch.nn.Parameter(torch.zeros(shape))
      module = getattr(model, name, None) or torch.nn.Module()
      setattr(module, key, holder)
      setattr(model, name, module)
  allocator = peft.tuners.adalora.layer.RankAllocator(model, config, 'default')
  last, pattern, found = config.total_step - config.tfinal, None, []
  for number, arrays in enumerate(steps, 1):
    with torch.no_grad():
      for path, parameter in model.named_parameters():
        value, slope = arrays[path.removesuffix('.default')]
        parameter.copy_(torch.tensor(value))
        parameter.grad = torch.tensor(slope)
    if number <= last:
      _, new = allocator.update_and_allocate(model, number, force_mask=number == last)
      pattern = new if number == last else pattern
    else:
      allocator.mask_using_rank_pattern(model, pattern)
    found.append(
      {name: getattr(model, name).lora_E.default.detach().numpy()[:, 0].copy() for name in shapes}
    )
  return found


@pytest.mark.parametrize(
  ('warmup', 'final', 'every', 'stacked'), [(2, 3, 2, True), (0, 0, 1, False), (3, 2, 4, True)]
)
def test_ranks_are_chosen_as_by_peft(warmup, final, every, stacked):
  """On the same parameters and gradients, step for step."""
  total, rank, target, inputs, outputs = 14, 4, 2, 5, 6
  rng = np.random.default_rng(0)
  adapter = adalora.Adapter(
    steps=total,
    rank=rank,
    target_rank=target,
    warmup_steps=warmup,
    final_steps=final,
    every=every,
  )
  names = ['m0', 'm1', 'm2']
  shapes = {name: ((rank, inputs), (outputs, rank)) for name in names}
  drawn = lambda *shape: rng.normal(size=shape).astype(np.float32)
  steps = []
  for _ in range(total):
    arrays = {}
    for number, name in enumerate(names):
      size = 10.0**-number  # so that some maps lose their ranks and others keep them
      for key, shape in (
        ('lora_A', (rank, inputs)),
        ('lora_B', (outputs, rank)),
        ('lora_E', (rank, 1)),
      ):
        arrays[f'{name}.{key}'] = drawn(*shape), size * drawn(*shape)
    steps.append(arrays)
  config = peft.AdaLoraConfig(
    init_r=rank, target_r=target, tinit=warmup, tfinal=final, deltaT=every, total_step=total
  )
  theirs = allocated(config, shapes, steps)

  def as_ours(arrays, which):
    ours = {}
    for name in names:
      ours[name] = {
        'adalora_a': arrays[f'{name}.lora_A'][which].T,
        'adalora_b': arrays[f'{name}.lora_B'][which].T,
        'adalora_values': arrays[f'{name}.lora_E'][which][:, 0],
      }
    if not stacked:
      return ours
    return {'stack': jax.tree.map(lambda *x: np.stack(x), *ours.values())}

  extras = adapter.extras(as_ours(steps[0], 0))
  update = jax.jit(adapter.after_update)
  gone = []
  for number, (arrays, wanted) in enumerate(zip(steps, theirs, strict=True), 1):
    state = state_lib.TrainState(
      step=jnp.int32(number), params=as_ours(arrays, 0), opt_state={}, rng=None, extras=extras
    )
    state = update(state, as_ours(arrays, 1))
    extras = state.extras
    found = state.params['stack']['adalora_values'] if stacked else None
    for index, name in enumerate(names):
      mine = found[index] if stacked else state.params[name]['adalora_values']
      np.testing.assert_array_equal(mine, wanted[name], err_msg=f'step {number}, {name}')
    gone.append({name: int(np.sum(wanted[name] == 0)) for name in names})
  assert sum(gone[-1].values()) == (rank - target) * len(names)
  assert gone[-1]['m2'] > gone[-1]['m0'] and gone[warmup - 1 if warmup else 0]['m0'] == 0


def test_the_term_of_the_loss_is_that_of_peft():
  rng = np.random.default_rng(0)
  a, b = (rng.normal(size=(2, *shape)).astype(np.float32) for shape in ((5, 3), (3, 2, 4)))
  adapter = adalora.Adapter(steps=10, rank=3, target_rank=1)
  params = {'q': {'adalora_a': a, 'adalora_b': b, 'adalora_values': np.zeros((2, 3))}}
  (total, weight) = adapter.loss(params)['orthogonality']
  norms = []
  for layer in range(2):
    for p in (torch.tensor(a[layer]).T, torch.tensor(b[layer].reshape(3, -1))):
      norms.append(torch.norm(p @ p.T - torch.eye(3), p='fro'))
  np.testing.assert_allclose(total / weight, sum(norms) / len(norms), rtol=1e-6)
  still = jax.grad(lambda p: adapter.loss(p)['orthogonality'][0])(
    {
      'q': {'adalora_a': np.eye(5, 3)[None], 'adalora_b': np.eye(3, 8).reshape(1, 3, 2, 4)}
      | {'adalora_values': np.zeros((1, 3))}
    }
  )
  assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(still))
