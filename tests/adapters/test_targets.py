"""What patterns match, what is refused before anything is compiled, and weight forms as bases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.adapters import (
  _targets,
  adalora,
  bitfit,
  bottleneck,
  freeze,
  ia3,
  lora,
  p_tuning,
  prefix,
  prompt,
)
from llm_jax.core import plugins, tree
from llm_jax.programs import assemble

SHIPPED = (adalora, bitfit, bottleneck, freeze, ia3, lora, p_tuning, prefix, prompt)
QUERY = 'model/stack/layers/block/attention/query'


@pytest.mark.parametrize(
  ('pattern', 'expected'),
  [
    ('query', True),
    ('value|query', True),
    ('attention/.*', True),
    ('.*', True),
    (QUERY, True),
    ('quer', False),  # whole components
    ('uery', False),
    ('attention', False),
    ('', False),
  ],
)
def test_a_pattern_is_for_the_end_of_a_path(pattern, expected):
  assert _targets.matches(pattern, QUERY) == expected
  assert not _targets.matches(pattern, 'heads_mlm/dense')


def test_heads_of_tasks_are_trained_and_the_masked_lm_head_only_when_asked():
  task, asked, none = (_targets.Heads(pattern) for pattern in (None, 'mlm', ''))
  assert 'heads_classifier/dense/kernel' in task and 'heads_mlm/bias' not in task
  assert 'heads_mlm/bias' in asked and 'heads_classifier/dense/kernel' not in asked
  assert 'heads_classifier/dense/kernel' not in none
  assert 'model/heads_classifier/kernel' not in task
  with pytest.raises(ValueError, match="heads='mlm' matches no head; there are: classifier"):
    asked.check({'heads_classifier/dense/kernel', 'model/x/kernel'})
  none.check(set())


@pytest.mark.parametrize(
  ('others', 'free'),
  [
    ((), False),  # a language model, or what may be one
    (('heads_mlm/bias', 'heads_classifier/dense/kernel'), False),
    (('heads_classifier/dense/kernel',), True),
    (('model/output/kernel',), True),
  ],
)
def test_a_table_that_is_the_projection_too_is_not_merged(others, free):
  """E + s A B, by NumPy."""
  rng = np.random.default_rng(0)
  shapes = dict(embedding=(7, 4), lora_embedding_a=(7, 2), lora_embedding_b=(2, 4))
  leaves = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  params = {f'model/embedder/token/{name}': x for name, x in leaves.items()}
  params |= {path: np.ones(3, np.float32) for path in others}
  adapter = lora.Adapter(rank=2, alpha=6.0, targets='', embeddings=True)
  if not free:
    with pytest.raises(ValueError, match=r'two tables. --export=adapter writes it for peft'):
      adapter.merged(tree.nest(params), {})
    return
  merged = tree.flatten(adapter.merged(tree.nest(params), {}))
  expected = leaves['embedding'] + 3 * leaves['lora_embedding_a'] @ leaves['lora_embedding_b']
  np.testing.assert_allclose(merged.pop('model/embedder/token/embedding'), expected, rtol=1e-5)
  assert merged.keys() == set(others)


@pytest.mark.parametrize(
  ('model', 'adapter', 'message'),
  [
    (
      'encoder',
      dict(name='lora', targets='querry'),
      "targets='querry' matches no linear map.*nearest: model/stack/layers/block/attention/query",
    ),
    ('encoder', dict(name='lora', targets='q('), 'targets=.* is no regular expression'),
    ('encoder', dict(name='lora', rank=17), 'rank=17 is above the smaller dimension of .*, 16'),
    ('encoder', dict(name='lora', rank=0), 'rank=0 must be at least 1'),
    ('encoder', dict(name='lora', alpha=0.0), 'alpha=0.0 must be above 0'),
    ('encoder', dict(name='lora', dropout=1.0), 'dropout=1.0 must be'),
    ('encoder', dict(name='lora', loraplus_lr_ratio=0.0), 'loraplus_lr_ratio=0.0 must be above 0'),
    ('encoder', dict(name='lora', rnak=3), 'rnak is not an option.*rank'),
    ('encoder', dict(name='lora', dora=True, embeddings=True), 'and tables have none; leave'),
    ('encoder', dict(name='lora', heads='clasifier'), 'heads=.*there are: classifier, pooler'),
    ('encoder', dict(name='lorra'), "'lorra' is not known.*did you mean 'lora'"),
    ('encoder', dict(rank=3), 'adapter.rank is set, and config.adapter.name is not'),
    ('encoder', dict(name='ia3', inputs='mlp/dwn'), "inputs='mlp/dwn' matches no linear map"),
    ('encoder', dict(name='ia3', inputs='', outputs=''), "inputs='' scale nothing; give one"),
    ('decoder', dict(name='freeze'), 'trains heads, and this objective has none'),
    ('decoder', dict(name='freeze', layers=3), 'layers=3 is more than the 2 layers'),
    ('decoder', dict(name='freeze', layers=-1), 'layers=-1 must be at least 0'),
    ('encoder', dict(name='bottleneck', size=17), 'size=17 is above the width of the model, 16'),
    ('encoder', dict(name='bottleneck', placement='houlsbi'), "mean 'houlsby'"),
    ('encoder', dict(name='prefix', length=0), 'length=0 must be at least 1'),
    ('encoder', dict(name='prefix', hidden=0), 'hidden=0 must be at least 1, or None'),
    ('encoder', dict(name='prompt', length=0), 'length=0 must be at least 1'),
    ('encoder', dict(name='p_tuning', hidden=0), 'hidden=0 must be at least 1'),
    ('llama', dict(name='bitfit'), 'this model has none'),
    ('llama', dict(name='adalora', rank=2), 'target_rank=8 must be at least 1 and at most'),
    (
      'llama',
      dict(name='adalora', rank=2, target_rank=1, warmup_steps=3, final_steps=1),
      'leave none of the 4 steps of the run',
    ),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_compiled(tiny, model, adapter, message):
  with pytest.raises(ValueError, match=message):
    tiny.program(model, adapter)


def test_a_prefix_leaves_room_for_the_rows(tiny):
  assemble.check(tiny.config('decoder', dict(name='prefix', length=16)))
  with pytest.raises(ValueError, match='seq_len=16 .*max_len=32, less 17 positions of the adapter'):
    assemble.check(tiny.config('decoder', dict(name='prefix', length=17)))


def test_every_adapter_that_ships_has_defaults(tiny):
  known = {module.__name__.split('.')[-1]: module for module in SHIPPED}
  assert sorted(known) == plugins.names('adapter')
  for name, module in known.items():
    made = assemble.create_adapter(tiny.config('encoder', dict(name=name)))
    assert isinstance(made, module.Adapter)
  assert assemble.create_adapter(tiny.config()) is None


class Form:
  """A kernel that multiplies in its own way; its shape is not to be looked at."""

  def __init__(self, kernel):
    self.kernel = kernel

  def product(self, spec, x, dtype, result):
    return jnp.einsum(spec, x.astype(dtype), self.kernel.astype(dtype)).astype(result)


jax.tree_util.register_pytree_node(
  Form, lambda form: ((form.kernel,), None), lambda _, leaves: Form(*leaves)
)


@pytest.mark.slow
@pytest.mark.parametrize('dora', [False, True])
def test_the_base_may_be_a_weight_form(tiny, dora):
  program = tiny.known('llama', dict(name='lora', rank=2, targets='attention/.*', dora=dora))
  state, batch = tiny.first_state(program, 'llama'), tiny.batch(program)
  params = tiny.shaken(state.network_params, dict(lora_b=0.05, lora_magnitude=0.05))
  path = f'{QUERY}/kernel'
  forms = tree.replace(params, {path: Form(tree.flatten(params)[path])})
  expected = tiny.hidden(program, params, batch)
  np.testing.assert_allclose(tiny.hidden(program, forms, batch), expected, atol=1e-5)
  other = tree.replace(params, {path: Form(2 * tree.flatten(params)[path])})
  assert np.abs(tiny.hidden(program, other, batch) - expected).max() > 1e-4
  with pytest.raises(ValueError, match=f'{path} is no array, but a weight form'):
    program.network.adapter.merged(forms, program.infos)


def test_scales_are_those_of_the_papers():
  """alpha / R (arXiv:2106.09685, section 4.1), alpha / sqrt(R) (arXiv:2312.03732, theorem 3.2)."""
  assert lora.Adapter(rank=4, alpha=6.0).scale == 1.5
  assert lora.Adapter(rank=4, alpha=6.0, rslora=True).scale == 3.0


@pytest.mark.slow
def test_dropout_acts_in_training_alone(tiny):
  options = dict(name='lora', rank=2, targets='attention/.*')
  plain, dropped = (tiny.known('llama', options | dict(dropout=rate)) for rate in (0.0, 0.9))
  batch = tiny.batch(plain)
  losses = {}
  for name, program in (('plain', plain), ('dropped', dropped)):
    state = tiny.first_state(program, 'llama')
    state = state.replace(params=tiny.shaken(state.params, dict(lora_b=0.1)))
    evaluated = program.eval_step(state.network_params, batch)['clm'][0]
    _, metrics = program.train_step(state, batch)
    losses[name] = float(evaluated), float(metrics['clm'][0])
  assert losses['plain'][0] == pytest.approx(losses['plain'][1], rel=1e-6)
  assert losses['dropped'][0] == losses['plain'][0]
  assert abs(losses['dropped'][1] - losses['plain'][1]) > 1e-4


@pytest.mark.slow
def test_layers_of_a_pattern_and_one_by_itself_are_adapted(tiny):
  """As ModernBERT's: the first layer is no part of a stack, the others are two stacks."""
  shape = dict(norm_order='pre', layers=3, window=4, global_every=2, positions='rope')
  options = dict(name='lora', rank=2, targets='attention/.*|mlp/down', dora=True)
  program, base = tiny.known('encoder', options, **shape), tiny.known('encoder', **shape)
  rng = np.random.default_rng(0)

  def drawn(path, x):
    around = float(path.endswith('scale'))
    return rng.normal(around, 0.02 if 'lora' in path else 0.2, x.shape).astype(np.float32)

  params, batch = tree.map_with_path(drawn, program.params), tiny.batch(program)
  infos = {path: info for path, info in program.infos.items() if path.endswith('lora_a')}
  assert sorted({(info.layer, info.stacked) for info in infos.values()}) == [
    (0, False),
    (1, True),
    (2, True),
  ]
  expected = tiny.hidden(program, params, batch)
  merged = program.network.adapter.merged(params, program.infos)
  np.testing.assert_allclose(tiny.hidden(base, merged, batch), expected, atol=2e-5)
  leaves = tree.flatten(params)
  plain = tree.nest({path: leaves[path] for path in base.base})
  assert np.abs(tiny.hidden(base, plain, batch) - expected).max() > 1e-3


def test_averages_would_bring_back_ranks_that_are_taken_out(tiny):
  adapter = dict(name='adalora', rank=2, target_rank=1)
  config = tiny.config('llama', adapter)
  optimizer = config.optimizer | dict(ema_decay=0.9)
  with pytest.raises(ValueError, match="ema_decay=0.9 would bring back what the adapter 'adalora'"):
    tiny.outlined(dataclasses.replace(config, optimizer=optimizer))
