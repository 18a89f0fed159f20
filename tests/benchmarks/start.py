"""Seconds from the start of a process to its first step, cold and warm; and of the imports.

    python tests/benchmarks/start.py [--config=configs/bert_tiny.py] [--pairs=5] [--json=FILE]

Cold: no tokenizer, no tokens, nothing compiled. Warm: all of it kept by the start before, in the
cache folder and in the workdir. The first step has ended when its numbers are in metrics.jsonl;
the process is then killed. Imports are timed in fresh processes: `import jax`, and after it
`import llm_jax.main` (the command line) or `import llm_jax.training.loop` (all that training
needs), alternating.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]


def first_step(config, workdir, cache):
  """Seconds from the start of a process to its first step."""
  path = workdir / 'metrics.jsonl'
  path.unlink(missing_ok=True)
  command = [
    sys.executable,
    '-m',
    'llm_jax.main',
    f'--config={config}',
    f'--workdir={workdir}',
    f'--config.data.cache={cache}',
    '--config.log_every=1',
  ]
  began = time.perf_counter()
  with open(workdir.with_suffix('.log'), 'w') as log:
    process = subprocess.Popen(command, cwd=ROOT, stderr=log)
  try:
    while not path.exists() or '"train"' not in path.read_text():
      if process.poll() is not None:
        raise SystemExit(workdir.with_suffix('.log').read_text())
      time.sleep(0.01)
    return time.perf_counter() - began
  finally:
    process.kill()
    process.wait()


def imported(*modules):
  """Seconds that a fresh process takes to import some modules, one after another."""
  code = 'import time; began = time.perf_counter(); ' + ''.join(
    f'import {module}; ' for module in modules
  )
  return float(
    subprocess.run(
      [sys.executable, '-c', f'{code}print(time.perf_counter() - began)'],
      cwd=ROOT,
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    ).stdout
  )


def main(argv):
  """Prints a table, and writes the figures where they are wanted."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', default='configs/bert_tiny.py')
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--json')
  options = parser.parse_args(argv)
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    cold = first_step(options.config, folder / 'run', folder / 'cache')
    warm = [
      first_step(options.config, folder / 'run', folder / 'cache') for _ in range(options.pairs)
    ]
  found['first_step'] = {'cold': cold, 'warm': statistics.median(warm), 'ours': warm}
  print(
    f'{options.config}: first step after {cold:.1f} s cold, {statistics.median(warm):.1f} s warm '
    f'(median of {len(warm)}).'
  )
  print(
    f'{"import":16} {"jax":>7} {"with it":>8} {"adds":>6}   seconds, medians of {options.pairs} '
    'pairs'
  )
  for module in ('llm_jax.main', 'llm_jax.training.loop'):
    times = [(imported('jax'), imported('jax', module)) for _ in range(options.pairs)]
    theirs, ours = (statistics.median(column) for column in zip(*times, strict=True))
    added = statistics.median(b - a for a, b in times)
    found[module] = {
      'ratio': ours / theirs,
      'ours': ours,
      'theirs': theirs,
      'added': added,
      'pairs': times,
    }
    print(
      f'{module:16} {theirs:7.2f} {ours:8.2f} {added:6.2f}   load {os.getloadavg()[0]:.1f}',
      flush=True,
    )
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == '__main__':
  main(sys.argv[1:])
