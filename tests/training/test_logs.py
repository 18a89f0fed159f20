import io
import json
import logging
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.training import logs


def lines(workdir):
  return (workdir / logs.METRICS).read_text()


def record(workdir, steps, resume_step=0, close=True, **options):
  log = logs.Log(
    workdir, primary=True, steps=6, resume_step=resume_step, **{'tensorboard': False} | options
  )
  for step in steps:
    log.write(step, 'train', {'loss': 5.0 / step, 'accuracy': jnp.float32(0.5)})
    if step % 2 == 0:
      log.write(step, 'validation', {'loss': 6.0 / step, 'unigram_loss': 4.0})
  if close:
    log.close()
  return log


def test_a_resumed_run_ends_with_the_file_of_an_undisturbed_one(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').mkdir()
  record(tmp_path / 'a', range(1, 7))
  record(tmp_path / 'b', range(1, 6), close=False)
  with open(tmp_path / 'b' / logs.METRICS, 'a') as file:
    file.write('{"step": 6, "spl')  # killed while it wrote
  record(tmp_path / 'b', range(4, 7), resume_step=3)
  assert lines(tmp_path / 'b') == lines(tmp_path / 'a')
  steps = [json.loads(line)['step'] for line in lines(tmp_path / 'b').splitlines()]
  assert steps == [1, 2, 2, 3, 4, 4, 5, 6, 6]
  assert logs.read(tmp_path / 'b')[1:3] == [
    {'step': 2, 'split': 'train', 'loss': 2.5, 'accuracy': 0.5},
    {'step': 2, 'split': 'validation', 'loss': 3.0, 'unigram_loss': 4.0},
  ]


def test_lines_are_on_disk_when_written(tmp_path):
  record(tmp_path, [1], close=False)
  assert logs.read(tmp_path)[0]['loss'] == 5.0


def test_numbers_that_are_not_finite_are_null(tmp_path):
  log = logs.Log(tmp_path, primary=True, steps=1, tensorboard=False)
  log.write(1, 'train', {'loss': float('nan'), 'accuracy': 0.5})
  log.close()
  assert lines(tmp_path) == '{"step": 1, "split": "train", "loss": null, "accuracy": 0.5}\n'


def test_other_processes_write_nothing(tmp_path):
  log = logs.Log(tmp_path, primary=False, steps=1)
  log.write(1, 'train', {'loss': 1.0})
  log.progress(1, 1.0, 1.0, 1.0)
  log.say('hello')
  log.close()
  assert list(tmp_path.iterdir()) == []


def colours(path):
  from matplotlib.image import imread

  pixels = np.round(imread(path)[..., :3].reshape(-1, 3) * 255).astype(int)
  return {tuple(pixel) for pixel in pixels}


def test_plot_shows_the_losses_that_there_are(tmp_path):
  record(tmp_path, range(1, 7))
  train, validation, unigram = (0x9D, 0xB8, 0xD9), (0xC8, 0x55, 0x3D), (0x55, 0x55, 0x55)
  assert {train, validation, unigram} <= colours(tmp_path / logs.PLOT)
  (tmp_path / logs.METRICS).write_text(
    '{"step": 1, "split": "train", "loss": 2}\n{"step": 2, "split": "train", "loss": 1}\n'
  )
  logs.plot(tmp_path)
  assert {train, validation} & colours(tmp_path / logs.PLOT) == {train}
  (tmp_path / logs.METRICS).write_text('')
  logs.plot(tmp_path)


def test_tensorboard_events(tmp_path):
  record(tmp_path, [1, 2], tensorboard=True)
  events = b''.join(path.read_bytes() for path in (tmp_path / 'tensorboard').iterdir())
  assert b'train/loss' in events and b'validation/unigram_loss' in events
  assert b'validation/accuracy' not in events


def test_wandb_continues_its_run(tmp_path, monkeypatch):
  calls = []
  fake = types.SimpleNamespace(
    util=types.SimpleNamespace(generate_id=lambda: f'id{len(calls)}'),
    init=lambda **options: calls.append(options) or fake,
    log=lambda values, step: calls.append((step, values)),
    finish=lambda: calls.append('finish'),
  )
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  record(tmp_path, [1], wandb='bert', config={'steps': 6})
  record(tmp_path, [2], resume_step=1, wandb='bert')
  assert calls[0] == {
    'project': 'bert',
    'id': 'id0',
    'resume': 'allow',
    'dir': str(tmp_path),
    'config': {'steps': 6},
  }
  assert calls[1] == (1, {'train/loss': 5.0, 'train/accuracy': 0.5}) and calls[2] == 'finish'
  assert calls[3]['id'] == 'id0'


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(
    ValueError, match=r"wandb='bert' needs the package wandb: pip install llm_jax\[wandb\]"
  ):
    logs.Log(tmp_path, primary=True, steps=1, tensorboard=False, wandb='bert')


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(tmp_path, monkeypatch, caplog):
  caplog.set_level(logging.INFO, logger='absl')
  log = logs.Log(tmp_path, primary=True, steps=100, tensorboard=False)
  log.progress(40, 3.25, 12345.6, 2.0)
  assert caplog.messages == ['step 40/100  loss 3.2500  12,346 tokens/s  2 min 0 s left']
  monkeypatch.setattr(sys, 'stderr', Terminal())
  log = logs.Log(tmp_path, primary=True, steps=100, resume_step=10, tensorboard=False)
  log.progress(40, 3.25, 12345.6, 2.0)
  log.say('%d kept', 3)
  log.close()
  shown = sys.stderr.getvalue()
  assert '40/100' in shown and 'loss 3.2500' in shown
  assert caplog.messages[-1] == '3 kept'
  assert len([message for message in caplog.messages if 'tokens/s' in message]) == 2


def test_parameter_overview():
  params = {
    'model': {
      'kernel': jax.ShapeDtypeStruct((12, 100), jnp.float32),
      'bias': jax.ShapeDtypeStruct((), jnp.bfloat16),
    }
  }
  assert logs.parameter_overview(params).splitlines() == [
    'parameter     shape     type      count',
    '---------------------------------------',
    'model/bias    scalar    bfloat16      1',
    'model/kernel  12 x 100  float32   1,200',
    '1,201 parameters',
  ]
  mesh = jax.make_mesh((1,), ('fsdp',))
  spread = jax.ShapeDtypeStruct(
    (2, 3), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, 'fsdp'))
  )
  assert logs.parameter_overview({'a': spread}).splitlines()[2].split()[-2:] == ['-,', 'fsdp']


@pytest.mark.parametrize(
  'seconds, text',
  [
    (0.4, '0 s'),
    (59.6, '1 min 0 s'),
    (306, '5 min 6 s'),
    (3600, '1 h 0 min'),
    (86399.7, '1 day 0 h'),
    (3 * 86400 + 4.2 * 3600, '3 days 4 h'),
  ],
)
def test_duration(seconds, text):
  assert logs.duration(seconds) == text


def test_estimate_names_the_tiny_config_where_a_run_takes_days():
  long = logs.estimate(7.5, 1_000_000, 'configs/bert_tiny.py')
  assert '86 days' in long and '--config=configs/bert_tiny.py' in long
  short = logs.estimate(0.1, 600, 'configs/bert_tiny.py')
  assert 'about 1 min 0 s' in short and 'tiny' not in short
