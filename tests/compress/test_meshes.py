"""Forms, and training toward them, are the same on four devices: in a process of its own (this file
as a script).
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from llm_jax.core import tree
from llm_jax.programs import assemble, forms, inference
from llm_jax.training import program as programs

ROOT = pathlib.Path(__file__).parents[2]
LLAMA = dict(name='decoder', norm='rmsnorm', norm_bias=False, bias=False, gated=True)
LLAMA |= dict(activation='silu', positions='rope', kv_heads=2, tied=False)
METHODS = [
  dict(name='int8'),
  dict(name='int8', activations='token'),
  dict(name='int8', group=4),
  dict(name='int4', group=4),
  dict(name='svd', share=0.8, weighted=False),
]
LEARNED = [
  dict(name='int8', activations='token'),
  dict(name='int4', group=4),
  dict(name='magnitude', share=0.5, begin=0.0, end=0.5, every=1),
  dict(name='movement', pattern='2:4', begin=0.0, end=0.5, every=1),
]
MESHES = [dict(fsdp=2, tensor=2, data=1), dict(fsdp=4, data=1)]


def drawn(path, leaf):
  rng = np.random.default_rng(sum(map(ord, path)))
  return rng.normal(path.endswith('scale'), 0.1, leaf.shape).astype(leaf.dtype)


def batch_of(program):
  made = {name: np.ones(x.shape, x.dtype) for name, x in program.batch.items()}
  rng = np.random.default_rng(0)
  for name in ('tokens', 'targets'):
    made[name] = rng.integers(7, 200, made[name].shape).astype(np.int32)
  return program.put(made)


def with_mesh(config, mesh):
  count = int(np.prod(list(mesh.values())))
  return programs.outline(dataclasses.replace(config, mesh=mesh), jax.devices()[:count])


def loss(config, mesh):
  devices = jax.devices()[: int(np.prod(list(mesh.values())))]
  config = dataclasses.replace(config, mesh=mesh)
  program = inference.outline(config, assemble.byte_tokenizer(config), devices)
  where = jax.tree.map(lambda leaf: leaf.sharding, program.params)
  params = jax.device_put(tree.map_with_path(drawn, program.params), where)
  kept = forms.kept(params, program.infos, program.formed, program.layout)
  metrics = program.eval_step(kept, batch_of(program))
  return float(np.divide(*metrics['clm']))


def learned(config, mesh):
  """What two steps make of parameters and of the optimizer's first moment, by path."""
  program = with_mesh(config, mesh)
  state = program.init(0)
  params = jax.device_put(
    tree.map_with_path(drawn, program.state.params),
    jax.tree.map(lambda leaf: leaf.sharding, program.state.params),
  )
  state = state.replace(params=params)
  for _ in range(2):
    state, _ = program.train_step(state, batch_of(program))
  found = optax.tree_utils.tree_get(state.opt_state, 'mu')
  return {path: np.asarray(x) for path, x in tree.flatten([found, state.params]).items()}


def measure(conftest):
  one = dict(data=1)
  base = conftest.config(LLAMA)
  plain = loss(base, one)
  for method in METHODS:
    config = dataclasses.replace(base, compress=method)
    alone = loss(config, one)
    assert alone != plain
    yield from (abs(loss(config, mesh) / alone - 1) for mesh in MESHES)
  for method in LEARNED:
    config = dataclasses.replace(base, compress=method)
    alone, spread = learned(config, one), learned(config, MESHES[0])
    yield max(float(np.abs(spread[p] - x).max() / np.abs(x).max()) for p, x in alone.items())


@pytest.mark.slow
def test_forms_are_the_same_on_every_mesh():
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  }
  command = [sys.executable, __file__]
  done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  evaluated, trained = found[: -len(LEARNED)], found[-len(LEARNED) :]
  assert len(evaluated) == len(METHODS) * len(MESHES) and max(evaluated) < 1e-5, found
  assert max(trained) < 1e-3, found


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parent))
  import conftest

  print(json.dumps(list(measure(conftest))))
