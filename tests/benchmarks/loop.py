"""Time of the training loop over that of its bare compiled step: in one process, with the same
program and shapes, alternating.

    python tests/benchmarks/loop.py [--cases=bert_tiny,gpt_tiny] [--pairs=5] [--steps=30]
    [--json=FILE]

Theirs: `steps` calls of the compiled step with one batch that is on the device, then a wait. Ours:
as many iterations of the loop of `train`, with reading, masking, stacking, logging and TensorBoard,
without evaluations and checkpoints. The bare steps are run while the loop stands between two steps
with nothing under way; the batches that wait by then, up to four, are all that it has in advance.
"""

import argparse
import contextlib
import json
import os
import pathlib
import runpy
import statistics
import sys
import tempfile
import time
from unittest import mock

import jax
from ml_collections import config_dict

from llm_jax.core import config
from llm_jax.data import pipeline
from llm_jax.parallel import hosts
from llm_jax.training import logs, loop

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the configs import each other


class Clock:
  """Stands where the loop asks whether to stop, once per step: runs the bare steps in between, and
  takes the times of both.
  """

  def __init__(self, run, pairs, steps):
    self.run, self.pairs, self.steps = run, pairs, steps
    self.state = self.batch = None
    self.iteration, self.times = 0, []
    self.began = time.perf_counter()

  def __call__(self):
    """Whether all pairs are there."""
    self.iteration += 1
    if self.iteration % self.steps:
      return False
    jax.block_until_ready(self.run.state)
    ours = time.perf_counter() - self.began
    theirs = self.bare()
    if self.iteration > self.steps:  # the first round compiles
      self.times.append((theirs, ours))
    self.began = time.perf_counter()
    return len(self.times) == self.pairs

  def bare(self):
    """Seconds of as many bare steps."""
    program = self.run.program
    if self.state is None:
      self.state = jax.block_until_ready(program.init(0))
      batches = pipeline.batches(self.run.train, program.config.batch_size, put=program.put)
      self.batch = jax.block_until_ready(next(batches))
      batches.close()
    began = time.perf_counter()
    for _ in range(self.steps):
      self.state, metrics = program.train_step(self.state, self.batch)
    jax.block_until_ready((self.state, metrics))
    return time.perf_counter() - began


def measure(case, pairs, steps):
  """Seconds of the bare steps and of the loop in each pair."""
  tree = _tree(case) | dict(steps=10**6, eval_every=10**6, log_every=10)
  tree['evaluation'] = dict(rows=16, samples=0)
  tree['checkpoint'] = dict(every=10**6, keep=1)
  with tempfile.TemporaryDirectory() as folder:
    run = loop.prepare(config.parse(tree), pathlib.Path(folder))
    clock = Clock(run, pairs, steps)
    with mock.patch.object(hosts, 'preemption', lambda: contextlib.nullcontext(clock)):
      loop.train(run)
  return clock.times


def _tree(case):
  options = runpy.run_path(str(ROOT / 'configs' / f'{case}.py'))['get_config']()
  return config_dict.ConfigDict(options, convert_dict=True).to_dict()


def main(argv):
  """Prints a table, and writes the figures where they are wanted."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cases', default='bert_tiny,gpt_tiny')
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--json')
  options = parser.parse_args(argv)
  logs.show()
  found = {'cores': os.cpu_count(), 'jax': jax.__version__, 'steps': options.steps}
  print(
    f'{"config":12} {"bare step":>12} {"loop":>12} {"ratio":>6}   ms per step, medians of '
    f'{options.pairs} pairs',
    flush=True,
  )
  for case in options.cases.split(','):
    times = measure(case, options.pairs, options.steps)
    theirs, ours = (
      statistics.median(column) / options.steps for column in zip(*times, strict=True)
    )
    ratio = statistics.median(b / a for a, b in times)
    found[case] = {'ratio': ratio, 'ours': ours, 'theirs': theirs, 'pairs': times}
    print(
      f'{case:12} {theirs * 1e3:12.2f} {ours * 1e3:12.2f} {ratio:6.3f}   load '
      f'{os.getloadavg()[0]:.1f}',
      flush=True,
    )
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == '__main__':
  main(sys.argv[1:])
