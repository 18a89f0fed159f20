"""Weights gathered and gradients scattered by hand: the same values on eight devices, and what the
TPU compiler makes of it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.parallel import fsdp, sharding, topology

pytestmark = pytest.mark.usefixtures('as_in_use')
EIGHT_DEVICES = """
import jax, numpy as np, jax.numpy as jnp
from unittest import mock
from llm_jax.parallel import fsdp, sharding
layout = sharding.create_layout(1, -1)
rng = np.random.default_rng(0)
x = rng.normal(size=(16, 3, 5, 8)).astype(np.float32)
w = rng.normal(size=(5, 8, 24)).astype(np.float32)

def loss(x, w):
  gathering = fsdp.gathering(('heads', 'head_dim', 'embed'), w.shape, x.shape[0])
  if gathering is None:
    y = jnp.einsum('...NH,NHD->...D', x, w)
  else:
    y = gathering.product('...NH,NHD->...D', x, w, jnp.float32)
  return jnp.sum(jnp.sin(y)), y

def run(line):
  def on(*args):
    with sharding.use(layout), mock.patch.object(fsdp, 'line', lambda mesh: line):
      return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*args)
  step = jax.jit(on)
  return *jax.tree.leaves(step(x, w)), step.lower(x, w).as_text()

*want, plain = run(None)
assert 'reduce_scatter' not in plain
# planes of 4 and lines of 2, and so on; a line of all is one round
for line, scatters in ((2, 2), (4, 2), (8, 1)):
  *got, text = run(line)
  assert text.count('stablehlo.reduce_scatter') == scatters, text
  assert text.count('stablehlo.all_gather') >= 1, text
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
# a device that keeps its own alone
with mock.patch.object(fsdp, 'scatter_sum', lambda g, size, line: g[:len(g) // size]):
  *wrong, _ = run(2)
assert not np.allclose(wrong[-1], want[-1], atol=1e-2)
print('ok')
"""

PLAN = """
import json, sys, jax
from llm_jax.core import config
from llm_jax.parallel import topology
from llm_jax.planning import costs
from llm_jax.training import program
from configs import gpt_tiny
tree = gpt_tiny.get_config().to_dict()
tree |= dict(batch_size=64, seq_len=128, micro_batches=1, mesh=dict(data=1, fsdp=-1))
tree['model'] |= dict(variant='llama_tiny', dim=1024, mlp_dim=2816, heads=8, layers=2)
tree['model'] |= dict(dtype='bfloat16', remat='full')
tree['optimizer'] = dict(name='adamw', learning_rate=1e-3)
topology.prepare(['v5p:4x4x4'])
made = program.outline(config.parse(tree), topology.devices('v5p:4x4x4'))
found = costs.costs(made.train_step.lower(made.state, made.batch).compile().as_text())
print(json.dumps({kind: [c.bytes, c.overlapped_bytes] for kind, c in found.collectives.items()}
                 | {'parameters': sum(leaf.size for leaf in jax.tree.leaves(made.state.params))}))
"""


def run(script, **environment):
  done = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.strip().splitlines()[-1]


def test_values_and_gradients_on_eight_devices():
  assert run(EIGHT_DEVICES, XLA_FLAGS='--xla_force_host_platform_device_count=8') == 'ok'


@pytest.mark.slow
def test_gradients_on_a_v5p_are_reduce_scattered_beside_the_products():
  found = json.loads(run(PLAN))
  gradients = 2 * found.pop('parameters')  # bytes, in bfloat16
  scattered, beside = found['reduce-scatter']
  assert (
    scattered > 0.7 * gradients and beside > 0.5 * scattered
  )  # the loss's own is taken with nothing left to run beside
  assert found['all-reduce'][0] < 0.1 * gradients


@pytest.mark.parametrize(
  ('name', 'mesh', 'line'),
  [
    ('v5p:4x4x4', dict(data=1, fsdp=-1), 4),
    ('v5p:4x4x8', dict(data=1, fsdp=-1), 8),
    ('v4:4x4x4', dict(data=1, fsdp=-1), 4),
    ('v5p:2x2x2', dict(data=1, fsdp=-1), None),  # no ring is closed
    ('v5p:4x4x4', dict(data=1, fsdp=16, tensor=4), None),
    ('v5p:4x4x4', dict(data=-1), None),
    ('v5e:4x4', dict(data=1, fsdp=-1), None),
    ('cpu:1', dict(data=1, fsdp=-1), None),
  ],
)
def test_lines_of_a_torus(name, mesh, line):
  made = sharding.create_mesh(**mesh, devices=topology.devices(name))
  assert fsdp.line(made) == line
  assert (fsdp.compiler_options(made) is not None) == (line is not None and name.startswith('v5p'))


def test_lines_and_planes_are_those_of_the_torus():
  mesh = sharding.create_mesh(1, -1, devices=topology.devices('v5p:4x4x8'))
  coordinates = np.array([device.coords for device in mesh.devices.reshape(-1)]).reshape(16, 8, 3)

  def varied(group):
    return sum(len(set(group[:, d])) > 1 for d in range(3))

  assert {varied(line) for line in coordinates} == {1}
  assert {varied(coordinates[:, i]) for i in range(8)} == {2}


@pytest.mark.parametrize(('rows', 'columns'), [(256, 128), (64, 512), (8, 4096), (5, 4096)])
def test_columns_make_enough_tiles(rows, columns):
  assert fsdp._columns(rows) == columns
