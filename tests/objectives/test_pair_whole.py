"""Losses of `pair` that compare have the gradient of the one whole batch with a row for each pair,
however rows are packed, cut in parts or laid on devices; in float64, where nothing hides.

The devices are simulated by a process of their own (this file as a script).
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from exact import TOKENIZER, TOLERANCE, assert_same, filled, network_of, shape

from llm_jax.core import params as params_lib
from llm_jax.data.documents import Memory
from llm_jax.models import encoder
from llm_jax.objectives import pair
from llm_jax.parallel import sharding
from llm_jax.training import step

pytestmark = pytest.mark.slow
SEQ_LEN, COUNT, ROWS, MICRO, DEVICES = 32, 16, 16, 4, 8


def model():
  return encoder.Model(vocab_size=TOKENIZER.vocab_size, **shape(SEQ_LEN))


def records():
  """Pairs of all lengths, some labels equal, two without."""
  rng = np.random.default_rng(5)
  word = lambda: ''.join(rng.choice(list('abcdef '), rng.integers(1, 9)))
  made = [{'text': word(), 'pair': word(), 'label': int(rng.integers(6))} for _ in range(COUNT)]
  del made[3]['label'], made[11]['label']
  return made


def made(loss, packing='best_fit'):
  return pair.Objective(
    TOKENIZER, loss, range=(0, 5), dropout=0.0, unlabelled='ignore', packing=packing
  )


def batch_of(objective):
  laid = objective.rows(Memory(records(), pair.Objective.encode, TOKENIZER), SEQ_LEN)
  examples = [laid.example(i, None) for i in range(len(laid))]
  return len(laid), filled(examples, ROWS)


def learner(network, params, micro_batches=1):
  run = functools.partial(step.gradient, network=network, micro_batches=micro_batches)
  run = jax.jit(run)
  return lambda batch: jax.device_get(run(params, batch, None))


@pytest.mark.parametrize('loss', pair.RANKING)
def test_packed_and_in_parts_it_learns_as_if_alone(loss):
  with jax.enable_x64(True):
    objective = made(loss)
    packed_rows, packed = batch_of(objective)
    alone_rows, alone = batch_of(made(loss, 'none'))
    assert packed_rows <= ROWS * 2 / 3 and alone_rows == COUNT == ROWS
    network, params = network_of(model(), objective, packed)
    learn = learner(network, params)
    wanted, found = learn(alone), learn(packed)
    assert_same(found, wanted)
    assert max(np.abs(g).max() for g in jax.tree.leaves(found[0])) > 1e-3
    with pytest.raises(AssertionError):  # pairs that see each other
      assert_same(learn(packed | {'segments': np.minimum(packed['segments'], 1)}), wanted)
    if loss != 'cosent':
      return
    assert_same(learner(network, params, MICRO)(packed), wanted)
    # What each part would learn for itself is something else.
    parts = []
    for number in range(MICRO):
      mine = np.arange(ROWS)[:, None] % MICRO == number
      parts.append(learn(packed | {'label_weight': packed['label_weight'] * mine})[0])
    with pytest.raises(AssertionError):
      assert_same(jax.tree.map(lambda *g: sum(g) / MICRO, *parts), wanted[0])


def test_devices_have_the_gradient_of_one():
  root = pathlib.Path(__file__).parents[2]
  env = os.environ | {
    'PYTHONPATH': str(root),
    'JAX_ENABLE_X64': '1',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={DEVICES}',
  }
  done = subprocess.run(
    [sys.executable, __file__], capture_output=True, text=True, check=False, cwd=root, env=env
  )
  assert done.returncode == 0, done.stderr[-3000:]
  seen = json.loads(done.stdout)
  assert seen['devices'] == DEVICES and seen['apart'] < TOLERANCE and seen['largest'] > 1e-3, seen


def deviations(loss):
  """How far eight devices with two micro-batches are off the one device."""
  objective = made(loss)
  _, batch = batch_of(objective)
  network, params = network_of(model(), objective, batch)
  wanted, _ = learner(network, params)(batch)
  layout = sharding.create_layout(data=2, fsdp=4)
  boxed = jax.eval_shape(network.init, jax.random.PRNGKey(0), batch)['params']
  shardings = sharding.parameter_shardings(layout, params, params_lib.infos(boxed))
  placed = jax.device_put(params, shardings)
  rows = jax.device_put(batch, sharding.batch_sharding(layout.mesh))
  with sharding.use(layout):
    found, _ = learner(network, placed, 2)(rows)
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
  return dict(
    devices=len(rows['tokens'].sharding.device_set),
    apart=max(float(np.abs(x - y).max()) for x, y in pairs),
    largest=max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted)),
  )


if __name__ == '__main__':
  print(json.dumps(deviations('cosent')))
