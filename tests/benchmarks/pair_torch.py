"""Training here and by transformers + torch: the same model, weights, shapes, optimizer and
precision, alternating.

    python tests/benchmarks/pair_torch.py [--case=CASE] [--pairs=5] [--apart] [--json=FILE]

    bert_base   masked LM, 8 rows of 128 tokens, 15 % of them masked, dropout as in the paper
    gpt2        causal LM, 4 rows of 256 tokens, dropout as in the paper
    finetune    BERT-base as a classifier of docstrings of 8 to 128 tokens: theirs 32 texts per
                batch, padded to the longest of them; ours as many in packed rows of 128
    lora        the same with LoRA of rank 8 on queries and values, theirs by peft
    t5          from text to text by a T5-small, 8 rows of 128 tokens to read and 128 to write,
                dropout as in the paper
    pairs       the same model on first sentences of docstrings and what follows them: theirs 16
                pairs per batch, both sides padded to the longest; ours as many in packed rows

All in float32 with AdamW (torch's fused one), on all cores, each in a process of its own, of which
one works at a time: ours keeps freed memory as `llm_jax.main` does, with `model.unroll=0`; theirs
is plain Python. The first losses must agree, or no speed is reported. What one gives back to a
virtual machine between its steps, the other gets slowly: with `--apart` each ends before the next
begins.
"""

import argparse
import contextlib
import dataclasses
import itertools
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
  memory.set_up()  # as `llm_jax.main` does, before JAX

import jax  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the configs

from configs import bert_base, classify, gpt2, transformer  # noqa: E402
from llm_jax.core import config, tree  # noqa: E402
from llm_jax.core import params as params_lib  # noqa: E402
from llm_jax.data import pipeline  # noqa: E402
from llm_jax.hf import families, folders  # noqa: E402
from llm_jax.programs import assemble, pretrained, workdir  # noqa: E402
from llm_jax.training import corpora, program  # noqa: E402
from llm_jax.training import memory as step_memory  # noqa: E402

RATE = 1e-4
TEXTS, LENGTH, SHORTEST = 32, 128, 8  # of the case finetune
WARM = 3  # steps; in the first ones each takes the memory that it goes on with
PAIRS, SOURCE = 16, 256  # of the case pairs: pairs of a batch, the most tokens to read
UNITS = {
  'bert_base': 'tokens',
  'gpt2': 'tokens',
  'finetune': 'texts',
  'lora': 'texts',
  't5': 'tokens',
  'pairs': 'pairs',
}
RANK, ALPHA = 8, 16.0  # of the case lora
SIDES = 'theirs', 'ours'


class Ours:
  """The compiled train step of a config, from weights in Hugging Face's format, and the batches for
  it.
  """

  def __init__(self, settings, objective, example, batches, folder):
    self.program = made = program.build(settings, objective, example)
    base, _ = params_lib.split(made.params, made.base.__contains__)
    loaded = folders.load(folder, families.known(), base, made.infos)
    start = made.init(0)
    params, frozen = (  # a head that is not there, and an adapter, stay new
      tree.map_with_path(lambda path, leaf: loaded.params.get(path, leaf), part)
      for part in (start.params, start.frozen)
    )
    self.state, self.batches = start.replace(params=params, frozen=frozen), batches
    self.kept = memory.Kept(step_memory.temporaries(made))  # as the loop of `train` does

  def step(self) -> tuple[float, int]:
    """The loss of one step, and how many of the units it learned from."""
    self.kept.wait()
    batch, count = next(self.batches)
    self.state, metrics = self.program.train_step(self.state, self.program.put(batch))
    value, weight = metrics['loss']
    return float(value) / float(weight), count


class Theirs:
  """The same for transformers and torch."""

  def __init__(self, model, batches):
    self.model, self.batches = model.train(), batches
    self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.01, fused=True)

  def step(self) -> tuple[float, int]:
    """The loss of one step, and how many of the units it learned from."""
    batch, count = next(self.batches)
    loss = self.model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), count


