"""Training here and by transformers + torch: the same model, weights, shapes, optimizer and
precision, turn about.

    python tests/benchmarks/pair_torch.py [--case=bert_base|gpt2|finetune] [--pairs=5] [--json=FILE]

    bert_base   masked LM, 8 rows of 128 tokens, 15 % of them masked, dropout as in the paper
    gpt2        causal LM, 4 rows of 256 tokens, dropout as in the paper
    finetune    BERT-base as a classifier of docstrings of 8 to 128 tokens: theirs 32 texts per
                batch, padded to the longest of them; ours as many in packed rows of 128

All in float32 with AdamW (torch's fused one), on all cores, each in a process of its own, of which
one works at a time: ours keeps its memory as `llm_jax.main` has it, with `model.unroll=0`; theirs
is a plain Python. The first losses must agree, or nothing is said of the speed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from llm_jax.parallel.cpu import memory

if '--serve=ours' in sys.argv:
  memory.keep()  # as `llm_jax.main` does, before JAX

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the configs

from configs import bert_base, classify, gpt2  # noqa: E402
from llm_jax.core import config, tree  # noqa: E402
from llm_jax.data import pipeline  # noqa: E402
from llm_jax.hf import folders as hf  # noqa: E402
from llm_jax.programs import build  # noqa: E402
from llm_jax.programs import workdir as runs  # noqa: E402
from llm_jax.training import corpora as prepare  # noqa: E402

RATE = 1e-4
TEXTS, LENGTH, SHORTEST = 32, 128, 8  # of the case finetune
WARM = 3  # steps; in the first ones each takes the memory that it goes on with
UNITS = {'bert_base': 'tokens', 'gpt2': 'tokens', 'finetune': 'texts'}


class Ours:
  """The compiled train step of a config, from weights in Hugging Face's format, and the batches for
  it.
  """

  def __init__(self, settings, tokenizer, example, batches, folder):
    self.program = build.build(settings, tokenizer, example)
    families = {
      kind: (name, family)
      for name, module in build.model_modules().items()
      for kind, family in module.HF.items()
    }
    params = hf.load(folder, families, tree.flatten(self.program.state.params)).params
    start = self.program.init(0)
    params = {
      path: params.get(path, leaf) for path, leaf in tree.flatten(start.params).items()
    }  # a new head is in neither
    self.state, self.batches = start.replace(params=tree.nest(params)), batches

  def step(self) -> tuple[float, int]:
    """The loss of one step, and how many of the units it learnt from."""
    batch, count = next(self.batches)
    self.state, pairs = self.program.train_step(self.state, self.program.put(batch))
    value, weight = pairs['loss']
    return float(value) / float(weight), count


class Theirs:
  """The same for transformers and torch."""

  def __init__(self, model, batches):
    self.model, self.batches = model.train(), batches
    self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)

  def step(self) -> tuple[float, int]:
    """The loss of one step, and how many of the units it learnt from."""
    batch, count = next(self.batches)
    loss = self.model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), count


def settings_of(module, **changes):
  """A config of the repository with some of its options set anew."""
  options = module.get_config().to_dict()
  options['optimizer'] |= dict(
    name='adamw',
    learning_rate=RATE,
    weight_decay=0.01,
    schedule='constant',
    warmup_fraction=None,
    final_fraction=None,
  )
  options['model'] |= dict(unroll=0)
  options |= dict(micro_batches=1)
  for key, value in changes.items():
    options[key] = options[key] | value if isinstance(value, dict) and key == 'model' else value
  return config.parse(options)


def language_model(case, folder):
  """What makes each side of a language model over random tokens."""
  torch.manual_seed(0)
  rows, length = (8, 128) if case == 'bert_base' else (4, 256)
  if case == 'bert_base':
    model, objective = transformers.BertForMaskedLM(transformers.BertConfig()), {'name': 'mlm'}
  else:
    model, objective = (
      transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)),
      {'name': 'clm'},
    )
  model.save_pretrained(folder)
  settings = settings_of(
    bert_base if case == 'bert_base' else gpt2,
    batch_size=rows,
    seq_len=length,
    objective=objective,
    model=dict(vocab_size=model.config.vocab_size),
  )
  outline = build.outline(settings, jax.devices())
  tokenizer = build.plugins.load('tokenizer', 'byte').create()
  rng = np.random.default_rng(0)
  tokens = rng.integers(300, model.config.vocab_size, (rows, length)).astype(np.int32)
  batch = {key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in outline.batch.items()}
  batch |= dict(
    tokens=tokens,
    segments=np.ones_like(tokens),
    positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  )
  labels = np.full_like(tokens, -100)
  if case == 'bert_base':
    count = round(0.15 * length)
    for row in range(rows):
      places = np.sort(rng.permutation(length)[:count])
      batch['mask_positions'][row, :count], batch['mask_targets'][row, :count] = (
        places,
        tokens[row, places],
      )
      batch['mask_weights'][row, :count] = 1
      labels[row, places] = tokens[row, places]
  else:
    labels = tokens  # theirs shifts them by itself
    batch['targets'][:, :-1], batch['weights'][:, :-1], batch['bytes'][:] = tokens[:, 1:], 1, length
  example = {key: value[0] for key, value in batch.items()}
  ours = lambda: Ours(
    outline.config, tokenizer, example, iter(lambda: (batch, tokens.size), None), folder
  )
  given = {'input_ids': torch.tensor(tokens).long(), 'labels': torch.tensor(labels).long()}
  if case == 'bert_base':
    given['attention_mask'] = torch.ones(tokens.shape, dtype=torch.long)
  return ours, lambda: Theirs(model, iter(lambda: (given, tokens.size), None))


class Short:
  """Those documents whose rows, special tokens included, are not too short and not too long."""

  pair_lengths = None

  def __init__(self, documents):
    lengths = np.asarray(documents.lengths)
    self.kept = np.flatnonzero((lengths + 2 >= SHORTEST) & (lengths + 2 <= LENGTH))
    self.documents, self.lengths, self.ids = (
      documents,
      lengths[self.kept],
      np.asarray(documents.ids)[self.kept],
    )
    self.labels = [documents.labels[i] for i in self.kept]

  def __len__(self):
    return len(self.kept)

  def text(self, index, start=0, stop=None):
    """Ids of a document."""
    return self.documents.text(int(self.kept[index]), start, stop)


def finetune(folder):
  """What makes each side of a classifier over docstrings."""
  torch.manual_seed(0)
  objective = classify.get_config().objective.to_dict() | dict(pool='cls')  # as theirs
  settings = settings_of(
    classify, seq_len=LENGTH, objective=objective, model=dict(variant='bert_base')
  )
  workdir = pathlib.Path(folder) / 'run'
  runs.open_workdir(workdir)
  data = prepare.load(settings, workdir)
  documents, classes = Short(data.splits.train[0]), build.class_names(data.config)
  objective = build.create_objective(data.config, data.tokenizer)
  laid = objective.rows(documents, LENGTH)
  rows = round(TEXTS * len(laid) / len(documents))
  settings = dataclasses.replace(data.config, batch_size=rows)
  examples = pipeline.train_examples([documents], [1.0], objective, LENGTH, 0, rows)
  shape = transformers.BertConfig(vocab_size=data.tokenizer.vocab_size, num_labels=len(classes))
  model = transformers.BertForSequenceClassification(shape)
  model.save_pretrained(folder)
  print(
    f'{len(documents)} texts of {documents.lengths.mean() + 2:.1f} tokens; {rows} rows hold '
    f'{TEXTS} of them.',
    flush=True,
  )

  def ours():
    for batch in pipeline.batches(examples, rows):
      yield batch, int(np.sum(batch['label_weight']))

  def theirs():
    rng, number = np.random.default_rng(0), {name: i for i, name in enumerate(classes)}
    while True:
      chosen = rng.choice(len(documents), TEXTS, replace=False)
      ids = [[data.tokenizer.cls_id, *documents.text(i), data.tokenizer.sep_id] for i in chosen]
      width = max(map(len, ids))
      yield (
        {
          'input_ids': torch.tensor([row + [0] * (width - len(row)) for row in ids]),
          'attention_mask': torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in ids]
          ),
          'labels': torch.tensor([number[documents.labels[i]] for i in chosen]),
        },
        TEXTS,
      )

  return lambda: Ours(settings, data.tokenizer, examples[0], ours(), folder), lambda: Theirs(
    model, theirs()
  )


def serve(case, side):
  """One side, in its own process: the first loss, then the speed of as many steps as each line of
  the input says.
  """
  with tempfile.TemporaryDirectory() as folder:
    ours, theirs = finetune(folder) if case == 'finetune' else language_model(case, folder)
    chosen = ours() if side == 'ours' else theirs()
    del ours, theirs  # and with them the model of the other side
    losses = [chosen.step()[0] for _ in range(WARM)]
    print(f'loss {losses[0]}', flush=True)
    for line in sys.stdin:
      print(f'speed {speed(chosen, int(line))}', flush=True)


def answer(process):
  """The number that a side's process says next; all else it prints is passed on."""
  for line in process.stdout:
    name, _, value = line.strip().partition(' ')
    if name in ('loss', 'speed'):
      return float(value)
    print(line, end='', flush=True)
  raise RuntimeError(f'a side ended: {process.wait()}.')


