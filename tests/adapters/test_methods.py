"""What every adapter must keep, on an encoder and a decoder, with its layers in a loop and without:
the base starts the network and keeps its bits, the trained share is what the paper says, the
optimizer keeps nothing of the rest, and merging changes nothing.
"""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax.core import tree

D, L, F, N, H, C, R, P = 16, 2, 32, 2, 8, 3, 2, 4
HEADS = D * D + D + D * C + C  # pooler and classifier
LABELS = dict(name='classify', task='multiclass', classes=('a', 'b', 'c'), dropout=0.0, pool='last')
# In each layer four of attention, two of the mlp, two of norms; and that of one more norm.
BIASES = L * (4 * D + F + D + 2 * D) + D
METHODS = {
  'lora': (dict(name='lora', rank=R), L * 2 * (D * R + R * N * H)),
  'everywhere': (
    dict(name='lora', rank=R, targets='attention/.*|mlp/.*', rslora=True),
    L * R * (4 * (D + D) + 2 * (D + F)),
  ),
  'dora': (dict(name='lora', rank=R, dora=True), L * 2 * (D * R + R * N * H + N * H)),
  'tables': (
    dict(name='lora', rank=R, embeddings=True),
    L * 2 * (D * R + R * N * H) + 64 * R + R * D,
  ),
  'adalora': (
    dict(name='adalora', rank=R, target_rank=1),
    L * 2 * (D * R + R + R * N * H),
  ),
  'ia3': (dict(name='ia3'), L * (2 * N * H + F)),
  'bitfit': (dict(name='bitfit'), BIASES),
  'houlsby': (dict(name='bottleneck', size=4), 2 * L * (2 * 4 * D + 4 + D)),
  'pfeiffer': (dict(name='bottleneck', size=4, placement='pfeiffer'), L * (2 * 4 * D + 4 + D)),
  'parallel': (
    dict(name='bottleneck', size=4, placement='parallel', scale=4.0),
    L * (2 * 4 * D + 4 + D),
  ),
  'freeze': (dict(name='freeze'), 0),
  'prefix': (dict(name='prefix', length=P), L * P * 2 * N * H),
  'prefix_mlp': (
    dict(name='prefix', length=P, hidden=5),
    P * D + D * 5 + 5 + L * (5 * 2 * N * H + 2 * N * H),
  ),
  'prompt': (dict(name='prompt', length=P), P * D),
  'p_tuning': (
    dict(name='p_tuning', length=P, hidden=5),
    P * D + D * 5 + 5 + 5 * 5 + 5 + 5 * D + D,
  ),
}
# How far each is moved: what is added is about as large as what is there.
OWN = dict(
  lora_b=0.02,
  lora_magnitude=0.02,
  lora_embedding_a=0.2,
  adalora_values=0.2,
  ia3_input=0.3,
  ia3_output=0.3,
  attention_bottleneck_up=0.1,
  mlp_bottleneck_up=0.1,
  prefix=0.5,
  prefix_up=0.5,
  prompt_embedding=0.5,
)
CURVED = ('houlsby', 'pfeiffer', 'parallel')  # not linear
PREFIXES, VIRTUAL = ('prefix', 'prefix_mlp'), ('prompt', 'p_tuning')
QUICK = {('dora', 'encoder', 1)}


def case(*values):
  return pytest.param(*values, marks=() if values in QUICK else pytest.mark.slow)


FORMS = [(k, u) for k in ('encoder', 'decoder') for u in (1, 0)]
CASES = [case(m, k, u) for m in METHODS for k, u in (FORMS[:1] if m == 'tables' else FORMS)]


def with_virtual(batch):
  """A batch whose two texts per row begin with virtual tokens."""
  tokens = np.array(batch['tokens'])
  for first in (0, 8):
    tokens[:, first : first + P] = 64 + np.arange(P)  # behind the vocabulary
  return batch | {'tokens': jax.device_put(tokens, batch['tokens'].sharding)}


