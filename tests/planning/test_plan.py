"""Plans: a real one by the TPU compiler through the command line, what would fit where something
does not, and the report.
"""

import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

from configs import gpt_tiny
from llm_jax.core import config
from llm_jax.parallel import topology
from llm_jax.planning import plan, report
from llm_jax.training import memory, program

ROOT = pathlib.Path(__file__).parents[2]
TINY = dict(dim=64, layers=2, heads=2, mlp_dim=128, max_len=128)


def settings(module=gpt_tiny, **changes):
  tree = module.get_config().to_dict()
  for key, value in changes.items():
    tree[key] = tree[key] | value if isinstance(value, dict) else value
  return config.parse(tree)


@pytest.mark.slow
def test_the_smallest_plan_by_the_tpu_compiler(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'llm_jax.main',
      f'--config={ROOT}/configs/bert_tiny.py',
      '--mode=plan',
      '--topology=v5e:2x2',
      f'--workdir={tmp_path}',
      '--config.model.dtype=bfloat16',
      '--config.optimizer.name=adamw',
      '--config.model.layers=3',
    ],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert found['fits'] and found['chips'] == 4 and found['mesh']['data'] == 4
  assert found['global_batch_tokens'] == 16 * 128
  hbm = found['hbm']
  assert 4 * found['parameters'] == hbm['parameters_bytes'] and hbm['limit_bytes'] == 15.75 * 2**30
  state = hbm['parameters_bytes'] + hbm['optimizer_bytes']
  assert state < hbm['arguments_bytes'] < hbm['total_bytes'] < 2**30
  assert 1 <= found['executed_flops'] / found['model_flops'] < 1.3  # tiles of 128 for heads of 64
  sent = found['collectives']['all-reduce']['bytes']
  # Two or four bytes each; the tied table's twice.
  assert 1.9 * found['parameters'] < sent < 6.5 * found['parameters']
  assert 0 < found['step_seconds_roofline'] < 0.1 and found['suggestions'] == []
  text = (tmp_path / 'plan.md').read_text()
  assert text.strip() in done.stdout and text.startswith(
    '# bert_tiny with layers=3 on v5e:2x2: fits'
  )


@pytest.mark.slow
def test_on_a_tpu_too_no_step_holds_the_logits_of_all_positions():
  model = dict(dim=128, layers=1, heads=1, mlp_dim=128, max_len=1024, vocab_size=50257)
  asked = settings(model=model, batch_size=8, seq_len=1024, micro_batches=1)
  made = program.outline(asked, topology.devices('v5e:2x2')[:1])
  text = made.train_step.lower(made.state, made.batch).compile().as_text()
  dimensions = set(re.findall(r'f32\[([\d,]+)\]', text))
  shapes = [[int(size) for size in sizes.split(',')] for sizes in dimensions]
  positions = [math.prod(shape) / 50257 for shape in shapes if set(shape) & {50257, 50304}]
  assert 1000 < max(positions) < 8 * 1024 / 4


@pytest.mark.slow
def test_what_does_not_fit_says_what_would(monkeypatch):
  asked = settings(model=TINY | {'remat': 'none'}, batch_size=8, seq_len=128, micro_batches=1)
  devices = topology.devices('cpu:1')
  none, full = (
    plan.measure(plan._changed(asked, {'model.remat': remat}), 'cpu:1', devices)
    for remat in ('none', 'full')
  )
  assert none['hbm']['total_bytes'] > full['hbm']['total_bytes']
  assert none['executed_flops'] < full['executed_flops']
  limit = (none['hbm']['total_bytes'] + full['hbm']['total_bytes']) / 2
  monkeypatch.setattr(memory, 'limit', lambda *_: limit)
  found = plan.plan(asked, 'cpu:1')
  last = found['suggestions'][0]
  kinds = {key for one in found['suggestions'] for key in one['changes']}
  assert kinds == {'model.remat', 'micro_batches', 'batch_size'}  # one device: no mesh.fsdp
  assert not found['fits'] and last['fits'] and last['changes']['model.remat'] in memory.REMATS[1:]
  assert plan.plan(plan._changed(asked, last['changes']), 'cpu:1')['fits']
  assert f'this change would fit: `{last["flags"]}`' in report.describe(found)
  chosen = plan.plan(plan._changed(asked, {'model.remat': 'auto'}), 'cpu:1')
  assert chosen['fits'] and chosen['remat'] == last['changes']['model.remat']


