"""Peak memory of a training process while it takes steps, against what the state and the compiled
step need.

    python tests/benchmarks/memory.py [--cases=bert_tiny,gpt_tiny] [--steps=20] [--json=FILE]
    [--config.a.b=value ...]

Theirs: the bytes that XLA says the compiled step needs (state and batch, results that share no
memory with them, temporaries).
Ours: the most that the process held (VmHWM, reset after the first steps) while the loop of `train`
took `steps` steps, less what it held with all modules imported and the corpus open, before there
was a state. A process of its own per case; needs Linux.
"""

import argparse
import contextlib
import json
import pathlib
import runpy
import subprocess
import sys
import tempfile
from unittest import mock

from llm_jax.parallel.cpu import memory

ROOT = pathlib.Path(__file__).parents[2]
MIB = 2**20
WARM = 3  # steps before the peak is reset


def measure(case, steps, changes):
  """The figures of one case, in this process."""
  sys.path.insert(0, str(ROOT))  # the configs import each other
  from llm_jax.core import config
  from llm_jax.parallel import hosts
  from llm_jax.programs import compilation, pretrained
  from llm_jax.programs import workdir as workdirs
  from llm_jax.training import corpora, loop

  parsed = config.parse(_settings(case, changes))
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder)
    workdirs.open_workdir(workdir)
    # `loop.prepare` in two parts: what is held between them is not the step's.
    data = corpora.load(pretrained.fill_in(parsed, workdir), workdir)
    before = memory.held('VmRSS')
    compilation.keep(pathlib.Path(tempfile.gettempdir()) / 'llm_jax_benchmark')
    run = loop.start(data, workdir)
    program, gauge = run.program, Gauge(steps)
    sizes = program.train_step.lower(program.state, program.batch).compile().memory_analysis()
    with mock.patch.object(hosts, 'preemption', lambda: contextlib.nullcontext(gauge)):
      loop.train(run)
  needed = (
    sizes.argument_size_in_bytes
    + sizes.output_size_in_bytes
    - sizes.alias_size_in_bytes
    + sizes.temp_size_in_bytes
  )
  ours = gauge.peak - before
  return {
    'ratio': ours / needed,
    'ours': ours,
    'theirs': needed,
    'state': sizes.argument_size_in_bytes,
    'temporaries': sizes.temp_size_in_bytes,
    'peak': gauge.peak,
    'before': before,
  }


class Gauge:
  """Stands where the loop asks whether to stop, once per step: the peak of all steps but the first
  ones, which compile.
  """

  def __init__(self, steps):
    self.steps, self.iteration, self.peak = steps, 0, 0

  def __call__(self):
    """Whether all steps have been taken."""
    self.iteration += 1
    if self.iteration == WARM:
      pathlib.Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM to what is held now
    over = self.iteration == WARM + self.steps
    if over:
      self.peak = memory.held('VmHWM')
    return over


def _value(text):
  try:
    return json.loads(text)
  except ValueError:
    return text


def _settings(case, changes):
  from ml_collections import config_dict

  options = runpy.run_path(str(ROOT / 'configs' / f'{case}.py'))['get_config']()
  options.update_from_flattened_dict({key: _value(text) for key, text in changes.items()})
  tree = config_dict.ConfigDict(options, convert_dict=True).to_dict()
  tree |= dict(steps=10**6, eval_every=10**6, logging=dict(tensorboard=False))
  tree['evaluation'] = dict(rows=16, samples=0)
  tree['checkpoint'] = dict(every=10**6, keep=1)
  return tree


def main(argv):
  """Prints a table, and writes the figures where they are wanted."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cases', default='bert_tiny,gpt_tiny')
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--json')
  parser.add_argument('--here', action='store_true', help='the one case in this process')
  options, rest = parser.parse_known_args(argv)
  changes = dict(flag.removeprefix('--config.').split('=', 1) for flag in rest)
  if options.here:
    memory.set_up()  # as `llm_jax.main` does, before JAX
    print(json.dumps(measure(options.cases, options.steps, changes)))
    return
  found = {}
  print(f'{"config":12} {"needed":>8} {"held":>8} {"ratio":>6} {"peak of the process":>20}   MiB')
  for case in options.cases.split(','):
    command = [
      sys.executable,
      __file__,
      f'--cases={case}',
      f'--steps={options.steps}',
      '--here',
      *rest,
    ]
    # What compiling leaves behind is not the step's: the second process finds it compiled.
    for _ in range(2):
      done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found[case] = figures = json.loads(done.stdout.splitlines()[-1])
    print(
      f'{case:12} {figures["theirs"] / MIB:8.0f} {figures["ours"] / MIB:8.0f} '
      f'{figures["ratio"]:6.2f} '
      f'{figures["peak"] / MIB:20.0f}',
      flush=True,
    )
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == '__main__':
  main(sys.argv[1:])
