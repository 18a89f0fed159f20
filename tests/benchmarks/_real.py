"""What the benchmarks on real data share: figures kept in a file, this program's command line, a
plain loop of torch, and the table.

Each figure is of one run: a task, a method, a side (`ours` or `torch`), a seed. It is a line of
JSON, with the recipe that it was made by, and one that is in the file is not measured again. So a
benchmark may be spread over several calls: `--only=lora,full --side=ours --seeds=0`.
"""

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence

ROOT = pathlib.Path(__file__).parents[2]
SIDES = ('ours', 'torch')
KEY = ('task', 'method', 'side', 'seed', 'recipe')
NEVER = 10**6  # steps: what is then done after the last one alone
WARMUP = 0.1  # of all steps; from there the rate falls in a line to 0
ADAMW = {'name': 'adamw', 'warmup_fraction': WARMUP, 'weight_decay': 0.01, 'clip_norm': 1.0}


def flags(description: str) -> argparse.ArgumentParser:
  """The flags that all of these benchmarks have."""
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', type=pathlib.Path, required=True, help='folder of the package')
  parser.add_argument('--json', type=pathlib.Path, required=True, help='where the figures are kept')
  parser.add_argument('--only', help='methods, with commas between them; all by default')
  parser.add_argument('--side', choices=SIDES, help='both by default')
  parser.add_argument('--seeds', default='0,1,2')
  kept = pathlib.Path(tempfile.gettempdir()) / 'llm_jax_real'
  parser.add_argument('--work', type=pathlib.Path, default=kept, help='for texts and programs')
  return parser


def chosen(
  parser: argparse.ArgumentParser, options: argparse.Namespace, methods: Iterable[str]
) -> list[str]:
  """The methods that are asked for."""
  names = options.only.split(',') if options.only else list(methods)
  for name in names:
    if name not in methods:
      parser.error(f'--only={name}: it must be among {", ".join(methods)}.')
  return names


def seeds(options: argparse.Namespace) -> list[int]:
  """Those that are asked for."""
  return [int(seed) for seed in options.seeds.split(',')]


def measure(
  options: argparse.Namespace,
  wanted: Iterable[dict],
  run: Callable[[argparse.Namespace, dict], dict],
) -> list[dict]:
  """All lines of what is wanted, after what was not in the file yet has been measured.

  Args:
    options: of `flags`.
    wanted: the `KEY` of each figure.
    run: options and key to figures; each call has a process of its own.
  """
  options.work = options.work.absolute()
  options.work.mkdir(parents=True, exist_ok=True)
  found = []
  for key in wanted:
    line = next((line for line in _lines(options.json) if _key(line) == key), None)
    if line is None:
      began = time.monotonic()
      line = key | _apart(run, options, key)
      line['seconds'] = time.monotonic() - began
      line['load'] = os.getloadavg()[0]
      line['date'] = str(datetime.date.today())
      with options.json.open('a') as file:
        file.write(f'{json.dumps(line)}\n')
      print(json.dumps(line), flush=True)
    found.append(line)
  return found


def kept(options: argparse.Namespace, wanted: Iterable[dict]) -> list[dict]:
  """Those of the lines that are in the file already."""
  keys = list(wanted)
  return [line for line in _lines(options.json) if _key(line) in keys]


def _apart(function: Callable[..., dict], *args: object) -> dict:
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(function, *args).result()


def _lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _key(line: dict) -> dict:
  return {name: line[name] for name in KEY}


def written(path: pathlib.Path, lines: Iterable[str]) -> pathlib.Path:
  """A text file, made anew where it does not hold these lines."""
  text = '\n'.join(lines) + '\n'
  path.parent.mkdir(parents=True, exist_ok=True)
  if not path.exists() or path.read_text() != text:
    path.write_text(text)
  return path.resolve()


