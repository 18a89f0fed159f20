"""FLOP/s of the train step over what this machine's cores reach in bare matrix products, measured
in one run, alternating.

    python tests/benchmarks/roofline.py [--case=bert_base|gpt2] [--pairs=5] [--json=FILE]

The peak is the best of several products of the sizes that the models have, by jax and by torch, in
float32 on all cores. A step's FLOPs are those of its matrix products, three times the forward pass
(`Training.flops`); the cases are those of `pair_torch.py`.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

from llm_jax.parallel.cpu import memory

if __name__ == '__main__':
  memory.set_up()  # as `llm_jax.main` does, before JAX

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pair_torch  # noqa: E402
import torch  # noqa: E402

SIZES = ((1024, 768, 3072), (1024, 3072, 768), (2048, 2048, 2048))  # rows, inner, columns
SECONDS = 0.5  # of each product


def products():
  """(library, size) -> a function that runs that product once."""
  found = {}
  for size in SIZES:
    rng = np.random.default_rng(0)
    a = rng.normal(size=size[:2]).astype(np.float32)
    b = rng.normal(size=size[1:]).astype(np.float32)
    x, y = jax.device_put(a), jax.device_put(b)
    multiply = jax.jit(jax.numpy.matmul)
    u, v = torch.tensor(a), torch.tensor(b)
    found['jax', size] = lambda x=x, y=y, multiply=multiply: jax.block_until_ready(multiply(x, y))
    found['torch', size] = lambda u=u, v=v: u @ v
  return found


def rate(run, size):
  """GFLOP/s of one product, repeated."""
  run()
  began, count = time.perf_counter(), 0
  while time.perf_counter() - began < SECONDS:
    run()
    count += 1
  return 2e-9 * float(np.prod(size)) * count / (time.perf_counter() - began)


def main(argv):
  """Prints a table, and writes the figures where they are wanted."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--case', choices=('bert_base', 'gpt2'), action='append', help='both by default'
  )
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--json')
  options = parser.parse_args(argv)
  found = {'cores': os.cpu_count(), 'jax': jax.__version__, 'torch': torch.__version__}
  bare = products()
  for case in options.case or ('bert_base', 'gpt2'):
    with tempfile.TemporaryDirectory() as folder:
      ours = pair_torch.language_model(case, folder)[0]()
    for _ in range(pair_torch.WARM):
      ours.step()
    peaks, steps = {'jax': [], 'torch': []}, []
    for _ in range(options.pairs):
      for library in peaks:
        peaks[library].append(max(rate(bare[library, size], size) for size in SIZES))
      began = time.perf_counter()
      ours.step()
      steps.append(ours.program.flops / (time.perf_counter() - began) / 1e9)
    best = {library: statistics.median(values) for library, values in peaks.items()}
    step = statistics.median(steps)
    found[case] = {
      'ratio': step / max(best.values()),
      'ours': step,
      **{f'{library}_peak': best[library] for library in best},
    }
    print(
      f'{case:10} {step:6.1f} GFLOP/s; bare products: jax {best["jax"]:.1f}, torch '
      f'{best["torch"]:.1f}; '
      f'{step / max(best.values()):.0%} of the peak',
      flush=True,
    )
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == '__main__':
  main(sys.argv[1:])
