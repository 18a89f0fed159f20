"""Training here and by transformers + torch: the same model, weights, shapes, optimizer and precision, one process, turn about.

    python tests/benchmarks/pair_torch.py [--case=bert_base|gpt2|finetune] [--pairs=5] [--json=FILE]

    bert_base   masked LM, 8 rows of 128 tokens, 15 % of them masked, dropout as in the paper
    gpt2        causal LM, 4 rows of 256 tokens, dropout as in the paper
    finetune    BERT-base as a classifier of docstrings of 8 to 128 tokens, as long as they are: theirs 32 texts a batch, padded
                to the longest of them; ours as many in packed rows of 128

All in float32 with AdamW (torch's fused one), on all cores, in a process that keeps its memory (`llm_jax/heap.py`), which serves
both; ours with `model.unroll=0`. The first losses must agree, or nothing is said of the speed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

from llm_jax import heap

heap.keep()  # as `llm_jax.main` does, before JAX

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the configs

from configs import bert_base, classify, gpt2  # noqa: E402
from llm_jax import build, config, hf, prepare, runs, tree  # noqa: E402
from llm_jax.data import pipeline  # noqa: E402

RATE = 1e-4
TEXTS, LENGTH, SHORTEST = 32, 128, 8  # of the case finetune
UNITS = {'bert_base': 'tokens', 'gpt2': 'tokens', 'finetune': 'texts'}


class Ours:
  """The compiled train step of a config, from weights in Hugging Face's format, and the batches for it."""

  def __init__(self, settings, tokenizer, example, batches, folder):
    self.program = build.build(settings, tokenizer, example)
    families = {kind: (name, family) for name, module in build.model_modules().items() for kind, family in module.HF.items()}
    params = hf.load(folder, families, tree.flatten(self.program.state.params)).params
    start = self.program.init(0)
    params = {path: params.get(path, leaf) for path, leaf in tree.flatten(start.params).items()}  # a new head is in neither
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
  options['optimizer'] |= dict(name='adamw', learning_rate=RATE, weight_decay=0.01, schedule='constant', warmup_fraction=None,
                             final_fraction=None)
  options['model'] |= dict(unroll=0)
  options |= dict(micro_batches=1)
  for key, value in changes.items():
    options[key] = options[key] | value if isinstance(value, dict) and key == 'model' else value
  return config.parse(options)


def language_model(case, folder):
  """Both sides of a language model over random tokens."""
  torch.manual_seed(0)
  rows, length = (8, 128) if case == 'bert_base' else (4, 256)
  if case == 'bert_base':
    model, objective = transformers.BertForMaskedLM(transformers.BertConfig()), {'name': 'mlm'}
  else:
    model, objective = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)), {'name': 'clm'}
  model.save_pretrained(folder)
  settings = settings_of(bert_base if case == 'bert_base' else gpt2, batch_size=rows, seq_len=length, objective=objective,
                         model=dict(vocab_size=model.config.vocab_size))
  outline = build.outline(settings, jax.devices())
  tokenizer = build.plugins.load('tokenizer', 'byte').create()
  rng = np.random.default_rng(0)
  tokens = rng.integers(300, model.config.vocab_size, (rows, length)).astype(np.int32)
  batch = {key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in outline.batch.items()}
  batch |= dict(tokens=tokens, segments=np.ones_like(tokens), positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)))
  labels = np.full_like(tokens, -100)
  if case == 'bert_base':
    count = round(0.15 * length)
    for row in range(rows):
      places = np.sort(rng.permutation(length)[:count])
      batch['mask_positions'][row, :count], batch['mask_targets'][row, :count] = places, tokens[row, places]
      batch['mask_weights'][row, :count] = 1
      labels[row, places] = tokens[row, places]
  else:
    labels = tokens  # theirs shifts them by itself
    batch['targets'][:, :-1], batch['weights'][:, :-1], batch['bytes'][:] = tokens[:, 1:], 1, length
  example = {key: value[0] for key, value in batch.items()}
  ours = Ours(outline.config, tokenizer, example, iter(lambda: (batch, tokens.size), None), folder)
  given = {'input_ids': torch.tensor(tokens).long(), 'labels': torch.tensor(labels).long()}
  if case == 'bert_base':
    given['attention_mask'] = torch.ones(tokens.shape, dtype=torch.long)
  return ours, Theirs(model, iter(lambda: (given, tokens.size), None))


