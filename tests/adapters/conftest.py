"""Programs of tiny adapted networks without data, each made once for all tests of this folder."""

import functools
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import base
from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.training import program as programs

SHAPE = dict(dim=16, layers=2, heads=2, mlp_dim=32, max_len=32, vocab_size=64)
SHAPE |= dict(dropout=0.0, attention_dropout=0.0)  # whose random numbers take long to compile
MODELS = {
  'encoder': dict(name='encoder', variant='bert_base', **SHAPE),
  'decoder': dict(name='decoder', variant='gpt2_small', **SHAPE),
  # Grouped heads, a gate, no biases.
  'llama': dict(
    name='decoder',
    bias=False,
    norm='rmsnorm',
    norm_bias=False,
    gated=True,
    activation='silu',
    positions='rope',
    kv_heads=1,
    tied=False,
    **SHAPE,
  ),
}
DRAWN = {  # not at 0 or 1
  *('lora_a', 'lora_embedding_b', 'adalora_a', 'adalora_b'),
  *('attention_bottleneck_down', 'mlp_bottleneck_down'),
  *('prefix', 'prefix_up', 'prefix_embedding', 'prefix_hidden', 'prompt_embedding'),
  *('prompt_inner', 'prompt_middle', 'prompt_outer'),
}
CLASSIFY = dict(name='classify', task='multiclass', classes=('a', 'b', 'c'), dropout=0.0)
OBJECTIVES = {
  'encoder': CLASSIFY | dict(pool='cls'),
  'decoder': dict(name='clm', packing='windows'),
  'llama': dict(name='clm', packing='windows'),
}


def config(model='encoder', adapter=None, objective=None, **changes):
  """A config of one of `MODELS`; `changes` are options of the model."""
  settings = base.get_config().to_dict()
  settings |= dict(steps=4, batch_size=4, seq_len=16, tokenizer=dict(name='byte'))
  settings['model'] = MODELS[model] | dict(remat='none') | changes
  settings['objective'] = objective or OBJECTIVES[model]
  settings['optimizer'] = dict(
    name='adamw', learning_rate=0.01, schedule='constant', weight_decay=0.1
  )
  settings['adapter'] = adapter or {}
  return config_lib.parse(settings)


def outlined(made):
  return programs.outline(made, jax.devices())


def program(*args, **kwargs):
  return outlined(config(*args, **kwargs))


@functools.cache
def _known(model, options, objective, changes):
  return program(model, dict(options), dict(objective) or None, **dict(changes))


def known(model='encoder', adapter=None, objective=None, **changes):
  """The same, made once."""
  sections = adapter or {}, objective or {}, changes
  return _known(model, *(tuple(sorted(section.items())) for section in sections))


def batch(program, seed=0):
  """Random tokens, two texts to a row; classes or next ids."""
  rng = np.random.default_rng(seed)
  made = {}
  for name, leaf in program.batch.items():
    B, T = leaf.shape[0], leaf.shape[-1]
    values = {
      'tokens': rng.integers(7, 64, leaf.shape),
      'targets': rng.integers(7, 64, leaf.shape),
      'segments': np.repeat([1, 2], T // 2)[None] * np.ones((B, 1)),
      'positions': np.tile(np.arange(T // 2), 2)[None] * np.ones((B, 1)),
      'label': rng.integers(0, 3, leaf.shape),
      'text_firsts': np.array([0, T // 2])[:2],
    }.get(name)
    if name in ('text_firsts', 'text_lasts', 'label_weight'):
      row = np.zeros(leaf.shape[1])
      row[:2] = dict(text_firsts=(0, 8), text_lasts=(7, 15), label_weight=(1, 1))[name]
      values = row[None]
    if values is None:
      values = np.ones(leaf.shape)
    made[name] = np.broadcast_to(values, leaf.shape).astype(leaf.dtype)
  return program.put(made)


@functools.cache
def base_params(model, objective):
  """What the base draws, as NumPy arrays by path; the same for all adapters, looped or not."""
  made = known(model, objective=dict(objective)).init(0).params
  return {path: np.asarray(x) for path, x in tree.flatten(made).items()}


def first_state(program, model, objective=None):
  """A state before step 1: parameters as they are drawn, made without compiling how."""
  rng, leaves = np.random.default_rng(0), {}
  base = base_params(model, tuple(sorted((objective or {}).items())))
  for path, leaf in tree.flatten(program.params).items():
    drawn = base.get(path)
    if path.split('/')[-1] in DRAWN:
      drawn = rng.uniform(-0.2, 0.2, leaf.shape)
    elif drawn is None:
      drawn = np.full(leaf.shape, float('/ia3_' in path))
    leaves[path] = drawn.astype(np.float32)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.state)
  parts = {
    name: tree.map_with_path(lambda path, _: leaves[path], getattr(zeros, name))
    for name in ('params', 'frozen')
  }
  state = zeros.replace(**parts)
  return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, program.state)


def shaken(params, scales, seed=1):
  """Nested parameters, those with the given names moved at random, as far as is given."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    scale = scales.get(path.split('/')[-1], 0.0)
    return jax.numpy.asarray(x + scale * rng.normal(size=x.shape).astype(np.float32))

  return tree.map_with_path(leaf, nn.meta.unbox(params))


def hidden(program, params, rows):
  """The hidden states of a batch, without dropout."""
  if not hasattr(program, '_hidden'):
    run = program.function(lambda network, batch: network.model(batch).hidden)
    object.__setattr__(program, '_hidden', run)
  return np.asarray(program._hidden(params, rows))


def bits(x):
  return jax.tree.map(lambda leaf: (str(leaf.dtype), np.asarray(leaf).tobytes()), x)


@pytest.fixture(scope='session')
def tiny():
  return types.SimpleNamespace(
    config=config,
    program=program,
    outlined=outlined,
    known=known,
    batch=batch,
    shaken=shaken,
    hidden=hidden,
    bits=bits,
    first_state=first_state,
  )