@pytest.mark.parametrize(('method', 'model', 'unroll'), CASES)
def test_the_base_keeps_its_bits_and_the_rest_learns(tiny, method, model, unroll):
  adapter, count = METHODS[method]
  objective = LABELS if (method, model) == ('freeze', 'decoder') else {}
  base = tiny.known(model, objective=objective, unroll=unroll)
  program = tiny.known(model, adapter, objective, unroll=unroll)
  state, batch = tiny.first_state(program, model, objective), tiny.batch(program)
  first = jax.tree.map(np.asarray, state)
  whole, frozen = first.network_params, tiny.bits(first.frozen)

  # The trained share, and what is kept of it.
  heads = sum(x.size for path, x in tree.flatten(first.params).items() if path[:6] == 'heads_')
  assert sum(x.size for x in jax.tree.leaves(first.params)) == count + heads
  assert heads == (HEADS if model == 'encoder' else (method == 'freeze') * D * C)
  moments = [x.shape for x in jax.tree.leaves(program.state.opt_state) if x.ndim]
  assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(first.params)])

  # The network starts as its base, to the bit where the compiler does not fuse sums otherwise; but
  # for a prefix, which is seen from the start.
  plain = {path: x for path, x in tree.flatten(whole).items() if path in base.base}
  at_first = tiny.hidden(base, tree.nest(plain), batch)
  started = tiny.hidden(program, whole, batch)
  assert (started.tobytes() == at_first.tobytes()) == (method not in PREFIXES)
  if method in VIRTUAL:
    batch = with_virtual(batch)
    at_first = tiny.hidden(program, whole, batch)

  # Steps change what is trained, and nothing else.
  losses = []
  for _ in range(20):
    state, metrics = program.train_step(state, batch)
    losses.append(float(metrics['loss'][0]))
  assert losses[-1] < losses[0] and tiny.bits(state.frozen) == frozen
  after = tree.flatten(jax.tree.map(np.asarray, state.params))
  still = [path for path, x in tree.flatten(first.params).items() if np.array_equal(x, after[path])]
  assert still == []

  # Merged into the base it is the same; without it, another.
  strong = tiny.shaken(state.network_params, OWN)
  adapted = tiny.hidden(program, strong, batch)
  if method in (*CURVED, *PREFIXES, *VIRTUAL):
    with pytest.raises(ValueError, match=f'adapters.{adapter["name"]} cannot be merged'):
      program.network.adapter.merged(strong, program.infos)
    assert np.abs(adapted - at_first).max() > 1e-3
    return
  merged = program.network.adapter.merged(strong, program.infos)
  assert set(tree.paths(merged)) == base.base
  np.testing.assert_allclose(tiny.hidden(base, merged, batch), adapted, rtol=0, atol=1e-5)
  if method != 'freeze':
    assert np.abs(adapted - at_first).max() > 1e-3


@pytest.mark.parametrize(
  ('model', 'unroll'), [('decoder', 1), pytest.param('encoder', 0, marks=pytest.mark.slow)]
)
def test_the_layers_from_the_top_are_trained_alone(tiny, model, unroll):
  """Of each stack [layers, ...] the last layer moves, and weight decay leaves the others alone."""
  program = tiny.known(model, dict(name='freeze', layers=1), unroll=unroll)
  state, batch = tiny.first_state(program, model), tiny.batch(program)
  first = jax.tree.map(np.asarray, state)
  for _ in range(2):
    state, _ = program.train_step(state, batch)
  assert tiny.bits(state.frozen) == tiny.bits(first.frozen)
  before, after = (tree.flatten(jax.tree.map(np.asarray, x.params)) for x in (first, state))
  stacks = [path for path in before if '/layers/' in path]
  last = {'decoder': ['model/final_norm/bias', 'model/final_norm/scale'], 'encoder': []}[model]
  assert sorted(after) == sorted([*stacks, *last, *(path for path in after if 'heads_' in path)])
  assert len(stacks) == 16 and not any('embedder' in path for path in after)
  for path in stacks:
    assert before[path][0].tobytes() == after[path][0].tobytes()
    assert not np.array_equal(before[path][1], after[path][1])


