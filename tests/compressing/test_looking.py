"""What is seen of a model, against what it does when it is run without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from llm_jax.compressing import looking
from llm_jax.core import config as config_lib
from llm_jax.core import metrics, tree
from llm_jax.core.contracts import ACTIVATIONS, IDS
from llm_jax.nn.forms import int8
from llm_jax.programs import assemble, inference

SHAPE = dict(dim=8, layers=2, heads=2, mlp_dim=12, max_len=16, vocab_size=263)
UP = 'model/stack/layers/block/mlp/up/kernel'
OUT = 'model/stack/layers/block/attention/out/kernel'


@pytest.fixture(scope='module')
def model():
  given = base.get_config().to_dict()
  given |= dict(steps=1, batch_size=2, seq_len=16, tokenizer=dict(name='byte'))
  given['model'] = dict(name='encoder', variant='bert_base', remat='none', **SHAPE)
  given['model'] |= dict(dropout=0.0, attention_dropout=0.0)
  given['objective'] = dict(name='classify', classes=('a', 'b'), pool='cls', dropout=0.0)
  config = config_lib.parse(given)
  made = inference.outline(config, assemble.byte_tokenizer(config), jax.devices()[:1])
  rng = np.random.default_rng(0)
  leaves = {
    path: jnp.asarray(rng.normal(path.endswith('scale'), 0.5, leaf.shape), leaf.dtype)
    for path, leaf in tree.flatten(made.params).items()
  }
  batches = []
  for seed in range(2):
    rng, batch = np.random.default_rng(seed), {}
    for name, leaf in made.batch.items():
      batch[name] = np.zeros(leaf.shape, leaf.dtype)
    batch['tokens'] = rng.integers(7, 263, batch['tokens'].shape).astype(np.int32)
    batch['segments'][:, :10] = 1
    batch['positions'][:] = np.arange(16)
    batch['text_lasts'][:, 0] = 9
    batch['label'][:, 0], batch['label_weight'][:, 0] = seed, 1.0
    batches.append(batch)
  return made, tree.nest(leaves), batches


def loss(made, params, batch):
  return float(metrics.total(made.eval_step(params, made.put(batch)), made.network.terms))


@pytest.mark.slow
def test_what_kernels_multiply_and_how_wrong_their_products_would_be(model):
  made, params, batches = model
  scheme = int8.Scheme(None, 'token')
  seen = looking.look(made, params, (ACTIVATIONS,), batches, (), {UP: scheme})
  found = seen.activations[UP]
  assert found['square'].shape == (2, 8) and found['most'].shape == (2,)
  # The first layer's mlp reads norms of attention: what `Block` gives them, by the model itself.
  inputs = []

  def note(next_fun, args, kwargs, context):
    if context.module.name == 'up' and context.method_name == '__call__':
      context.module.sow('x', 'x', args[0])
    return next_fun(*args, **kwargs)

  import flax.linen as nn

  for batch in batches:
    with nn.intercept_methods(note):
      run = lambda net, batch: net.model(batch)
      _, kept = made.network.apply({'params': params}, batch, method=run, mutable=['x'])
    inputs.append(np.asarray(jax.tree.leaves(kept)[0])[:, :, :10].reshape(2, -1, 8))
  x = np.concatenate(inputs, 1)  # [layers, tokens that are no padding, D]
  np.testing.assert_allclose(found['square'], (x**2).mean(1), rtol=1e-4)
  np.testing.assert_allclose(found['most'], np.abs(x).max((1, 2)), rtol=1e-5)
  kernel = tree.flatten(params)[UP]
  for layer in range(2):
    exact = x[layer] @ np.asarray(kernel[layer])
    w = np.asarray(scheme.form(kernel, made.infos[UP]).dense(jnp.float32)[layer])
    step = np.abs(x[layer]).max(-1, keepdims=True) / 127
    wrong = (np.round(x[layer] / step) * step) @ w - exact
    wanted = np.sqrt((wrong**2).sum() / (exact**2).sum())
    assert float(found['error'][layer]) == pytest.approx(wanted, rel=1e-2)
  assert set(seen.activations) > {UP, OUT} and 'error' not in seen.activations[OUT]


def test_how_much_the_loss_changes_without_a_head_or_a_channel(model):
  """By taking a little of each away: the slope of the loss, |dL/dgate| at 1."""
  made, params, batches = model
  found = looking.gradients(made, params, [made.put(batch) for batch in batches])
  assert found[OUT].shape == (2, 2)
  leaves, wanted = tree.flatten(params), np.zeros((2, 2))
  for layer in range(2):
    for head in range(2):
      for batch in batches:
        ends = []
        for factor in (1.01, 0.99):
          changed = leaves[OUT].at[layer, head].mul(factor)
          ends.append(loss(made, tree.replace(params, {OUT: changed}), batch))
        wanted[layer, head] += abs(ends[0] - ends[1]) / 0.02 / len(batches)
  np.testing.assert_allclose(found[OUT], wanted, rtol=0.05, atol=1e-3)
  assert UP.replace('up', 'down') in found and not any('heads_' in path for path in found)


def test_ids_are_counted(small):
  documents = small.Documents([[7, 8, 8], [8]], pairs=[[9], []])
  found = looking.counts([documents], 12)
  assert found.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 3, 1, 0, 0]


def test_no_texts_are_refused(model):
  made, params, _ = model
  with pytest.raises(ValueError, match='there is none; look at config.data'):
    looking.look(made, params, (ACTIVATIONS,), [], (), {})
  assert looking.look(made, params, (IDS,), [], (), {}).counts.sum() == 0