def program(work: pathlib.Path, config: str, options: dict[str, object], workdir=None) -> dict:
  """Runs `python -m llm_jax.main` to its end.

  Args:
    work: keeps tokens and compiled programs for the next run.
    config: name of a file in configs/.
    options: flags, without `--config.`.
    workdir: where the run stays; None for a folder that is removed.

  Returns:
    The last scores of the validation set; what is `trained`, in numbers; `optimizer_bytes`;
    `steps` and `seconds_per_step`, without the first step.
  """
  with tempfile.TemporaryDirectory(dir=work) as folder:
    workdir = pathlib.Path(workdir or folder)
    shared = {
      'data.cache': work / 'tokens',
      'logging.tensorboard': False,
      'eval_every': NEVER,
      'checkpoint.every': NEVER,
      'evaluation.rows': 0,
    }
    command = [sys.executable, '-m', 'llm_jax.main', f'--config=configs/{config}.py']
    command += [f'--workdir={workdir}']
    command += [f'--config.{name}={value}' for name, value in (shared | options).items()]
    programs = {'JAX_COMPILATION_CACHE_DIR': str(work / 'programs')}
    done = subprocess.run(
      command, cwd=ROOT, env=os.environ | programs, capture_output=True, text=True, check=False
    )
    if done.returncode:
      raise RuntimeError(f'{" ".join(command)}\n{done.stderr[-4000:]}')
    lines = _lines(workdir / 'metrics.jsonl')
    scores = next(line for line in reversed(lines) if line['split'] == 'validation')
    speeds = [line for line in lines if line['split'] == 'train' and 'seconds_per_step' in line]
    found = scores | _sizes(workdir) | {'steps': lines[-1]['step']}
    found['seconds_per_step'] = statistics.fmean(line['seconds_per_step'] for line in speeds)
    return found


def _sizes(workdir: pathlib.Path) -> dict[str, int]:
  """What the newest checkpoint holds."""
  import jax
  import orbax.checkpoint as ocp

  count = lambda leaf: math.prod(leaf.shape)

  numbered = (workdir / 'checkpoints').glob('[0-9]*')
  newest = max(numbered, key=lambda path: int(path.name))
  with ocp.PyTreeCheckpointer() as reader:
    state = reader.metadata((newest / 'state').absolute()).item_metadata.tree
  return {
    'trained': sum(map(count, jax.tree.leaves(state['params']))),
    'optimizer_bytes': sum(
      count(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state['opt_state'])
    ),
  }


def torch_loop(model, batches: Sequence[dict], rate: float, after=lambda step: None) -> dict:
  """Trains a network of transformers by the recipe of `ADAMW`, in a plain loop.

  Args:
    model: gives its loss for the arguments of a batch.
    batches: one for each step.
    rate: the highest learning rate.
    after: called with the number of each step that has been taken, from 1.

  Returns:
    What `program` returns, without scores.
  """
  import torch

  trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
  groups = [
    {'params': [p for p in trained if p.ndim > 1], 'weight_decay': ADAMW['weight_decay']},
    {'params': [p for p in trained if p.ndim <= 1], 'weight_decay': 0.0},
  ]
  optimizer = torch.optim.AdamW(groups, lr=rate)
  steps = len(batches)
  warmup = round(WARMUP * steps)
  factor = lambda step: min((step + 1) / max(warmup, 1), max(steps - step, 0) / (steps - warmup))
  schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
  model.train()
  began = time.perf_counter()
  for step, batch in enumerate(batches, 1):
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, ADAMW['clip_norm'])
    optimizer.step()
    schedule.step()
    after(step)
    optimizer.zero_grad()
    if step == 1:
      began = time.perf_counter()
  seconds = time.perf_counter() - began
  model.eval()
  kept = [x for state in optimizer.state.values() for x in state.values()]
  return {
    'trained': sum(p.numel() for p in trained),
    'optimizer_bytes': sum(x.numel() * x.element_size() for x in kept),
    'steps': steps,
    'seconds_per_step': seconds / max(steps - 1, 1),
  }


def shuffled(count: int, epochs: int, batch: int, seed: int) -> list[list[int]]:
  """The numbers of the texts of each step: all of them in each epoch, in another order."""
  draw, order = random.Random(seed), []
  for _ in range(epochs):
    order += draw.sample(range(count), count)
  return [order[start : start + batch] for start in range(0, len(order), batch)]


def spread(lines: Sequence[dict], name: str) -> str:
  """Mean and standard deviation of a figure over the seeds, and how many they are."""
  values = [line[name] for line in lines]
  if not values:
    return '-'
  deviation = f' ± {statistics.stdev(values):.4f}' if len(values) > 1 else ''
  return f'{statistics.fmean(values):.4f}{deviation} ({len(values)})'


def rate_of(lines: Sequence[dict], name: str = 'examples_per_second') -> str:
  """The median of a speed over the seeds."""
  return f'{statistics.median(line[name] for line in lines):.1f}' if lines else '-'


def count_of(lines: Sequence[dict], name: str) -> str:
  """A number that is the same for all seeds."""
  return f'{lines[0][name]:,}' if lines else '-'


def show(rows: Sequence[Sequence[str]]) -> None:
  """Prints a table in Markdown; the first row is its head."""
  head, *rest = rows
  for row in (head, ['---'] * len(head), *rest):
    print(f'| {" | ".join(row)} |')