def settings_of(module, **changes):
  """A config of the repository with some of its options changed."""
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
  """Functions that make each side of a language model over random tokens."""
  torch.manual_seed(0)
  masked = case == 'bert_base'
  rows, length = (8, 128) if masked else (4, 256)
  if masked:
    model = transformers.BertForMaskedLM(transformers.BertConfig())
  else:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
  model.save_pretrained(folder)
  settings = settings_of(
    bert_base if masked else gpt2,
    batch_size=rows,
    seq_len=length,
    objective={'name': 'mlm' if masked else 'clm'},
    model=dict(vocab_size=model.config.vocab_size),
  )
  outline = program.outline(settings, jax.devices())
  batch, labels = random_batch(outline, masked)
  example = {key: value[0] for key, value in batch.items()}
  tokens = batch['tokens']
  given = {'input_ids': torch.tensor(tokens).long(), 'labels': torch.tensor(labels).long()}
  if masked:
    given['attention_mask'] = torch.ones(tokens.shape, dtype=torch.long)
  ours, theirs = itertools.repeat((batch, tokens.size)), itertools.repeat((given, tokens.size))
  return (
    lambda: Ours(outline.config, outline.objective, example, ours, folder),
    lambda: Theirs(model, theirs),
  )


def random_batch(outline, masked):
  """A batch of random tokens as our program takes it, and the labels that theirs takes."""
  vocab_size, (rows, length) = outline.config.model['vocab_size'], outline.batch['tokens'].shape
  rng = np.random.default_rng(0)
  tokens = rng.integers(300, vocab_size, (rows, length)).astype(np.int32)
  batch = {key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in outline.batch.items()}
  batch |= dict(
    tokens=tokens,
    segments=np.ones_like(tokens),
    positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  )
  if not masked:
    batch['targets'][:, :-1] = tokens[:, 1:]
    batch['weights'][:, :-1] = 1
    batch['bytes'][:] = length
    return batch, tokens  # theirs shifts them by itself
  labels = np.full_like(tokens, -100)  # of no token
  count = round(0.15 * length)
  for row in range(rows):
    chosen = np.sort(rng.permutation(length)[:count])
    batch['mask_positions'][row, :count] = chosen
    batch['mask_targets'][row, :count] = tokens[row, chosen]
    batch['mask_weights'][row, :count] = 1
    labels[row, chosen] = tokens[row, chosen]
  return batch, labels


class Short:
  """The documents whose rows, special tokens included, are neither too short nor too long; see
  `contracts.Documents`.
  """

  def __init__(self, documents):
    sizes = documents.lengths('tokens') + 2
    self.kept = np.flatnonzero((sizes >= SHORTEST) & (sizes <= LENGTH))
    self.documents, self.names = documents, documents.names
    self.ids = np.asarray(documents.ids)[self.kept]

  def __len__(self):
    return len(self.kept)

  def lengths(self, name):
    return self.documents.lengths(name)[self.kept]

  def array(self, name, index, start=0, stop=None):
    return self.documents.array(name, int(self.kept[index]), start, stop)

  def values(self, name):
    values = self.documents.values(name)
    return None if values is None else [values[i] for i in self.kept]


def finetune(folder, lora=False):
  """Functions that make each side of a classifier over docstrings."""
  torch.manual_seed(0)
  objective = classify.get_config().objective.to_dict() | dict(pool='cls')  # as theirs
  settings = settings_of(
    classify, seq_len=LENGTH, objective=objective, model=dict(variant='bert_base')
  )
  if lora:
    adapter = dict(name='lora', rank=RANK, alpha=ALPHA, targets='query|value')
    settings = dataclasses.replace(settings, adapter=adapter)
  run = pathlib.Path(folder) / 'run'
  workdir.open_workdir(run)
  data = corpora.load(pretrained.fill_in(settings, run), run)
  documents = Short(data.splits.train[0])
  objective = assemble.create_objective(data.config, data.tokenizer)
  laid_out = objective.rows(documents, LENGTH)
  rows = round(TEXTS * len(laid_out) / len(documents))
  settings = dataclasses.replace(data.config, batch_size=rows)
  examples = pipeline.train_examples([laid_out], [1.0], objective, 0)
  shape = transformers.BertConfig(
    vocab_size=data.tokenizer.vocab_size, num_labels=len(objective.classes)
  )
  model = transformers.BertForSequenceClassification(shape)
  model.save_pretrained(folder)
  if lora:
    method = peft.LoraConfig(
      task_type='SEQ_CLS', r=RANK, lora_alpha=ALPHA, target_modules=['query', 'value']
    )
    model = peft.get_peft_model(model, method)
  size = documents.lengths('tokens').mean() + 2
  print(
    f'{len(documents)} texts of {size:.1f} tokens; {rows} rows hold {TEXTS} of them.', flush=True
  )

  def ours():
    for batch in pipeline.batches(examples, rows):
      yield batch, int(np.sum(batch['label_weight']))

  return (
    lambda: Ours(settings, objective, examples[0], ours(), folder),
    lambda: Theirs(model, padded(documents, data.tokenizer, objective.classes)),
  )


