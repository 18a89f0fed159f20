"""The gradients of adversarial training are those of torch by hand, on the same weights of a
BertForSequenceClassification, one text per row, no dropout.
"""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.data.tokenizers import byte
from llm_jax.hf import families
from llm_jax.hf import folders as hf
from llm_jax.models import encoder
from llm_jax.objectives import classify
from llm_jax.programs import network as networks
from llm_jax.training import adversarial, step

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
judge = pytest.importorskip('safetensors.torch')
pytestmark = pytest.mark.parity

V, D, B, T, C = 60, 16, 4, 10, 3
FAMILIES = families.known()
RNG = np.random.default_rng(0)
SEGMENTS = (np.arange(T)[None] < np.array([10, 7, 4, 9])[:, None]).astype(np.int32)
BATCH = {
  'tokens': np.where(SEGMENTS, RNG.integers(3, V, (B, T)), 0).astype(np.int32),
  'segments': SEGMENTS,
  'positions': np.arange(T, dtype=np.int32)[None].repeat(B, 0),
  'token_types': np.zeros((B, T), np.int32),
  'text_firsts': np.zeros((B, 1), np.int32),
  'text_lasts': SEGMENTS.sum(1, keepdims=True) - 1,
  'label': RNG.integers(0, C, (B, 1)).astype(np.int32),
  'label_weight': np.ones((B, 1), np.float32),
}
NOISE = (RNG.normal(size=(B, T, D)) * SEGMENTS[..., None]).astype(np.float32)


class Theirs:
  """By hand in torch: each loss is that of the vectors of the tokens plus delta."""

  def __init__(self, model):
    self.model = model
    self.ids = torch.tensor(BATCH['tokens']).long()
    self.mask = torch.tensor(SEGMENTS).long()
    self.label = torch.tensor(BATCH['label'][:, 0]).long()

  def logits(self, delta):
    vectors = self.model.bert.embeddings.word_embeddings(self.ids)
    return self.model(inputs_embeds=vectors + delta, attention_mask=self.mask).logits

  def loss(self, delta):
    return torch.nn.functional.cross_entropy(self.logits(delta), self.label)

  def slope(self, function, delta):
    delta = delta.clone().requires_grad_(True)
    return torch.autograd.grad(function(delta), delta)[0]

  def up(self, delta, slope, size, epsilon):
    """A step in the norm l2, text by text, and back into the ball."""
    found = []
    for d, g in zip(delta, slope, strict=True):
      d = d + size * g / g.norm()
      found.append(d * min(1.0, epsilon / d.norm().item()))
    return torch.stack(found)

  def fgm(self, epsilon, share):
    zero = torch.zeros(B, T, D)
    delta = self.up(zero, self.slope(self.loss, zero), epsilon, epsilon)
    return (1 - share) * self.loss(zero) + share * self.loss(delta)

  def pgd(self, epsilon, step_size, steps):
    delta = zero = torch.zeros(B, T, D)
    for _ in range(steps):
      delta = self.up(delta, self.slope(self.loss, delta), step_size, epsilon)
    return 0.5 * self.loss(zero) + 0.5 * self.loss(delta)

  def freelb(self, epsilon, step_size, steps):
    numbers = torch.tensor(SEGMENTS.sum(1) * D).float()
    delta = torch.tensor(NOISE) / numbers.sqrt()[:, None, None]
    total = 0
    for _ in range(steps):
      total = total + self.loss(delta) / steps
      delta = self.up(delta, self.slope(self.loss, delta), step_size, epsilon)
    return total

  def smart(self, epsilon, step_size, start, weight):
    def between(p, q):
      p, q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
      return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()

    zero, delta = torch.zeros(B, T, D), start * torch.tensor(NOISE)
    fixed = self.logits(zero).detach()
    slope = self.slope(lambda delta: between(fixed, self.logits(delta)), delta)
    largest = slope.abs().amax((1, 2), keepdim=True)
    delta = (delta + step_size * slope / largest).clamp(-epsilon, epsilon)
    return self.loss(zero) + weight * between(self.logits(zero), self.logits(delta))


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """Their model, our network and parameters, and their gradients as ours."""
  sizes = dict(hidden_size=D, num_attention_heads=2, intermediate_size=24, num_hidden_layers=1)
  config = transformers.BertConfig(
    vocab_size=V, max_position_embeddings=16, num_labels=C, pad_token_id=0, **sizes
  )
  model = transformers.BertForSequenceClassification(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      scale = value.ndim == 1 and name.endswith('weight')
      value.copy_(torch.randn(value.shape, generator=generator) * 0.3 + scale)
  folder = tmp_path_factory.mktemp('bert')
  model.save_pretrained(folder)
  options = hf.model_options(folder, FAMILIES) | dict(dropout=0.0, attention_dropout=0.0)
  options.pop('name')
  ours = encoder.Model(**options)
  classes = ('a', 'b', 'c')
  objective = classify.Objective(byte.create(), classes, dropout=0.0, packing='none')
  network = networks.Network(ours, objective.heads(ours), objective)
  boxed = jax.eval_shape(lambda: network.init(jax.random.key(0), BATCH))['params']
  shapes, infos = tree.flatten(nn.unbox(boxed)), params_lib.infos(boxed)

  def read(path):
    return hf.load(path, FAMILIES, shapes, infos).params

  def gradients():
    slopes = {name: value.grad.clone() for name, value in model.named_parameters()}
    path = tmp_path_factory.mktemp('gradients')
    judge.save_file(slopes, path / 'model.safetensors')
    shutil.copy(folder / 'config.json', path)
    return read(path)

  return model, network, tree.nest(read(folder)), gradients


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('fgm', dict(epsilon=1.5, share=0.3)),
    ('pgd', dict(epsilon=1.0, step_size=0.6, steps=3)),
    ('freelb', dict(epsilon=1.2, step_size=0.8, steps=3)),
    ('smart', dict(epsilon=0.3, step_size=0.4, start=0.1, weight=2.0)),
  ],
)
def test_gradients_are_those_of_torch(pair, name, options, monkeypatch):
  model, network, params, gradients = pair
  monkeypatch.setattr(adversarial, 'drawn', lambda part, draw: jnp.asarray(NOISE))
  method = adversarial.parse(dict(name=name) | options)

  @jax.jit
  def learn(params):
    key = jax.random.PRNGKey(0)
    return step.gradient(params, BATCH, key, network=network, adversarial=method)

  found, metrics = learn(params)
  model.zero_grad()
  theirs = Theirs(model)
  loss = getattr(theirs, name)(**options)
  loss.backward()
  assert float(metrics['loss'][0]) == pytest.approx(loss.item(), rel=1e-4)
  wanted = gradients()
  ours = tree.flatten(found)
  assert ours.keys() == wanted.keys()
  for path, gradient in ours.items():
    x = np.asarray(wanted[path])
    np.testing.assert_allclose(gradient, x, rtol=1e-4, atol=1e-4 * np.abs(x).max() + 1e-6)
  model.zero_grad()
  theirs.loss(torch.zeros(B, T, D)).backward()  # what is learned without this is something else
  clean, path = gradients(), 'heads_classifier/dense/kernel'
  assert np.abs(np.asarray(clean[path]) - ours[path]).max() > 1e-2 * np.abs(clean[path]).max()
