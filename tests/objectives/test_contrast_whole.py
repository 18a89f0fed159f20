"""The contrastive gradient is that of the one whole batch, however it is packed, cut in parts or
laid on devices, dropout included; in float64, where nothing hides.

The devices are simulated by a process of their own (this file as a script).
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import TOKENIZER, TOLERANCE, assert_same, filled, network_of, shape

from llm_jax.core import metrics as metrics_lib
from llm_jax.core import params as params_lib
from llm_jax.data.documents import Memory
from llm_jax.models import encoder
from llm_jax.objectives import contrast, mix, mlm
from llm_jax.parallel import sharding
from llm_jax.programs import network as networks
from llm_jax.training import step

pytestmark = pytest.mark.slow
SEQ_LEN, ROWS, MICRO, DEVICES = 48, 32, 4, 8
DROPOUT = dict(layers=2, dropout=0.2, attention_dropout=0.2, unroll=1)
RNG = np.random.default_rng(0)


def model():
  return encoder.Model(vocab_size=TOKENIZER.vocab_size, **shape(SEQ_LEN, **DROPOUT))


def records():
  """Pairs of all lengths, some with negatives, one of them twice."""
  rng = np.random.default_rng(5)
  word = lambda: ''.join(rng.choice(list('abcdef '), rng.integers(2, 12)))
  made = [{'text': word(), 'pair': word()} for _ in range(60)]
  for index in range(0, 60, 5):
    made[index]['negatives'] = [word() for _ in range(1 + index % 2)]
  return [*made, made[7]]


def batch_of(objective, rows=ROWS):
  laid = objective.rows(Memory(records(), contrast.Objective.encode, TOKENIZER), SEQ_LEN)
  examples = [objective.transform(laid.example(i, RNG), RNG) for i in range(len(laid))]
  assert len(examples) <= rows
  return laid, filled(examples, rows)


def made(kind='contrast', **options):
  options = dict(symmetric=True, dims=(4,)) | options
  objective = contrast.Objective(TOKENIZER, **options)
  if kind == 'mix':
    parts = {'contrast': objective, 'mlm': mlm.Objective(TOKENIZER)}
    return mix.Objective(parts, 'contrast', {'contrast': 1.0, 'mlm': 0.5})
  return objective


def learned(network, params, batch, micro_batches, key=None):
  run = functools.partial(step.gradient, network=network, micro_batches=micro_batches)
  return jax.device_get(jax.jit(run)(params, batch, key))


def at_once(network, params, batch, key, parts):
  """The gradient of one graph that holds all parts with their dropout, and nothing twice."""

  def loss(params):
    metrics, found = [], []
    for number in range(parts):
      micro = {name: array[number::parts] for name, array in batch.items()}
      rngs = {'dropout': jax.random.fold_in(key, number)}
      each = networks.apply(network, params, micro, method='part', rngs=rngs, train=True)
      metrics.append(each[0])
      found.append(each[1])
    whole = lambda *arrays: jnp.stack(arrays, 1).reshape(-1, *arrays[0].shape[1:])
    summed = jax.tree.map(lambda *values: sum(values), *metrics)
    summed |= network.objective.compare(jax.tree.map(whole, *found), batch)
    return metrics_lib.total(summed, network.terms)

  return jax.device_get(jax.jit(jax.grad(loss))(params))


@pytest.mark.parametrize('kind', ['contrast', 'mix'])
def test_micro_batches_have_the_gradient_of_the_one_batch(kind):
  with jax.enable_x64(True):
    objective = made(kind)
    _, batch = batch_of(objective)
    network, params = network_of(model(), objective, batch)
    key = jax.random.PRNGKey(3)
    wanted = at_once(network, params, batch, key, MICRO)
    found, metrics = learned(network, params, batch, MICRO, key)
    assert_same(found, wanted)
    assert max(np.abs(g).max() for g in jax.tree.leaves(found)) > 1e-3
    one, same = (learned(network, params, batch, count) for count in (1, MICRO))
    assert_same(same, one)
    assert metrics['contrast'][1] == 61
    # What each part would learn for itself is something else.
    parts = [{name: array[i::MICRO] for name, array in batch.items()} for i in range(MICRO)]
    alone = [learned(network, params, part, 1)[0] for part in parts]
    with pytest.raises(AssertionError):
      assert_same(jax.tree.map(lambda *g: sum(g) / MICRO, *alone), one[0])


@pytest.mark.parametrize('loss', ['softmax', 'cosine'])
def test_packed_groups_learn_as_if_alone(loss):
  with jax.enable_x64(True):
    options = dict(loss=loss) if loss == 'softmax' else dict(loss=loss, symmetric=False)
    labelled = [record | {'label': i % 3 / 2} for i, record in enumerate(records())]
    results = []
    for packing in ('best_fit', 'none'):
      objective = made(packing=packing, **options)
      laid = objective.rows(Memory(labelled, contrast.Objective.encode, TOKENIZER), SEQ_LEN)
      examples = [laid.example(i, RNG) for i in range(len(laid))]
      batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
      network, params = network_of(model(), objective, batch)
      results.append(learned(network, params, batch, 1))
      if packing == 'best_fit':
        assert len(laid) < 61 / 2
        mixed = batch | {'segments': np.minimum(batch['segments'], 1)}
        wrong = learned(network, params, mixed, 1)
    assert_same(results[0], results[1])
    with pytest.raises(AssertionError):  # texts that see each other
      assert_same(wrong, results[1])


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


def deviations():
  """How far eight devices with four micro-batches are off the one graph, with dropout."""
  objective = made()
  _, batch = batch_of(objective)
  network, params = network_of(model(), objective, batch)
  key = jax.random.PRNGKey(3)
  wanted = at_once(network, params, batch, key, MICRO)
  layout = sharding.create_layout(data=2, fsdp=4)
  boxed = jax.eval_shape(network.init, jax.random.PRNGKey(0), batch)['params']
  shardings = sharding.parameter_shardings(layout, params, params_lib.infos(boxed))
  placed = jax.device_put(params, shardings)
  rows = jax.device_put(batch, sharding.batch_sharding(layout.mesh))
  with sharding.use(layout):
    found, _ = learned(network, placed, rows, MICRO, key)
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
  return dict(
    devices=len(rows['tokens'].sharding.device_set),
    apart=max(float(np.abs(x - y).max()) for x, y in pairs),
    largest=max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted)),
  )


if __name__ == '__main__':
  print(json.dumps(deviations()))
