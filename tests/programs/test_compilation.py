"""Compiled programs on disk: a second start compiles nothing, computes the same to the last bit,
and heals what was cut short.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from jax._src import compilation_cache

from llm_jax.programs import compilation

ROOT = pathlib.Path(__file__).parents[2]
START = """
import pathlib, sys, warnings
import jax, jax.numpy as jnp
from llm_jax.programs import compilation
warnings.simplefilter('error')
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
compilation.keep(pathlib.Path(sys.argv[1]))
x = jax.random.normal(jax.random.key(0), (64, 64))
y = jax.jit(lambda x: jnp.tanh(x @ x).sum(0))(x)
counts = [seen.count(f'/jax/compilation_cache/cache_{name}') for name in ('hits', 'misses')]
print(*counts, y.tobytes().hex())
"""

BARE = dict(os.environ) | {'JAX_PLATFORMS': 'cpu'}
BARE.pop('JAX_COMPILATION_CACHE_DIR', None)


def start(folder, **environment):
  done = subprocess.run(
    [sys.executable, '-c', START, str(folder)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=BARE | environment,
  )
  assert done.returncode == 0, done.stderr
  hits, misses, value = done.stdout.split()
  return int(hits), int(misses), value, done.stderr


def test_what_was_cut_short_is_dropped_and_nothing_else(tmp_path):
  whole = compilation_cache.compress_executable(b'a program ' * 100)
  (tmp_path / 'whole-cache').write_bytes(whole)
  (tmp_path / 'damaged-cache').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'empty-cache').touch()
  (tmp_path / 'another').write_text('a file of somebody else')
  compilation._drop_damaged(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['another', 'whole-cache']


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_a_damaged_entry_is_replaced(tmp_path):
  hits, misses, value, _ = start(tmp_path)
  entries = sorted(tmp_path.glob('xla_cache/cpu-*/*-cache'))
  assert hits == 0 and misses == len(entries) > 1
  assert start(tmp_path)[:3] == (misses, 0, value)
  whole = entries[-1].read_bytes()
  entries[-1].write_bytes(whole[: len(whole) // 2])
  hits, missed, again, log = start(tmp_path)
  assert (hits, missed, again) == (misses - 1, 1, value) and f'{entries[-1]} is damaged' in log
  assert len(entries[-1].read_bytes()) > len(whole) // 2 and start(tmp_path)[1] == 0


@pytest.mark.slow
def test_a_folder_that_jax_was_given_goes_first(tmp_path):
  start(tmp_path / 'ours', JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'given'))
  assert not (tmp_path / 'ours').exists() and list((tmp_path / 'given').glob('*-cache'))


def without_speed(line):
  return {key: value for key, value in line.items() if 'second' not in key}


@pytest.mark.slow
def test_a_run_has_the_same_numbers_with_what_was_compiled_before_and_without(tmp_path):
  (tmp_path / 'text.txt').write_text(
    '\n'.join(f'{n} times {n} is {n * n}, and one more {n * n + 1}.' for n in range(600))
  )

  def run(name, *flags):
    done = subprocess.run(
      [
        sys.executable,
        '-m',
        'llm_jax.main',
        '--config=configs/gpt_tiny.py',
        f'--workdir={tmp_path / name}',
        f'--config.data.cache={tmp_path}',
        '--config.data.source=text',
        f'--config.data.path={tmp_path}/text.txt',
        '--config.data.unit=line',
        '--config.data.validation=0.2',
        '--config.tokenizer.vocab_size=400',
        '--config.model.dim=32',
        '--config.model.layers=1',
        '--config.batch_size=2',
        '--config.seq_len=32',
        '--config.evaluation.rows=2',
        '--config.logging.tensorboard=False',
        '--config.steps=3',
        '--config.log_every=1',
        *flags,
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
      env=BARE,
    )
    assert done.returncode == 0, done.stderr
    found = tmp_path.glob(f'{name}/xla_cache/*/*-cache')
    entries = {path.name: path.stat().st_mtime_ns for path in found}
    lines = (tmp_path / name / 'metrics.jsonl').read_text().splitlines()
    return [without_speed(json.loads(line)) for line in lines], entries

  numbers, entries = run('cold')
  assert len(numbers) == 4 and any('wrapped' in name for name in entries)
  shutil.copytree(tmp_path / 'cold' / 'xla_cache', tmp_path / 'warm' / 'xla_cache')
  assert run('warm') == (numbers, entries)  # nothing added, nothing written anew
  assert run('without', '--nocompilation_cache') == (numbers, {})