@pytest.mark.slow
def test_one_layer_after_the_other_begins_to_learn(tiny):
  """Heads from the start, the upper layer and the last norm after two steps, the lower one after
  four; and then by steps of the usual size, as Adam has known their gradients all along.
  """
  program = tiny.known('decoder', dict(name='freeze', layers=2, every=2, heads=''), unroll=1)
  state, batch = tiny.first_state(program, 'decoder'), tiny.batch(program)
  moved = []
  for _ in range(5):
    before = tree.flatten(jax.tree.map(np.asarray, state.params))
    state, _ = program.train_step(state, batch)
    after = tree.flatten(jax.tree.map(np.asarray, state.params))
    moved.append({path: np.abs(after[path] - before[path]) for path in before})
  stacks, norm = [path for path in moved[0] if '/layers/' in path], 'model/final_norm/scale'
  for step, moves in enumerate(moved):
    assert (moves[norm].max() > 0) == (step >= 2)
    for path in stacks:
      lower, upper = moves[path]
      assert (lower.max() > 0, upper.max() > 0) == (step >= 4, step >= 2)
  # The rate is 0.01, and Adam's first updates are as large as that.
  assert max(moved[2][path].max() for path in stacks) < 0.013
  assert program.state.params.keys() == {'model'}


@pytest.mark.slow
def test_b_of_lora_may_learn_faster(tiny):
  """LoRA+: the update of B is so many times larger, all others are as they are; and with decay of
  the rate by layer both factors act.
  """
  moved = {}
  for ratio, decay in ((1.0, 1.0), (16.0, 1.0), (16.0, 0.5)):
    config = tiny.config('llama', dict(name='lora', rank=R, loraplus_lr_ratio=ratio))
    optimizer = config.optimizer | dict(layer_decay=decay)
    program = tiny.outlined(dataclasses.replace(config, optimizer=optimizer))
    state = tiny.first_state(program, 'llama')
    state = state.replace(params=tiny.shaken(state.params, dict(lora_b=0.05)))
    before = {path: np.asarray(x) for path, x in tree.flatten(state.params).items()}
    state, _ = program.train_step(state, tiny.batch(program))
    after = tree.flatten(state.params)
    moved[ratio, decay] = {path: np.asarray(after[path]) - x for path, x in before.items()}
  plain, plus, both = moved.values()
  for path, x in plain.items():
    times = 16.0 if path.endswith('lora_b') else 1.0
    np.testing.assert_allclose(plus[path], times * x, rtol=1e-3, atol=1e-6)
    of_layers = np.array([0.5, 1.0]).reshape(2, *[1] * (x.ndim - 1))
    np.testing.assert_allclose(both[path], of_layers * plus[path], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_beside_a_base_in_bfloat16_is_trained_in_float32(tiny):
  """Base, and what was drawn of it, in bfloat16; what learns, gradients' moments and heads, in
  float32, where steps far below the spacing of bfloat16 are kept.
  """
  kinds = lambda *trees: {str(x.dtype) for x in jax.tree.leaves(trees) if x.ndim}
  program = tiny.known(adapter=dict(name='lora', rank=R), unroll=0, param_dtype='bfloat16')
  assert kinds(program.state.frozen) == {'bfloat16'}
  assert kinds(program.state.params, program.state.opt_state) == {'float32'}
  whole = tiny.known(param_dtype='bfloat16', unroll=0)
  assert kinds(whole.state.params) == {'bfloat16'}  # without an adapter it is as the config says
  drawn, alone = (tree.flatten(made.init(0).network_params) for made in (program, whole))
  for path, x in alone.items():
    # The same draws; those in float32 may not have been rounded on the way.
    off = 2.0**-8 if drawn[path].dtype == np.float32 else 0.0
    np.testing.assert_allclose(np.asarray(drawn[path], np.float32), np.asarray(x, np.float32), off)
  state = program.init(0)
  frozen, before = tiny.bits(state.frozen), tree.flatten(jax.tree.map(np.asarray, state.params))
  state, _ = program.train_step(state, tiny.batch(program))
  after = tree.flatten(jax.tree.map(np.asarray, state.params))
  assert tiny.bits(state.frozen) == frozen
  learned = [path for path in before if not np.array_equal(before[path], after[path])]
  assert len(learned) > len(before) // 2  # all but the A of each pair, whose B is zero
