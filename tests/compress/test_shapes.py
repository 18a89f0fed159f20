"""Models of smaller shapes against the whole ones with parts set to zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.compress import _shapes, structured, vocabulary
from llm_jax.core import tree
from llm_jax.core.contracts import Seen, Smaller
from llm_jax.core.params import Info
from llm_jax.programs import inference

LLAMA = dict(name='decoder', norm='rmsnorm', norm_bias=False, bias=False, gated=True)
LLAMA |= dict(activation='silu', positions='rope', kv_heads=2, tied=False)
MODELS = {
  'bert': (dict(name='encoder', variant='bert_base'), 'mlm'),
  'llama': (LLAMA, 'clm'),
  'modernbert': (dict(name='encoder', variant='modernbert_base', layers=4), 'mlm'),
}


def seen_of(made):
  """Made-up importance of the parts of each layer."""
  rng = np.random.default_rng(0)
  shapes = tree.flatten(made.params)
  gradients = {}
  for path, info in made.infos.items():
    kept = [i for i, n in enumerate(info.names) if n in ('layers', 'heads', 'kv_heads', 'mlp')]
    gradients[path] = rng.random([shapes[path].shape[i] for i in kept])
  return Seen(gradients=gradients)


def smaller(made, params, tokenizer, method, seen):
  model = Smaller(made.config.model, params, made.infos, tokenizer)
  method.check(made.infos, tree.flatten(made.params))
  method.shrink(model, seen)
  config = dataclasses.replace(made.config, model=model.options)
  small = inference.outline(config, tokenizer, jax.devices()[:1])
  assert not tree.difference(small.params, model.params)
  return small, model


def answers(made, params):
  batch = {k: np.ones(v.shape, v.dtype) for k, v in made.batch.items()}
  batch['tokens'] = np.random.default_rng(1).integers(7, 200, batch['tokens'].shape, np.int32)
  run = made.function(lambda network, batch: network.model(batch).hidden)
  return np.asarray(run(params, made.put(batch)))


@pytest.mark.parametrize('kind', MODELS)
def test_heads_and_channels_that_are_gone_are_as_if_they_were_masked(kind, tiny):
  made, params, tokenizer = tiny.program(*MODELS[kind])
  seen, infos = seen_of(made), made.infos
  small, model = smaller(made, params, tokenizer, structured.Compression(heads=0.5, mlp=0.5), seen)
  assert small.network.model.options.mlp_dim == 16
  assert small.network.model.options.head_dim == made.network.model.options.head_dim
  # The whole model, its least important parts set to zero where they are summed over.
  leaves = tree.flatten(params)
  for path, info in infos.items():
    for axis in ('heads', 'mlp'):
      at = info.names.index(axis) if axis in info.names else None
      if at is None or not _shapes.block(info) or at - info.stacked not in info.inputs:
        continue
      matters = seen.gradients[path]
      if axis == 'heads' and kind == 'llama':  # two share keys and values
        matters = np.repeat(matters.reshape(*matters.shape[:-1], 2, 2).sum(-1), 2, -1)
        count = 2
      else:
        count = matters.shape[-1] // 2
      order = np.argsort(-matters, -1, kind='stable')
      mask = np.zeros(matters.shape, bool)
      np.put_along_axis(mask, order[..., :count], True, -1)
      shape = [1] * leaves[path].ndim
      shape[at] = mask.shape[-1]
      if info.stacked:
        shape[0] = len(mask)
      leaves[path] = leaves[path] * mask.reshape(shape)
  np.testing.assert_allclose(
    answers(small, model.params), answers(made, tree.nest(leaves)), atol=1e-6
  )
  count = lambda tree_: sum(x.size for x in jax.tree.leaves(tree_))
  assert count(model.params) == count(small.params) < count(params)


def test_layers_are_taken_evenly_and_are_the_same_ones(tiny):
  made, params, tokenizer = tiny.program(*MODELS['bert'])
  small, model = smaller(made, params, tokenizer, structured.Compression(layers=2), Seen())
  assert small.network.model.layers == 2
  kernel = 'model/stack/layers/block/mlp/up/kernel'
  was, found = (tree.flatten(x)[kernel] for x in (params, model.params))
  np.testing.assert_array_equal(found, was[jnp.array([0, 2])])


def test_a_pattern_of_layers_is_kept_whole(tiny):
  made, params, tokenizer = tiny.program(*MODELS['modernbert'])
  shapes = tree.flatten(made.params)
  with pytest.raises(ValueError, match='breaks the pattern of the layers'):
    _shapes.layers_left(made.infos, shapes, 3)
  many, _, _ = tiny.program(MODELS['modernbert'][0] | dict(layers=10), 'mlm')
  left = _shapes.layers_left(many.infos, tree.flatten(many.params), 4)
  assert left == [0, 1, 2, 3]


@pytest.mark.parametrize(
  'options, said',
  [
    (dict(), 'leaves nothing out'),
    (dict(heads=1.0), 'above 0 and below 1'),
    (dict(layers=4), 'fewer than the 4 layers'),
    (dict(layers=0), 'at least 1'),
    (dict(heads=0.9), 'of 4 heads leaves none out'),
  ],
)
def test_what_is_not_possible_is_refused(options, said, tiny):
  made, _, _ = tiny.program(*MODELS['bert'])
  with pytest.raises(ValueError, match=said):
    structured.Compression(**options).check(made.infos, tree.flatten(made.params))


def test_layers_that_differ_are_refused():
  infos = {f'{i}/kernel': Info(('embed', 'mlp'), (0,), layer=i) for i in range(2)}
  shapes = {f'{i}/kernel': jax.ShapeDtypeStruct((4, 4 + i), 'float32') for i in range(2)}
  with pytest.raises(ValueError, match=r'mlp of \[4, 5\] size'):
    structured.Compression(mlp=0.5).check(infos, shapes)


def test_a_tokenizer_without_tokens_to_leave_out_is_refused(tiny):
  made, params, tokenizer = tiny.program(*MODELS['bert'])
  model = Smaller(made.config.model, params, made.infos, tokenizer)
  with pytest.raises(ValueError, match='byte has no tokens to leave out'):
    vocabulary.Compression().shrink(model, Seen(counts=np.ones(263)))
  with pytest.raises(ValueError, match='least=0 must be at least 1'):
    vocabulary.Compression(least=0)