def padded(documents, tokenizer, classes):
  """Batches of random texts, each padded to the longest of them, as transformers takes them."""
  rng, labels = np.random.default_rng(0), documents.values('label')
  number = {name: i for i, name in enumerate(classes)}
  while True:
    chosen = rng.choice(len(documents), TEXTS, replace=False)
    rows = []
    for i in chosen:
      rows.append([tokenizer.cls_id, *documents.array('tokens', i), tokenizer.sep_id])
    width = max(map(len, rows))
    batch = {
      'input_ids': torch.tensor([row + [0] * (width - len(row)) for row in rows]),
      'attention_mask': torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
      'labels': torch.tensor([number[labels[i]] for i in chosen]),
    }
    yield batch, TEXTS


def t5_of(folder, vocab_size):
  """A T5-small with random weights, saved in a folder, which begins with token 0."""
  torch.manual_seed(0)
  shape = transformers.T5Config(
    d_model=512,
    d_ff=2048,
    num_layers=6,
    num_heads=8,
    vocab_size=vocab_size,
    decoder_start_token_id=0,
    use_cache=False,
  )
  model = transformers.T5ForConditionalGeneration(shape)
  model.save_pretrained(folder)
  return model


def t5_settings(source_len, **changes):
  """Training of that model by our config."""
  objective = dict(name='seq2seq', source_len=source_len, start=0, long='drop')
  model = dict(variant='t5_small') | changes.pop('model', {})
  return settings_of(transformer, seq_len=LENGTH, objective=objective, model=model, **changes)


def text_to_text(folder):
  """Functions that make each side of a T5 over random tokens."""
  model = t5_of(folder, 32128)
  settings = t5_settings(LENGTH, batch_size=8, model=dict(vocab_size=32128))
  outline = program.outline(settings, jax.devices())
  rng, batch = np.random.default_rng(0), {}
  for name, leaf in outline.batch.items():
    batch[name] = np.ones(leaf.shape, leaf.dtype)
    if name.endswith('positions'):
      batch[name][:] = np.arange(leaf.shape[1])
    elif name in ('targets', 'source_tokens'):
      batch[name][:] = rng.integers(3, 32000, leaf.shape)
  batch['tokens'][:, 0], batch['tokens'][:, 1:] = 0, batch['targets'][:, :-1]
  given = {'input_ids': batch['source_tokens'], 'labels': batch['targets']}
  given = {name: torch.tensor(array).long() for name, array in given.items()}
  ours, theirs = (itertools.repeat((each, batch['targets'].size)) for each in (batch, given))
  example = {key: value[0] for key, value in batch.items()}
  return (
    lambda: Ours(outline.config, outline.objective, example, ours, folder),
    lambda: Theirs(model, theirs),
  )


def real_pairs(folder):
  """Functions that make each side of a T5 over pairs of texts."""
  run = pathlib.Path(folder) / 'run'
  workdir.open_workdir(run)
  data = corpora.load(pretrained.fill_in(t5_settings(SOURCE), run), run)
  objective = assemble.create_objective(data.config, data.tokenizer)
  documents = data.splits.train[0]
  laid_out = objective.rows(documents, LENGTH)
  rows = round(PAIRS * len(laid_out) / len(laid_out.kept))
  settings = dataclasses.replace(data.config, batch_size=rows)
  examples = pipeline.train_examples([laid_out], [1.0], objective, 0)
  model = t5_of(folder, data.tokenizer.vocab_size)
  print(f'{len(laid_out.kept)} pairs; {rows} rows hold {PAIRS} of them.', flush=True)

  def ours():
    for batch in pipeline.batches(examples, rows):
      yield batch, int(batch['segments'].max(axis=1).sum())

  return (
    lambda: Ours(settings, objective, examples[0], ours(), folder),
    lambda: Theirs(model, padded_pairs(laid_out)),
  )


