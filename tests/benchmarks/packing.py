"""Fine-tuning with several texts per row against one text per row: time per text, in one
interleaved run of the compiled train steps.

    python tests/benchmarks/packing.py                            # configs/classify.py
    python tests/benchmarks/packing.py --task=tag                 # configs/tag.py
    python tests/benchmarks/packing.py --config.seq_len=256       # any option of it

By default: the config's own data, bert_tiny, rows of 128 positions. Both have the same model, rows
and optimizer; what differs is how many texts the rows hold.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the configs

from configs import classify, tag  # noqa: E402
from llm_jax.core import config  # noqa: E402
from llm_jax.data import pipeline  # noqa: E402
from llm_jax.programs import assemble, pretrained, workdir  # noqa: E402
from llm_jax.training import corpora, program  # noqa: E402

TASKS = {'classify': classify, 'tag': tag}


def main() -> None:
  """Prints how full the rows are, then the times."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument('--pairs', type=int, default=9, help='measurements of each, alternating')
  flags.add_argument('--steps', type=int, default=3, help='train steps per measurement')
  flags.add_argument('--json', type=pathlib.Path)
  flags.add_argument('--task', choices=TASKS, default='classify')
  given, options = flags.parse_known_args()
  with tempfile.TemporaryDirectory() as folder:
    data = _load(given.task, options, pathlib.Path(folder))
    sides = {packing: Side(data, packing) for packing in ('best_fit', 'none')}
  for side in sides.values():
    side.run(given.steps)  # compiles
  times = {packing: [] for packing in sides}
  for _ in range(given.pairs):
    for packing, side in sides.items():
      times[packing].append(side.run(given.steps))
  found = {
    packing: {
      'texts_per_row': side.texts,
      'used': side.used,
      'validation_texts_per_row': side.validation[0],
      'validation_used': side.validation[1],
      'seconds_per_text': statistics.median(times[packing]),
    }
    for packing, side in sides.items()
  }
  for packing, values in found.items():
    print(
      f'{packing:>8}: {values["texts_per_row"]:.2f} texts per row, {values["used"]:.1%} of the '
      f'positions used (validation {values["validation_texts_per_row"]:.2f}, '
      f'{values["validation_used"]:.1%}); {1e3 * values["seconds_per_text"]:.3f} ms per text'
    )
  ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
  print(
    f'packed rows learn from {ratio:.2f} x as many texts per second (median of {given.pairs} '
    'interleaved pairs)'
  )
  if given.json:
    given.json.write_text(json.dumps(found | {'ratio': ratio}))


class Side:
  """One way to lay out the texts, with its compiled step and its stream of batches."""

  def __init__(self, data: corpora.Data, packing: str):
    options = data.config.objective | {'packing': packing}
    settings = dataclasses.replace(data.config, objective=options)
    objective = assemble.create_objective(settings, data.tokenizer)
    seq_len, splits = settings.seq_len, data.splits
    rows = pipeline.training_rows(splits.train, objective, seq_len, settings.batch_size)
    self.texts, self.used = _fill(rows[0], seq_len)
    self.validation = _fill(objective.rows(splits.validation[0], seq_len), seq_len)
    examples = pipeline.train_examples(rows, splits.weights, objective, 0)
    self._program = program.build(settings, objective, examples[0])
    self._batches = pipeline.batches(examples, settings.batch_size)
    self._state = self._program.init(0)

  def run(self, steps: int) -> float:
    """Seconds per text of some train steps, making their batches included."""
    began, texts = time.perf_counter(), 0
    for _ in range(steps):
      batch = next(self._batches)
      texts += int(np.sum(np.max(batch['segments'], axis=1)))
      self._state, metrics = self._program.train_step(self._state, self._program.put(batch))
    jax.block_until_ready(metrics)
    return (time.perf_counter() - began) / texts


def _load(task, options, folder):
  workdir.open_workdir(folder)
  parsed = config.parse(_settings(task, options).to_dict())
  return corpora.load(pretrained.fill_in(parsed, folder), folder)


def _fill(rows, seq_len):
  """Texts per row, and the share of the positions that they take."""
  return len(rows.sizes) / len(rows), float(rows.sizes.sum() / (len(rows) * seq_len))


def _settings(task, options):
  settings = TASKS[task].get_config()
  for option in options:
    path, _, value = option.removeprefix('--config.').partition('=')
    try:
      value = json.loads(value)
    except ValueError:
      pass  # a word
    settings.update_from_flattened_dict({path: value})
  return settings


if __name__ == '__main__':
  main()
