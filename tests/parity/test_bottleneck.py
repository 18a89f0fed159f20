"""Bottleneck adapters as the library `adapters` 1.3.0 computes them: logits and gradients that it
gave (`bottleneck_reference.py`), since it cannot be installed beside the transformers of these
tests.
"""

import pathlib
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.adapters import bottleneck
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.hf import families
from llm_jax.hf import folders as hf
from llm_jax.models import decoder, encoder
from llm_jax.nn.heads import MLMHead
from llm_jax.programs import network as networks

pytest.importorskip('torch')
pytest.importorskip('transformers')
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]
MODELS = {'bert': encoder.Model, 'gpt2': decoder.Model}


@pytest.fixture(scope='module')
def script():
  return runpy.run_path(str(pathlib.Path(__file__).with_name('bottleneck_reference.py')))


@pytest.fixture(scope='module', params=list(MODELS))
def base(request, script, tmp_path_factory):
  """The kind of a base, its folder, our model and its heads."""
  folder = tmp_path_factory.mktemp(request.param)
  script['base'](request.param).save_pretrained(folder)
  options = hf.model_options(folder, families.known())
  options.pop('name')
  model = MODELS[request.param](**options | dict(dropout=0.0, attention_dropout=0.0))
  heads = {'mlm': MLMHead(model.options, script['V'])} if request.param == 'bert' else {}
  return request.param, folder, model, heads


def logits_of(net, batch):
  x_BTD = net.model(batch).hidden
  if 'mlm' not in net.heads:
    return net.model.logits(x_BTD)
  x_BTD, bias_V = net.heads['mlm'](x_BTD)
  return net.model.logits(x_BTD) + bias_V[None, None]


def with_values(net, folder, batch, script):
  """All parameters by path, and the names of the adapter's own."""

  def init():
    with nn.intercept_methods(net.adapter.intercept):
      return net.init(jax.random.key(0), batch, method=logits_of)['params']

  boxed = jax.eval_shape(init)
  shapes, infos = tree.flatten(nn.unbox(boxed)), params_lib.infos(boxed)
  own = {path: named(path) for path in shapes if 'bottleneck' in path}
  wanted = {path: leaf for path, leaf in shapes.items() if path not in own}
  params = dict(hf.load(folder, families.known(), wanted, infos).params)
  for path, (half, piece) in own.items():
    names = [f'{layer}/{half}/{piece}' for layer in range(script['LAYERS'])]
    shape = shapes[path].shape[1:]
    params[path] = jnp.stack([script['drawn'](name, shape[::-1]).T for name in names])
  return params, own


def named(path):
  """'.../mlp_bottleneck_up_bias' -> ('mlp', 'up_bias')."""
  half, piece = path.split('/')[-1].split('_bottleneck_')
  return half, piece


@pytest.mark.parametrize('placement', bottleneck.PLACEMENTS)
def test_logits_and_gradients_are_those_of_adapters(base, placement, script):
  kind, folder, model, heads = base
  options = dict(size=script['R'], placement=placement, scale=script['SCALE'][placement])
  net = networks.Network(model, heads, None, bottleneck.Adapter(**options))
  tokens = jnp.asarray(script['TOKENS'])
  batch = {'tokens': tokens, 'segments': jnp.ones_like(tokens)}
  params, own = with_values(net, folder, batch, script)

  def loss(chosen):
    every = tree.nest(params | chosen)
    logits = networks.apply(net, every, batch, method=logits_of)
    return jnp.sum(jax.nn.log_softmax(logits) * script['WEIGHT']), logits

  quick = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  run = jax.jit(jax.grad(loss, has_aux=True)).lower({path: params[path] for path in own})
  gradients, logits = run.compile(quick)({path: params[path] for path in own})
  with np.load(script['FILE']) as said:
    theirs = {name: said[name] for name in said.files if name.startswith(f'{kind}/{placement}/')}
    others = [said[f'{kind}/{name}/logits'] for name in bottleneck.PLACEMENTS if name != placement]
  judge = theirs.pop(f'{kind}/{placement}/logits')
  np.testing.assert_allclose(logits, judge, rtol=1e-4, atol=1e-4)
  assert all(np.abs(logits - other).max() > 1e-2 for other in others)
  for path, (half, piece) in own.items():
    for layer, gradient in enumerate(gradients[path]):
      wanted = theirs.pop(f'{kind}/{placement}/{layer}/{half}/{piece}').T
      scale = np.abs(wanted).max()
      np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4 * scale + 1e-6)
      assert scale > 1e-3
  assert not theirs  # every parameter that they have is one of ours