def test_a_state_that_is_too_large_is_not_compiled(monkeypatch):
  monkeypatch.setattr(memory, 'limit', lambda *_: 1000.0)
  monkeypatch.setattr(memory, 'needed', lambda *_: pytest.fail('compiled'))
  found = plan.plan(settings(model=TINY, micro_batches=None), 'cpu:1')
  assert not found['fits'] and found['executed_flops'] is None and found['compile_seconds'] < 30
  assert 'take a smaller model, or more chips' in report.describe(found)


ROOMY = {  # a report as far as `_changes` reads it
  'device_batch_sequences': 8,
  'devices': 2,
  'micro_batches': 1,
  'remat': 'none',
  'mesh': {'fsdp': 1},
  'hbm': dict(parameters_bytes=1, optimizer_bytes=2, gradients_bytes=1, limit_bytes=5),
}
FULL, SHARDED = {'model.remat': 'full'}, {'mesh.data': 1, 'mesh.fsdp': -1}


def test_changes_begin_with_those_that_cost_least():
  pairs = list(plan._changes(settings(batch_size=16), ROOMY))
  kinds, changes = [kind for kind, _ in pairs], [change for _, change in pairs]
  remats = ('dots', 'narrow', 'attention', 'full')
  assert changes[:4] == [{'model.remat': remat} for remat in remats]
  assert changes[4] == FULL | {'micro_batches': 2}
  assert changes[-1] == SHARDED | FULL | {'micro_batches': 8}
  smaller = [change['batch_size'] for change in changes if 'batch_size' in change]
  assert smaller == [8, 4, 2]  # 4, 2 and 1 rows on each of two devices
  assert list(dict.fromkeys(kinds)) == ['remat', 'micro_batches', 'batch', 'fsdp']
  tight = ROOMY | {'hbm': ROOMY['hbm'] | {'limit_bytes': 3}}  # the state itself must be cut
  assert {kind for kind, _ in plan._changes(settings(), tight)} == {'fsdp'}
  assert not list(plan._changes(settings(), tight | {'devices': 1}))


def test_changes_of_a_model_that_may_know_no_remat():
  changes = [change for _, change in plan._changes(settings(), ROOMY | {'remat': '-'})]
  assert changes[0] == {'model.remat': 'dots'}
  assert {'micro_batches': 2} in changes and SHARDED in changes
  assert changes[-1] == SHARDED | {'micro_batches': 8}


@pytest.mark.slow
def test_several_topologies_are_compared(tmp_path):
  """As many rows per chip on more chips: what a chip sends grows, its own work does not."""
  run_here = [
    sys.executable,
    '-m',
    'llm_jax.main',
    f'--config={ROOT}/configs/bert_tiny.py',
    '--mode=plan',
    '--topology=cpu:1,cpu:2,cpu:4',
    f'--workdir={tmp_path}',
    '--config.batch_size=4',
    *(f'--config.model.{key}={value}' for key, value in TINY.items()),
  ]
  done = subprocess.run(run_here, capture_output=True, text=True, check=False, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert '# Collectives per device and step, from 1 to 4 chips' in done.stdout
  one, two, four = json.loads((tmp_path / 'plan.json').read_text())['scaling']
  assert [found['chips'] for found in (one, two, four)] == [1, 2, 4]
  assert [found['global_batch_sequences'] for found in (one, two, four)] == [4, 8, 16]
  assert one['device_batch_sequences'] == two['device_batch_sequences'] == 4
  assert four['mesh']['data'] == 4 and one['parameters'] == two['parameters'] == four['parameters']
  sent = [sum(kind['wire_bytes'] for kind in x['collectives'].values()) for x in (one, two, four)]
  assert sent[0] == 0 and sent[1] > 4 * one['parameters']  # every gradient, in a ring of two
  assert sent[2] == pytest.approx(1.5 * sent[1], rel=0.01)  # (n - 1) / n of it: 3/4 after 1/2
  assert two['executed_flops'] == pytest.approx(four['executed_flops'], rel=0.01)
