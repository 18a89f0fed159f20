import os
import subprocess
import sys

import pytest

from llm_jax import sharding

SCRIPT = '''
import jax, numpy as np, jax.numpy as jnp, flax.linen as nn, optax
from jax.sharding import PartitionSpec as P
from llm_jax import sharding
mesh = sharding.create_mesh(data=-1, fsdp=2, tensor=2)
assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2} and sharding.row_shards(mesh) == 4
S = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
box = lambda value, *names: nn.LogicallyPartitioned(value, names)
boxed = {'a': {'kernel': box(S(4, 8, 6, 3), 'layers', 'embed', 'heads', 'head_dim')},
         'b': {'bias': box(S(7), 'vocab')}, 'c': S(2)}
found, reports = sharding.parameter_shardings(mesh, boxed)
assert found['a']['kernel'].spec == P(None, 'fsdp', 'tensor', None), found
assert found['b']['bias'].spec == P(None) and found['c'].spec == P()
assert reports == ["['b']['bias']: vocab of size 7 does not divide by tensor=2 and stays whole"], reports
params = nn.meta.unbox(boxed)
state = jax.eval_shape(optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init, params)
where = sharding.optimizer_shardings(mesh, params, found, state)
specs = {jax.tree_util.keystr(p): s.spec for p, s in jax.tree_util.tree_leaves_with_path(where)}
assert [s for p, s in specs.items() if p.endswith("['a']['kernel']")] == [P(None, 'fsdp', 'tensor', None)] * 2, specs
assert [s for p, s in specs.items() if p.endswith('count')] == [P()] * len([p for p in specs if p.endswith('count')])
print('ok')
'''


def test_rules_on_eight_devices():
  done = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, check=False, env={
      **os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0 and done.stdout.strip() == 'ok', done.stderr[-2000:]


@pytest.mark.parametrize(('sizes', 'message'), [
    ({'data': 3}, r"wants 3 devices; there are 1\. Set one axis to -1"),
    ({'data': -1, 'tensor': 2}, r'wants a multiple of 2 devices; there are 1'),
    ({'data': -1, 'fsdp': -1}, r'at most one is -1'),
    ({'data': 0}, r'sizes are at least 1'),
])
def test_an_impossible_mesh_is_an_error(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.create_mesh(**sizes, devices=['the only one'])
