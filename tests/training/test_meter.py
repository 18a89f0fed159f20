"""The speed that a line of the log gives is that of its own steps."""

import types

import jax.numpy as jnp
import pytest

from llm_jax.training import meter


class Log:
  def __init__(self):
    self.lines = {}

  def write(self, step, split, values):
    self.lines[step] = values

  def progress(self, *_):
    pass

  say = progress


@pytest.mark.parametrize('ready', [True, False])
def test_the_speed_of_steps(ready, monkeypatch):
  """Steps of one second, the first of nine; on a CPU each is over as soon as it is dispatched, on a
  TPU when its numbers are there. The last line is of one step.
  """
  now = [0.0]
  monkeypatch.setattr(meter.time, 'perf_counter', lambda: now[0])
  loss = types.SimpleNamespace(is_ready=lambda: ready)

  def fetched(metrics):
    assert metrics['loss'][0] is loss
    return {'loss': (jnp.float32(2), 1.0), 'tokens': (jnp.float32(30), 1.0)}

  monkeypatch.setattr(meter.jax, 'device_get', fetched)
  config = types.SimpleNamespace(log_every=4, steps=9)
  program = types.SimpleNamespace(
    config=config,
    flops=1.0,
    mesh=types.SimpleNamespace(
      devices=types.SimpleNamespace(flat=[types.SimpleNamespace(device_kind='cpu')])
    ),
    network=types.SimpleNamespace(model=types.SimpleNamespace(causal=False)),
  )
  log = Log()
  gauge = meter.Meter(program, log, 0, {})
  for step in range(1, 10):
    seconds = 9.0 if step == 1 else 1.0
    # What is waited for at a dispatch is the step itself, or the one before it.
    now[0] += seconds if ready else (step > 1) * (9.0 if step == 2 else 1.0)
    gauge.dispatched(step, {'loss': (loss, 1.0)})
  now[0] += 0.0 if ready else 1.0
  gauge.flush()
  speeds = {step: line['seconds_per_step'] for step, line in log.lines.items()}
  assert speeds == {4: 1.0, 8: 1.0, 9: 1.0}
  assert log.lines[9]['tokens_per_second'] == 30.0
