"""Averages of the parameters on a mesh whose optimizer is cut finer than the parameters are."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALL = [
  *('--config.tokenizer.name=byte', '--config.model.dim=16', '--config.model.heads=2'),
  *('--config.model.layers=2', '--config.model.mlp_dim=32', '--config.batch_size=4'),
  *('--config.seq_len=32', '--config.data.source=text', '--config.data.unit=line'),
  *('--config.data.validation=0', '--config.evaluation.samples=0', '--config.steps=2'),
  *('--config.logging.tensorboard=False', '--config.optimizer.ema_decay=0.5'),
]


@pytest.mark.slow
def test_they_begin_with_the_weights_of_another_run_on_any_mesh(tmp_path):
  (tmp_path / 'text.txt').write_text('\n'.join(f'line {i} of a text' for i in range(40)))
  flags = '--xla_force_host_platform_device_count=4'
  env = os.environ | dict(JAX_PLATFORMS='cpu', XLA_FLAGS=flags, PYTHONPATH=str(ROOT))

  def train(name, *more):
    command = [sys.executable, '-m', 'llm_jax.main', f'--config={ROOT}/configs/gpt_tiny.py', *SMALL]
    command += [f'--workdir={name}', '--config.data.path=text.txt', *more]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Done. Checkpoints of steps 2' in done.stderr

  train('first')
  train('second', '--config.init_from=first', '--config.mesh.rules=zero1')