class Short:
  """Those documents whose rows, special tokens included, are not too short and not too long."""

  pair_lengths = None

  def __init__(self, documents):
    lengths = np.asarray(documents.lengths)
    self.kept = np.flatnonzero((lengths + 2 >= SHORTEST) & (lengths + 2 <= LENGTH))
    self.documents, self.lengths, self.ids = documents, lengths[self.kept], np.asarray(documents.ids)[self.kept]
    self.labels = [documents.labels[i] for i in self.kept]

  def __len__(self):
    return len(self.kept)

  def text(self, index, start=0, stop=None):
    """Ids of a document."""
    return self.documents.text(int(self.kept[index]), start, stop)


def finetune(folder):
  """Both sides of a classifier over docstrings."""
  torch.manual_seed(0)
  settings = settings_of(classify, seq_len=LENGTH, model=dict(variant='bert_base'))
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
  print(f'{len(documents)} texts of {documents.lengths.mean() + 2:.1f} tokens; {rows} rows hold {TEXTS} of them.', flush=True)

  def ours():
    for batch in pipeline.batches(examples, rows):
      yield batch, int(np.sum(batch['label_weight']))

  def theirs():
    rng, number = np.random.default_rng(0), {name: i for i, name in enumerate(classes)}
    while True:
      chosen = rng.choice(len(documents), TEXTS, replace=False)
      ids = [[data.tokenizer.cls_id, *documents.text(i), data.tokenizer.sep_id] for i in chosen]
      width = max(map(len, ids))
      yield {'input_ids': torch.tensor([row + [0] * (width - len(row)) for row in ids]),
             'attention_mask': torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
             'labels': torch.tensor([number[documents.labels[i]] for i in chosen])}, TEXTS

  return Ours(settings, data.tokenizer, examples[0], ours(), folder), Theirs(model, theirs())


def sides(case, folder):
  """Ours and theirs of a case, ready to be timed, compiled and warm."""
  pair = finetune(folder) if case == 'finetune' else language_model(case, folder)
  first = [side.step()[0] for side in pair]
  if abs(first[0] - first[1]) > 0.1 * first[1]:
    raise AssertionError(f'{case}: the first losses are {first[0]:.3f} and {first[1]:.3f}; this is not the same model.')
  return pair


def speed(side, steps):
  """Units a second."""
  began, count = time.perf_counter(), 0
  for _ in range(steps):
    count += side.step()[1]
  return count / (time.perf_counter() - began)


def main(argv):
  """Prints a table, and writes the figures where they are wanted."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--case', choices=UNITS, action='append', help='all three by default')
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--steps', type=int, default=1, help='a measurement')
  parser.add_argument('--json')
  options = parser.parse_args(argv)
  found = {'cores': os.cpu_count(), 'torch': torch.__version__, 'transformers': transformers.__version__, 'jax': jax.__version__}
  for case in options.case or UNITS:
    with tempfile.TemporaryDirectory() as folder:
      ours, theirs = sides(case, folder)
      pairs = [(speed(theirs, options.steps), speed(ours, options.steps)) for _ in range(options.pairs)]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    found[case] = {'ratio': ratio, 'ours': b, 'theirs': a, 'unit': f'{UNITS[case]}/s', 'pairs': pairs}
    print(f'{case:10} torch {a:8.2f}  llm_jax {b:8.2f} {UNITS[case]}/s  ratio {ratio:.2f}  (medians of {options.pairs} pairs, '
          f'load {os.getloadavg()[0]:.1f})', flush=True)
    del ours, theirs
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == '__main__':
  main(sys.argv[1:])
