"""The command line as a stranger meets it: every slip is one message and exit status 2, soon."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def call(*arguments, cwd=ROOT):
  return subprocess.run(
    [sys.executable, '-m', 'llm_jax.main', *map(str, arguments)],
    cwd=cwd,
    capture_output=True,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    check=False,
  )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      ['--config.optimizer.learning_rte=3'],
      "config.optimizer has no 'learning_rte'; did you mean 'learning_rate'?",
    ),
    (['--config.stepz=3'], "config has no 'stepz'; did you mean 'steps'?"),
    (['--config.steps=many'], '--config.steps=many: invalid literal for int()'),
    (['--config.data.source=text'], 'config.data needs path'),
    (['--config.data.source=text', '--config.data.path=/nowhere/*.txt'], '/nowhere/*.txt'),
    (['--config.objective.mask_rate=1.5'], 'objective.mask_rate=1.5 must be above 0'),
    (['--mode=predict'], '--mode=predict needs --input=x.jsonl and --output=y.jsonl'),
    (['--mode=eval'], 'holds no run'),
    (['--mode=sing'], 'sing'),
    (['somewhere'], 'somewhere: not a flag'),
    (['--wrkdir=x'], 'Did you mean: workdir'),
    (['--workdir=gs://bucket/run'], '--workdir=gs://bucket/run is an address'),
    (['--config.stepz=None'], "config has no 'stepz'; did you mean 'steps'?"),
    (
      ['--config.optimizer.warmup_fraction=None', '--config.data.source=text'],
      'config.data needs path',
    ),
    (["--config.data.fields=('words',)"], 'config.data.fields is not an option; allowed: none'),
    (['--config.optimizer.name=None'], "config.optimizer needs a 'name'"),
  ],
)
def test_a_slip_is_one_message(tmp_path, arguments, message):
  began = time.perf_counter()
  done = call(
    '--config=configs/bert_tiny.py',
    f'--workdir={tmp_path / "w"}',
    f'--config.data.cache={tmp_path}',
    *arguments,
  )
  assert message in done.stderr and 'Traceback' not in done.stderr, done.stderr
  assert (
    done.returncode in (1, 2) and time.perf_counter() - began < 60
  )  # generous: a machine that is busy with other tests


def test_no_config_no_workdir_no_file():
  assert '--workdir is needed' in call().stderr
  assert (
    '--config=configs/bert_tinny.py: no such file'
    in call('--config=configs/bert_tinny.py', '--workdir=/tmp/never').stderr
  )
  assert (
    'is not a size; there are tiny, small'
    in call('--config=configs/gpt2.py:huge', '--workdir=/tmp/never').stderr
  )
  said = call('--workdir=/tmp/never', '--mode=embed', '--config.data.text=body').stderr
  assert "'config.data.text' without --config=FILE; --text and --pair name" in said


SLOW = """
import os, signal, threading

WORKDIR, ALONE = 'never', True


def run(command):
  import jax
  import jax.numpy as jnp

  def long(x):
    for _ in range(300):
      x = jnp.sin(x @ x) + jnp.cumsum(jnp.sort(x), 0)
    return x

  lowered = jax.jit(long).lower(jnp.ones((64, 64)))
  signal.signal(signal.SIGINT, signal.default_int_handler)  # shells take it from what is behind &
  threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
  lowered.compile()
"""


@pytest.mark.slow
def test_ctrl_c_while_xla_compiles_is_no_crash(tmp_path):
  """An orderly exit would be one, by SIGSEGV."""
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'slow.py').write_text(SLOW)
  done = call('--mode=mine.slow', cwd=tmp_path)
  assert (done.returncode, done.stderr.splitlines()[-1:]) == (
    130,
    ['llm_jax: stopped by Ctrl-C; what was saved before is whole.'],
  )


@pytest.mark.slow
def test_the_configs_work_from_any_folder_and_a_run_predicts(tmp_path):
  rows = [
    f'{word * (i % 7 + 1)}{i},{kind}'
    for i in range(80)
    for word, kind in (('yes ', 'a'), ('no ', 'b'))
  ]
  (tmp_path / 'x.csv').write_text('text,kind\n' + '\n'.join(rows))
  done = call(
    f'--config={ROOT}/configs/classify.py',
    '--workdir=w',
    '--config.data.source=csv',
    '--config.data.path=x.csv',
    '--config.data.label=kind',
    '--config.data.cache=cache',
    '--config.tokenizer.vocab_size=300',
    '--config.model.dim=32',
    '--config.model.layers=1',
    '--config.steps=30',
    '--config.seq_len=32',
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'w' / 'tensorboard').is_dir() and (
    tmp_path / 'w' / 'loss.png'
  ).stat().st_size > 10_000
  (tmp_path / 'in.jsonl').write_text('{"text": "yes yes 7"}\n\n{"text": "no no 7"}\n')
  predict = ['--workdir=w', '--mode=predict', '--output=out.jsonl']
  assert call(*predict, '--input=in.jsonl', cwd=tmp_path).returncode == 0
  assert [
    json.loads(line)['label'] for line in (tmp_path / 'out.jsonl').read_text().splitlines()
  ] == ['a', 'b']
  for content, message in (
    ('{"txt": "yes", "other": "no"}', "no field 'text'; name the one to read with --text=FIELD"),
    ('', 'empty'),
    ('{"text"', 'not a JSON object'),
  ):
    (tmp_path / 'bad.jsonl').write_text(content)
    done = call(*predict, '--input=bad.jsonl', cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr, (
      done.stderr
    )
  assert (
    len((tmp_path / 'out.jsonl').read_text().splitlines()) == 2
  )  # the answers from before are not lost
