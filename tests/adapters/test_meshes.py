"""The gradient of what an adapter trains is the same on every mesh, with layers computed again and
without a loop: on four simulated devices, in a process of its own (this file as a script).
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
from llm_jax.training import program as programs

ROOT = pathlib.Path(__file__).parents[2]
DORA = dict(name='lora', rank=2, targets='attention/.*|mlp/.*', dora=True)
CASES = [
  (DORA, dict(fsdp=2, tensor=2), {}),
  (DORA, dict(data=2, sequence=2), {}),
  (DORA, dict(data=1), dict(remat='full')),
  (DORA, dict(data=1), dict(remat='full', unroll=0)),
  (dict(name='adalora', rank=2, target_rank=1), dict(fsdp=2, tensor=2), {}),
  (dict(name='ia3'), dict(fsdp=2, tensor=2), {}),
  (dict(name='bottleneck', size=4), dict(fsdp=2, tensor=2), {}),
  (dict(name='prefix', length=3, hidden=5), dict(fsdp=2, tensor=2), dict(remat='full')),
  (dict(name='prefix', length=3, hidden=5), dict(data=2, sequence=2), {}),
  (dict(name='p_tuning', length=3, hidden=5), dict(fsdp=2, tensor=2), {}),
]


def gradient(tiny, adapter, mesh, changes):
  """The gradient of the first batch, by path, from AdamW's first moment; parameters at random."""
  config = dataclasses.replace(tiny.config('llama', adapter, **changes), mesh=mesh)
  count = int(np.prod(list(mesh.values())))
  program = programs.outline(config, jax.devices()[:count])
  rng = np.random.default_rng(0)

  def drawn(path, x):
    return rng.normal(path.endswith('scale') or 'ia3' in path, 0.1, x.shape).astype(x.dtype)

  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.state)
  parts = {name: tree.map_with_path(drawn, getattr(zeros, name)) for name in ('params', 'frozen')}
  state = zeros.replace(**parts)
  state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, program.state)
  state, _ = program.train_step(state, tiny.batch(program))
  return {
    path: np.asarray(x)
    for path, x in tree.flatten(optax.tree_utils.tree_get(state.opt_state, 'mu')).items()
  }


def measure(tiny):
  """How far each case is off one device without anything, relative to each leaf's largest entry;
  and how far another adapter is.
  """
  known = {}
  for adapter, mesh, changes in CASES:
    key = adapter['name']
    if key not in known:
      known[key] = gradient(tiny, adapter, dict(data=1), {})
    yield deviation(gradient(tiny, adapter, mesh, changes), known[key])
  other = gradient(tiny, DORA | dict(alpha=20.0), dict(data=1), {})
  yield deviation(other, known['lora'])


def deviation(found, true):
  return max(float(np.abs(found[path] - x).max() / np.abs(x).max()) for path, x in true.items())


@pytest.mark.slow
def test_every_mesh_and_every_form_of_the_layers_has_the_same_gradient():
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  }
  command = [sys.executable, __file__]
  done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
  assert done.returncode == 0, done.stderr[-3000:]
  *found, other = json.loads(done.stdout.splitlines()[-1])
  assert len(found) == len(CASES) and max(found) < 1e-4, found
  assert other > 1e-2


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parent))
  import conftest

  print(json.dumps(list(measure(conftest))))
