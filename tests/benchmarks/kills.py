"""Runs that are killed at random moments, and started again until they are done.

    python tests/benchmarks/kills.py [--count=200] [--seed=0] [--json=FILE]
    python tests/benchmarks/kills.py --cases=smaller --count=60

Series of starts of tiny runs of bert_tiny and classify, or, with `--cases=smaller`, of encoders and
decoders that train in a smaller form or with a teacher. Each series has a fresh workdir and a fresh
cache. A start gets SIGINT, SIGTERM or SIGKILL: half of them at a moment drawn from the whole
length of a run, half shortly after the first sign of a phase that was drawn. Then the same command
is started again. A start that ends before its moment ends the series, which must have the
parameters, optimizer state and metrics.jsonl (but for the timings) of an undisturbed run, to the
bit. What a series leaves behind that an undisturbed run does not is listed. Only compiled programs
are shared.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from llm_jax.programs.checkpoints import Checkpoints
from llm_jax.training import logs

ROOT = pathlib.Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
PHASES = ('start', 'tokenizer', 'cache', 'program', 'training', 'saving', 'evaluation', 'end')
TIMINGS = ('tokens_per_second', 'seconds_per_step', 'model_flops_utilization')
STEPS, EVAL_EVERY, PATIENCE = 30, 7, 120  # steps, steps, seconds
CONFIGS = {'bert_tiny': ('bert_tiny', {}), 'classify': ('classify', {})}
TEACHER = {'teacher': '{base}/{config}/run', 'seed': 1}
FORMS = {
  'int8': {'compress.name': 'int8', 'compress.activations': 'token'},
  'int4': {'compress.name': 'int4', 'compress.group': 8},
  'magnitude': {'compress.name': 'magnitude', 'compress.share': 0.6, 'compress.every': 4},
  'movement': {'compress.name': 'movement', 'compress.pattern': '2:4', 'compress.every': 4},
  'taught': TEACHER,
}
SMALLER = {config: (config, {}) for config in ('classify', 'gpt_tiny')}  # the teachers first
SMALLER |= {f'{kind} {form}': (kind, FORMS[form]) for form in FORMS for kind in tuple(SMALLER)}
SMALLER |= {'classify taught once': ('classify', TEACHER | {'distill.cached': True})}
CASES = {'configs': CONFIGS, 'smaller': SMALLER}


@dataclasses.dataclass
class Series:
  """Starts of one command.

  Attributes:
    command: what is started.
    folder: holds its workdir, cache and log.
    kills: (signal, phase) of each.
    fault: why it failed; '' where it ended as an undisturbed run.
    left: names that an undisturbed run does not leave.
  """

  command: list[str]
  folder: pathlib.Path
  kills: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  fault: str = ''
  left: list[str] = dataclasses.field(default_factory=list)


def corpus(folder, lines=6000):
  """Labelled lines of made-up words, as text.jsonl."""
  rng = random.Random(0)
  words = [''.join(rng.choices('abcdefghij', k=rng.randrange(2, 7))) for _ in range(300)]
  with open(folder / 'text.jsonl', 'w') as file:
    for number in range(lines):
      text = ' '.join(rng.choices(words, k=rng.randrange(5, 30)))
      file.write(json.dumps({'text': f'{number} {text}', 'label': text[0] < 'e'}) + '\n')


def series(case, base, folder):
  """A series that has not begun, on the corpus in `base`; a case is a config and more flags."""
  config, flags = case
  shape = dict(dim=32, layers=1, heads=2, mlp_dim=64, max_len=32)
  settings = {f'model.{key}': value for key, value in shape.items()} | {
    'data.cache': folder / 'cache',
    'data.source': 'jsonl',
    'data.path': base / 'text.jsonl',
    'data.validation': 0.02,
    'tokenizer.vocab_size': 300,
    'steps': STEPS,
    'batch_size': 4,
    'seq_len': 32,
    'log_every': 1,
    'eval_every': EVAL_EVERY,
    'checkpoint.every': 3,
    'evaluation.rows': 64,
    'logging.tensorboard': False,
  }
  if config == 'classify':
    settings['data.label'] = 'label'
  settings |= {
    name: value.format(base=base, config=config) if isinstance(value, str) else value
    for name, value in flags.items()
  }
  command = [sys.executable, '-m', 'llm_jax.main', f'--config={ROOT}/configs/{config}.py']
  command += [f'--workdir={folder / "run"}']
  folder.mkdir()
  return Series(command + [f'--config.{key}={value}' for key, value in settings.items()], folder)


def start(one, cache):
  """Starts the command; what it says is in `log`, which begins anew."""
  with open(one.folder / 'log', 'w') as log:
    return subprocess.Popen(
      one.command,
      cwd=ROOT,
      stdout=log,
      stderr=log,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(cache)},
    )


def undisturbed(one, cache):
  """Runs it to the end; returns its seconds."""
  began = time.perf_counter()
  process = start(one, cache)
  if process.wait() != 0:
    raise SystemExit((one.folder / 'log').read_text())
  return time.perf_counter() - began


def phase(one):
  """What the start at hand is doing, by its log and files."""
  said, run, cache = (one.folder / 'log').read_text(), one.folder / 'run', one.folder / 'cache'
  if 'Training on' not in said:
    if any(cache.glob('tokens/*.building-*')):
      return 'cache'
    if 'Tokenizer: training on' in said and 'Tokenizer: trained in' not in said:
      return 'tokenizer'
    return 'program' if 'Training corpus' in said else 'start'
  if 'Done.' in said:
    return 'end'
  if any(not (path / 'seal.json').exists() for path in run.glob('checkpoints/[0-9]*')):
    return 'saving'
  steps = re.findall(r'step (\d+)(/|  validation)', said)
  evaluating = steps and steps[-1][1] == '/' and int(steps[-1][0]) % EVAL_EVERY == 0
  return 'evaluation' if evaluating else 'training'


def moment(rng, seconds):
  """When to kill, as a function of the series and the seconds since the start."""
  if rng.random() < 0.5:
    when = rng.uniform(0, 1.05 * seconds)
    return lambda one, passed: passed >= when
  wanted, extra = rng.choice(PHASES[1:-1]), rng.uniform(0, 0.1)
  seen = []

  def due(one, passed):
    if not seen and phase(one) == wanted:
      seen.append(passed)
    return bool(seen) and passed >= seen[0] + extra

  return due


def killed(one, cache, number, due):
  """One start; returns whether it was killed, or else has ended by itself.

  Raises:
    RuntimeError: it ended with an error of its own, or did not end at all.
  """
  began, process = time.perf_counter(), start(one, cache)
  try:
    while process.poll() is None and not due(one, time.perf_counter() - began):
      time.sleep(0.002)
    if process.poll() is None:
      one.kills.append((number.name, phase(one)))
      process.send_signal(number)
      process.wait(timeout=PATIENCE)
      return True
  except subprocess.TimeoutExpired as error:
    raise RuntimeError(f'{number.name} did not end it in {PATIENCE} s') from error
  finally:
    if process.poll() is None:
      process.kill()
      process.wait()
  if process.returncode != 0:
    raise RuntimeError((one.folder / 'log').read_text()[-1500:])
  return False


def disturb(one, whole, cache, rng, seconds, most):
  """Kills and starts it until it is done, after `most` kills without another; then compares."""
  try:
    alive = True
    while alive:
      due = moment(rng, seconds) if len(one.kills) < most else lambda *_: False
      alive = killed(one, cache, rng.choice(SIGNALS), due)
  except RuntimeError as error:
    one.fault = str(error)
    return
  one.fault = difference(one.folder / 'run', whole.folder / 'run')
  one.left = sorted(names(one.folder) - names(whole.folder))


def names(folder):
  """What lies in the workdir, its checkpoints and the cache."""
  places = ('run/*', 'run/checkpoints/*', 'cache/*', 'cache/*/*')
  return {str(path.relative_to(folder)) for place in places for path in folder.glob(place)}


def difference(run, whole):
  """What a run has other than an undisturbed one; '' where all is equal to the bit."""
  if numbers(run) != numbers(whole):
    return 'metrics.jsonl differs'
  step = Checkpoints(whole / 'checkpoints', 2).steps()[-1]
  if step not in Checkpoints(run / 'checkpoints', 2).steps():
    return f'there is no checkpoint of step {step}'
  ours, theirs = state(run, step), state(whole, step)
  if jax.tree.structure(ours) != jax.tree.structure(theirs):
    return 'the state has other parts'
  same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), ours, theirs)
  return '' if all(jax.tree.leaves(same)) else 'the state differs'


def numbers(run):
  """The lines of metrics.jsonl without the timings."""
  return [{k: v for k, v in line.items() if k not in TIMINGS} for line in logs.read(run)]


def state(run, step):
  """All arrays of a checkpoint."""
  with ocp.PyTreeCheckpointer() as reader:
    restored = reader.restore(run / 'checkpoints' / str(step) / 'state')
  return jax.tree.map(np.asarray, restored)


def measure(folder, cache, count, seed, cases=CONFIGS):
  """Series until `count` starts have been killed.

  Args:
    folder: an empty one.
    cache: keeps what is compiled.
    count: kills in all.
    seed: of signals and moments.
    cases: taken in turns; each is first run twice, undisturbed, to `folder` and its name.
  """
  corpus(folder)
  rng, whole, seconds, found = random.Random(seed), {}, {}, []
  for name, case in cases.items():
    whole[name] = series(case, folder, folder / name)
    undisturbed(whole[name], cache)  # compiles
    seconds[name] = undisturbed(series(case, folder, folder / f'{name}_again'), cache)
  while (left := count - sum(len(one.kills) for one in found)) > 0:
    name = tuple(cases)[len(found) % len(cases)]
    one = series(cases[name], folder, folder / f'series_{len(found)}')
    found.append(one)
    disturb(one, whole[name], cache, rng, seconds[name], left)
    if one.fault:
      print(f'{one.folder.name}, {name}, killed at {one.kills}: {one.fault}', flush=True)
  return found


def show(found):
  """Prints kills by signal and phase, and how the series ended."""
  table = collections.Counter(kill for one in found for kill in one.kills)
  print(f'{"":8}' + ''.join(f'{name:>11}' for name in PHASES))
  for number in SIGNALS:
    print(f'{number.name:8}' + ''.join(f'{table[number.name, name]:11}' for name in PHASES))
  faults = sum(bool(one.fault) for one in found)
  print(
    f'{table.total()} kills in {len(found)} series: {len(found) - faults} ended as undisturbed to '
    f'the bit, {faults} failed.'
  )
  left = collections.Counter(
    re.sub(r'[0-9a-f]{8,}', '*', name) for one in found for name in one.left
  )
  print(f'Left behind: {dict(left) or "nothing"}.')


def main(argv):
  """Prints a table, and writes the series where they are wanted."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--count', type=int, default=200)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--cases', choices=CASES, default='configs')
  parser.add_argument('--json')
  options = parser.parse_args(argv)
  # A job in the background ignores SIGINT, and so would what it starts.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    cases = CASES[options.cases]
    found = measure(folder, folder / 'compiled', options.count, options.seed, cases)
  show(found)
  if options.json:
    listed = [dict(kills=one.kills, fault=one.fault, left=one.left) for one in found]
    pathlib.Path(options.json).write_text(json.dumps(listed, indent=2))
  return any(one.fault for one in found)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
