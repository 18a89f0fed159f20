"""Does a model that has learned to fill in the middle find a missing line more often than the same
model without it, which reads only what stands before?

    python tests/benchmarks/infill.py --steps=1500 --work=/tmp/infill

Trains `configs/code_tiny.py` twice, with `objective.fim_rate` of 0.5 and of 0, on the functions of
the standard library with the same tokenizer, seed and steps. Of each held-out function one line
behind the docstring is taken out, chosen by a hash of its text; both models write it, the most
likely tokens, up to the end of the line. Printed are the share of lines that are found exactly, but
for white space around them, and the share of functions that can be parsed with what was written.
"""

import argparse
import ast
import json
import pathlib
import subprocess
import sys
import zlib

import llm_jax
from llm_jax.data import cache
from llm_jax.data.sources import functions
from llm_jax.evaluators.generation import parses
from llm_jax.generation.sampling import Sampling

SHARE = 0.05  # of the functions, held out
SAMPLING = Sampling(max_new_tokens=48, temperature=0)


def main(argv):
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=1500)
  parser.add_argument('--work', type=pathlib.Path, required=True, help='a folder for both runs')
  parser.add_argument('--texts', type=int, default=300, help='held-out functions')
  options = parser.parse_args(argv)
  source = functions.Source()
  records = (source[index] for index in range(len(source)))
  texts = [record['text'] for record in records if cache.held_out(record, SHARE)]
  holes = [hole for hole in map(hole_of, texts) if hole is not None][: options.texts]
  print(f'{len(holes)} lines of as many held-out functions')
  print(f'{"":>12}{"found":>10}{"parses":>10}{"loss":>10}')
  for name, rate in (('with', 0.5), ('without', 0.0)):
    folder = trained(options, name, rate)
    lines = answers(llm_jax.open(folder), holes, rate > 0)
    found = sum(a.strip() == h[1].strip() for a, h in zip(lines, holes, strict=True))
    whole = (before + line + after for line, (before, _, after) in zip(lines, holes, strict=True))
    parsed = sum(map(parses, whole))
    loss = best_loss(folder)
    print(f'{name:>12}{found / len(holes):>10.4f}{parsed / len(holes):>10.4f}{loss:>10.4f}')


def trained(options, name, rate):
  """The workdir of a run."""
  folder = options.work / name
  flags = dict(steps=options.steps, eval_every=options.steps // 3)
  flags |= {'objective.fim_rate': rate, 'data.validation': SHARE, 'checkpoint.every': options.steps}
  command = [sys.executable, '-m', 'llm_jax.main', '--config=configs/code_tiny.py']
  command += [f'--workdir={folder}', *(f'--config.{key}={x}' for key, x in flags.items())]
  subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
  return folder


def answers(session, holes, fills_in):
  """A line for each hole."""
  if fills_in:
    found = session.infill([(before, after) for before, _, after in holes], sampling=SAMPLING)
  else:
    found = session.complete([before for before, _, _ in holes], sampling=SAMPLING)
  return [text.split('\n')[0] for text in found]


def hole_of(text):
  """What stands before a line of a function, the line, and what stands behind; None where it is all
  docstring.
  """
  lines = text.split('\n')
  first = ast.parse(text).body[0].body[0].end_lineno
  body = [i for i in range(first, len(lines)) if lines[i].strip()]
  if not body:
    return None
  at = body[zlib.crc32(text.encode()) % len(body)]
  before, after = '\n'.join(lines[:at]) + '\n', '\n' + '\n'.join(lines[at + 1 :])
  return before, lines[at], after


def best_loss(folder):
  """Of the validation set."""
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  return min(line['loss'] for line in lines if line['split'] == 'validation')


if __name__ == '__main__':
  main(sys.argv[1:])
