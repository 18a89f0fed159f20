"""Peak memory of a training process while it takes steps, against what the state and the compiled
step need.

    python tests/benchmarks/memory.py [--cases=bert_tiny,gpt_tiny] [--steps=20] [--json=FILE]
    [--config.a.b=value ...]

Theirs: the bytes that XLA says the compiled step needs (state and batch, results that share no
  memory with them, temporaries).
Ours: the most that the process held (VmHWM, set back after the first steps) while the loop of
`train` took `steps` steps, less what it held with all modules imported and the corpus open, before
there was a state. A process a case; needs Linux.
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

ROOT = pathlib.Path(__file__).parents[2]
MIB = 2**20


def held(field):
  """Bytes of this process: VmRSS now, VmHWM at most."""
  line = next(
    line
    for line in pathlib.Path('/proc/self/status').read_text().splitlines()
    if line.startswith(field)
  )
  return int(line.split()[1]) * 1024


def measure(case, steps, changes):
  """The figures of one case, in this process."""
  sys.path.insert(0, str(ROOT))  # the configs import each other
  from ml_collections import config_dict

  from llm_jax.core import config
  from llm_jax.parallel import hosts
  from llm_jax.programs import compilation
  from llm_jax.programs import workdir as runs
  from llm_jax.training import corpora as prepare
  from llm_jax.training import loop as train

  options = runpy.run_path(str(ROOT / 'configs' / f'{case}.py'))['get_config']()
  options.update_from_flattened_dict({key: json.loads(value) for key, value in changes.items()})
  tree = config_dict.ConfigDict(options, convert_dict=True).to_dict() | dict(
    steps=10**6, eval_every=10**6
  )
  tree['evaluation'], tree['checkpoint'] = dict(rows=16, samples=0), dict(every=10**6, keep=1)
  tree['logging'] = dict(tensorboard=False)
  figures, turns = {}, 0

  def turn():
    nonlocal turns
    turns += 1
    if turns == 3:
      pathlib.Path('/proc/self/clear_refs').write_text('5')  # sets VmHWM back to what is held now
    if turns == steps + 3:
      figures['peak'] = held('VmHWM')
    return turns == steps + 3

  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder)
    runs.open_workdir(workdir)
    data = prepare.load(config.parse(tree), workdir)
    figures['before'] = held('VmRSS')
    compilation.keep(pathlib.Path(tempfile.gettempdir()) / 'llm_jax_benchmark')
    run = train.start(data, workdir)
    sizes = (
      run.program.train_step.lower(run.program.state, run.program.batch).compile().memory_analysis()
    )
    needed = (
      sizes.argument_size_in_bytes
      + sizes.output_size_in_bytes
      - sizes.alias_size_in_bytes
      + sizes.temp_size_in_bytes
    )
    with mock.patch.object(hosts, 'preemption', lambda: contextlib.nullcontext(turn)):
      train.train(run)
  ours = figures['peak'] - figures['before']
  return {
    'ratio': ours / needed,
    'ours': ours,
    'theirs': needed,
    'state': sizes.argument_size_in_bytes,
    'temporaries': sizes.temp_size_in_bytes,
  } | figures


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
    for _ in range(
      2
    ):  # what compiling leaves behind is not the step's: the second process finds it compiled
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