def ask(process, steps):
  """Units a second over so many steps of a side."""
  process.stdin.write(f'{steps}\n')
  process.stdin.flush()
  return answer(process)


def measure(case, pairs, steps):
  """Pairs of speeds, theirs and ours, turn about, both compiled and warm."""
  sides, losses = [], []
  for side in ('theirs', 'ours'):
    command = [sys.executable, __file__, f'--case={case}', f'--serve={side}']
    sides.append(
      subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    losses.append(answer(sides[-1]))
  if abs(losses[0] - losses[1]) > 0.1 * losses[0]:
    raise AssertionError(
      f'{case}: the first losses are {losses[0]:.3f} and {losses[1]:.3f}; this is not the same '
      'model.'
    )
  found = [tuple(ask(side, steps) for side in sides) for _ in range(pairs)]
  for side in sides:
    side.stdin.close()
    side.wait()
  return found


def speed(side, steps):
  """Units a second."""
  began, count = time.perf_counter(), 0
  for _ in range(steps):
    count += side.step()[1]
  return count / (time.perf_counter() - began)


def main(argv):
  """Prints a table, and writes the figures where they are wanted."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', choices=UNITS, action='append', help='all three by default')
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--steps', type=int, default=1, help='a measurement')
  parser.add_argument('--json')
  parser.add_argument('--serve', choices=('ours', 'theirs'), help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  if options.serve:
    serve(options.case[0], options.serve)
    return
  found = {
    'cores': os.cpu_count(),
    'torch': torch.__version__,
    'transformers': transformers.__version__,
    'jax': jax.__version__,
  }
  for case in options.case or UNITS:
    pairs = measure(case, options.pairs, options.steps)
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    found[case] = {
      'ratio': ratio,
      'ours': b,
      'theirs': a,
      'unit': f'{UNITS[case]}/s',
      'pairs': pairs,
    }
    print(
      f'{case:10} torch {a:8.2f}  llm_jax {b:8.2f} {UNITS[case]}/s  ratio {ratio:.2f}  (medians of '
      f'{options.pairs} pairs, '
      f'load {os.getloadavg()[0]:.1f})',
      flush=True,
    )
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == '__main__':
  main(sys.argv[1:])
