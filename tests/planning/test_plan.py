"""Plans: a real one by the TPU compiler through the command line, what would fit where something
does not, and the report.
"""

import json
import math
import pathlib
import re
import subprocess
import sys

from configs import bert_tiny, gpt_tiny
from llm_jax.core import config
from llm_jax.parallel import topology
from llm_jax.planning import plan
from llm_jax.programs import build
from llm_jax.training import memory

ROOT = pathlib.Path(__file__).parents[2]
TINY = dict(dim=64, layers=2, heads=2, mlp_dim=128, max_len=128)


def settings(module=gpt_tiny, **changes):
  tree = module.get_config().to_dict()
  for key, value in changes.items():
    tree[key] = tree[key] | value if isinstance(value, dict) else value
  return config.parse(tree)


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
  report = json.loads((tmp_path / 'plan.json').read_text())
  assert (
    report['fits']
    and report['chips'] == 4
    and report['mesh']['data'] == 4
    and report['global_batch_tokens'] == 16 * 128
  )
  hbm = report['hbm']
  assert 4 * report['parameters'] == hbm['parameters_bytes'] and hbm['limit_bytes'] == 15.75 * 2**30
  assert (
    hbm['parameters_bytes'] + hbm['optimizer_bytes']
    < hbm['arguments_bytes']
    < hbm['total_bytes']
    < 2**30
  )
  assert 1 <= report['executed_flops'] / report['model_flops'] < 1.3  # tiles of 128 for heads of 64
  sent = report['collectives']['all-reduce']['bytes']
  assert (
    1.9 * report['parameters'] < sent < 6.5 * report['parameters']
  )  # two or four bytes each; the tied table's twice
  assert 0 < report['step_seconds_roofline'] < 0.1 and report['suggestions'] == []
  text = (tmp_path / 'plan.md').read_text()
  assert text.strip() in done.stdout and text.startswith('# bert_tiny on v5e:2x2: fits')


def test_on_a_tpu_too_no_step_holds_the_logits_of_all_places():
  model = dict(dim=128, layers=1, heads=1, mlp_dim=128, max_len=1024, vocab_size=50257)
  asked = settings(model=model, batch_size=8, seq_len=1024, micro_batches=1)
  program = build.outline(asked, topology.devices('v5e:2x2')[:1])
  text = program.train_step.lower(program.state, program.batch).compile().as_text()
  shapes = [
    [int(size) for size in dims.split(',')] for dims in set(re.findall(r'f32\[([\d,]+)\]', text))
  ]
  held = [math.prod(shape) / 50257 for shape in shapes if set(shape) & {50257, 50304}]  # places
  assert 1000 < max(held) < 8 * 1024 / 4


def test_what_does_not_fit_says_what_would(monkeypatch):
  asked = settings(model=TINY, batch_size=8, seq_len=128, micro_batches=1)
  devices = topology.devices('cpu:1')
  none, full = (
    plan.measure(plan._changed(asked, {'model.remat': remat}), 'cpu:1', devices)
    for remat in ('none', 'full')
  )
  assert (
    none['hbm']['total_bytes'] > full['hbm']['total_bytes']
    and none['executed_flops'] < full['executed_flops']
  )
  monkeypatch.setattr(
    memory, 'limit', lambda *_: (none['hbm']['total_bytes'] + full['hbm']['total_bytes']) / 2
  )
  report = plan.plan(asked, 'cpu:1')
  last = report['suggestions'][-1]
  assert not report['fits'] and last['fits'] and last['changes']['model.remat'] in memory.REMATS[1:]
  assert plan.plan(plan._changed(asked, last['changes']), 'cpu:1')['fits']
  assert f'this change would fit: `{last["flags"]}`' in plan.describe(report)


def test_a_state_that_is_too_large_is_not_compiled(monkeypatch):
  monkeypatch.setattr(memory, 'limit', lambda *_: 1000.0)
  report = plan.plan(settings(model=TINY, micro_batches=None), 'cpu:1')
  assert not report['fits'] and report['executed_flops'] is None and report['compile_seconds'] < 30
  assert 'none of the changes tried fits' in plan.describe(report)


def test_changes_begin_with_those_that_cost_least():
  report = {
    'device_batch_sequences': 8,
    'micro_batches': 1,
    'remat': 'none',
    'mesh': {'fsdp': 1},
    'hbm': dict(parameters_bytes=1, optimizer_bytes=2, gradients_bytes=1, limit_bytes=5),
  }
  changes = list(plan._changes(settings(), report))
  assert changes[:4] == [
    {'model.remat': remat} for remat in ('dots', 'narrow', 'attention', 'full')
  ]
  assert changes[4] == {'model.remat': 'full', 'micro_batches': 2}
  assert changes[-1] == {'mesh.data': 1, 'mesh.fsdp': -1, 'model.remat': 'full', 'micro_batches': 8}
  report['hbm']['limit_bytes'] = 3  # the state itself must be cut
  assert all('mesh.fsdp' in change for change in plan._changes(settings(), report))


def test_several_topologies_are_compared(tmp_path, capsys):
  report = plan.run(settings(bert_tiny, model=TINY, batch_size=4), 'cpu:1,cpu:1', tmp_path)
  assert [r['chips'] for r in report['scaling']] == [
    1,
    1,
  ] and 'from 1 to 1 chips' in capsys.readouterr().out