def padded_pairs(laid_out):
  """Batches of random pairs, both sides padded to the longest of them."""
  rng = np.random.default_rng(0)
  while True:
    chosen = rng.choice(laid_out.kept, PAIRS, replace=False)
    batch = {}
    for name, key, most, fill in (
      ('tokens', 'input_ids', SOURCE, 0),
      ('target_tokens', 'labels', LENGTH, -100),
    ):
      texts = [laid_out.ids(name, int(i), most).tolist() for i in chosen]
      width = max(map(len, texts))
      batch[key] = torch.tensor([text + [fill] * (width - len(text)) for text in texts])
      if key == 'input_ids':
        real = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
        batch['attention_mask'] = torch.tensor(real)
    yield batch, PAIRS


def serve(case, side):
  """One side, in its own process: the first loss, then the speed of as many steps as each line of
  the input says.
  """
  with tempfile.TemporaryDirectory() as folder:
    if case in ('finetune', 'lora'):
      ours, theirs = finetune(folder, lora=case == 'lora')
    elif case in ('t5', 'pairs'):
      ours, theirs = (text_to_text if case == 't5' else real_pairs)(folder)
    else:
      ours, theirs = language_model(case, folder)
    chosen = ours() if side == 'ours' else theirs()
    del ours, theirs  # and with them the model of the other side
    losses = [chosen.step()[0] for _ in range(WARM)]
    print(f'loss {losses[0]}', flush=True)
    for line in sys.stdin:
      print(f'speed {speed(chosen, int(line))}', flush=True)


def answer(process):
  """The next number that a side's process prints; all else that it prints is passed on."""
  for line in process.stdout:
    name, _, value = line.strip().partition(' ')
    if name in ('loss', 'speed'):
      return float(value)
    print(line, end='', flush=True)
  raise RuntimeError(f'a side ended: {process.wait()}.')


def ask(process, steps):
  """Units per second over so many steps of a side."""
  process.stdin.write(f'{steps}\n')
  process.stdin.flush()
  return answer(process)


@contextlib.contextmanager
def running(case, side):
  """A side in its own process, compiled and warm, and its first loss."""
  command = [sys.executable, __file__, f'--case={case}', f'--serve={side}']
  process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  try:
    yield process, answer(process)
  finally:
    process.stdin.close()
    process.wait()


def measure(case, pairs, steps, apart):
  """Pairs of speeds, theirs and ours, alternating; `apart`: each process alone on the machine."""
  if apart:
    return [measure_apart(case, steps) for _ in range(pairs)]
  with contextlib.ExitStack() as stack:
    sides = [stack.enter_context(running(case, side)) for side in SIDES]
    check(case, [loss for _, loss in sides])
    return [tuple(ask(side, steps) for side, _ in sides) for _ in range(pairs)]


def measure_apart(case, steps):
  """The two speeds, of processes one after the other."""
  speeds, losses = [], []
  for side in SIDES:
    with running(case, side) as (process, loss):
      speeds.append(ask(process, steps))
      losses.append(loss)
  check(case, losses)
  return tuple(speeds)


def check(case, losses):
  """Raises AssertionError unless both sides are the same model."""
  if abs(losses[0] - losses[1]) > 0.1 * losses[0]:
    raise AssertionError(
      f'{case}: the first losses are {losses[0]:.3f} and {losses[1]:.3f}; this is not the same '
      'model.'
    )


def speed(side, steps):
  """Units per second."""
  began, count = time.perf_counter(), 0
  for _ in range(steps):
    count += side.step()[1]
  return count / (time.perf_counter() - began)


def main(argv):
  """Prints a table, and writes the figures where they are wanted."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', choices=UNITS, action='append', help='all by default')
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--steps', type=int, default=1, help='per measurement')
  parser.add_argument('--apart', action='store_true', help='never both processes at once')
  parser.add_argument('--json')
  parser.add_argument('--serve', choices=SIDES, help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  if options.serve:
    serve(options.case[0], options.serve)
    return
  found = {
    'cores': os.cpu_count(),
    'torch': torch.__version__,
    'transformers': transformers.__version__,
    'peft': peft.__version__,
    'jax': jax.__version__,
  }
  for case in options.case or UNITS:
    pairs = measure(case, options.pairs, options.steps, options.apart)
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
