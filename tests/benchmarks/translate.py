"""From text to text on real data, here and by transformers + torch: translations of Debian's
package synopses from Italian, and synopses written for package descriptions.

    mkdir -p LISTS/partial DATA
    apt-get update -o Dir::State::lists=LISTS -o Acquire::Languages=en,it -o Acquire::Languages::=it
    /usr/lib/apt/apt-helper cat-file LISTS/*_main_i18n_Translation-en.lz4 > DATA/Translation-en
    /usr/lib/apt/apt-helper cat-file LISTS/*_main_i18n_Translation-it.lz4 > DATA/Translation-it
    python tests/benchmarks/translate.py --data=DATA --json=tests/benchmarks/figures/translate.jsonl

Both sides train a pre-norm Transformer of 3 + 3 layers, 128 wide, from scratch, on the same pairs,
with the tokenizer that our run trained, one pair a row, as many pairs a step, steps, AdamW, rate,
schedule and clipping. Packages of the held-out part are chosen by a hash of their description, so
that no text of theirs is trained on under another name. What is written greedily for them is scored
by sacreBLEU or rouge-score, beside the source itself (it_en), or the first sentence of the
description (synopsis).
"""

import argparse
import json
import pathlib
import re
import sys
import zlib

import _real

LENGTH = 48  # tokens of a synopsis
RATE, PAIRS = 2e-3, 64  # of a step
HELD = 1000
TASKS = {'it_en': dict(steps=3000, source=LENGTH), 'synopsis': dict(steps=2000, source=128)}
SIZES = dict(dim=128, layers=3, heads=4, mlp_dim=512)


def main(argv):
  """Measures what is not in the file yet, and prints the table of all that is there."""
  parser = _real.flags(__doc__)
  parser.add_argument('--steps', type=int, help='for a try; by default those of the table')
  options = parser.parse_args(argv)
  wanted = [
    dict(task=name, method='scratch', side=side, seed=seed, recipe=recipe(name, options))
    for seed in _real.seeds(options)
    for name in _real.chosen(parser, options, TASKS)
    for side in ([options.side] if options.side else _real.SIDES)
  ]
  _real.measure(options, wanted, run)
  _real.show(table(_real.kept(options, wanted)))


def recipe(name, options):
  """What else tells a run from all others."""
  steps = options.steps or TASKS[name]['steps']
  return f'{steps} steps of {PAIRS} pairs, rate {RATE:g}, {HELD} held out'


def run(options: argparse.Namespace, key: dict) -> dict:
  """The figures of one run, with those of the baseline."""
  train, held = pairs(options.data, key['task'])
  steps = options.steps or TASKS[key['task']]['steps']
  made = ours if key['side'] == 'ours' else theirs
  written, found = made(options, key, train, held, steps)
  wanted = [target for _, target in held]
  found |= scores(key['task'], written, wanted)
  plain = [baseline(key['task'], source) for source, _ in held]
  found |= {f'baseline_{name}': x for name, x in scores(key['task'], plain, wanted).items()}
  return found


def pairs(folder: pathlib.Path, task: str) -> tuple[list, list]:
  """(source, target) to learn from, and those held out."""
  english = descriptions(folder / 'Translation-en', 'en')
  if task == 'it_en':
    italian = descriptions(folder / 'Translation-it', 'it')
    made = {key: (italian[key][0], english[key][0]) for key in english.keys() & italian.keys()}
  else:
    made = {key: (body, synopsis) for key, (synopsis, body) in english.items() if body}
  train: dict[tuple[str, str], None] = {}
  held: dict[tuple[str, str], None] = {}
  for key in sorted(made):
    source, target = made[key]
    part = held if zlib.crc32(target.encode()) % 40 == 0 else train
    part.setdefault((source, target))
  seen = {source for source, _ in train} | {target for _, target in train}
  fresh = [pair for pair in held if not seen.intersection(pair)]
  return list(train), fresh[:HELD]


def descriptions(path: pathlib.Path, language: str) -> dict[str, tuple[str, str]]:
  """By the hash of the English description: synopsis, and the first paragraphs of the body."""
  found = {}
  for stanza in path.read_text(encoding='utf-8').split('\n\n'):
    match = re.search(
      rf'^Description-md5: (\w+)\nDescription-{language}: (.+)\n((?: .*\n?)*)', stanza, re.M
    )
    if match:
      lines = [line.strip() for line in match[3].splitlines()]
      body = ' '.join(line for line in lines if line and line != '.')
      found[match[1]] = match[2].strip(), ' '.join(body.split()[:80])
  return found


def baseline(task: str, source: str) -> str:
  """What is there without a model."""
  if task == 'it_en':
    return source
  return re.split(r'(?<=[.!?])\s', source)[0]


def scores(task: str, written: list[str], wanted: list[str]) -> dict:
  """Of the whole held-out part, with the signature of the library."""
  if task == 'it_en':
    from sacrebleu import metrics

    bleu, chrf = metrics.BLEU(), metrics.CHRF()
    found = {'bleu': bleu.corpus_score(written, [wanted]).score}
    found['chrf'] = chrf.corpus_score(written, [wanted]).score
    return found | {'signature': str(bleu.get_signature())}
  from rouge_score import rouge_scorer

  scorer = rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL'], use_stemmer=True)
  all_of = [scorer.score(a, b) for a, b in zip(wanted, written, strict=True)]
  return {
    kind: sum(each[kind].fmeasure for each in all_of) / len(all_of)
    for kind in ('rouge1', 'rouge2', 'rougeL')
  }


def our_run(options, key, train, steps) -> tuple[pathlib.Path, dict]:
  """The workdir of our training, which the other side takes its tokenizer from."""
  name = f'{key["task"]}_{key["seed"]}_{steps}'
  folder = options.work / name
  lines = (json.dumps({'source': a, 'target': b}) for a, b in train)
  path = _real.written(options.work / f'{key["task"]}.jsonl', lines)
  given = {
    'seed': key['seed'],
    'steps': steps,
    'batch_size': PAIRS,
    'micro_batches': 1,
    'seq_len': LENGTH,
    'data.source': 'jsonl',
    'data.path': path,
    'data.text': 'source',
    'data.target': 'target',
    'data.validation': 0.01,
    'tokenizer.vocab_size': 8000,
    'objective.source_len': TASKS[key['task']]['source'],
    'objective.packing': 'none',
    'objective.label_smoothing': 0.0,
    'evaluation.rows': 128,
  }
  given |= {f'optimizer.{name}': value for name, value in _real.ADAMW.items()}
  given['optimizer.learning_rate'] = RATE
  found = _real.program(options.work, 'transformer', given, workdir=folder)
  names = 'trained', 'steps', 'seconds_per_step', 'seq2seq_nll'
  return folder, {name: found[name] for name in names}


def ours(options, key, train, held, steps):
  """By the command line."""
  import llm_jax
  from llm_jax.generation.sampling import Sampling

  folder, found = our_run(options, key, train, steps)
  session = llm_jax.open(folder)
  greedy = Sampling(max_new_tokens=LENGTH - 1, temperature=0)
  room = TASKS[key['task']]['source'] - 1
  sources = [cut(session.tokenizer, source, room) for source, _ in held]
  return session.complete(sources, sampling=greedy), found


def theirs(options, key, train, held, steps):
  """By transformers and torch, with the tokenizer of our run."""
  import torch
  import transformers

  import llm_jax

  name = f'{key["task"]}_{key["seed"]}_{steps}'
  if not (options.work / name / 'config.json').exists():
    our_run(options, key, train, steps)
  tokenizer = llm_jax.open(options.work / name).tokenizer
  torch.manual_seed(key['seed'])
  shape = transformers.MBartConfig(
    vocab_size=tokenizer.vocab_size,
    d_model=SIZES['dim'],
    encoder_layers=SIZES['layers'],
    decoder_layers=SIZES['layers'],
    encoder_attention_heads=SIZES['heads'],
    decoder_attention_heads=SIZES['heads'],
    encoder_ffn_dim=SIZES['mlp_dim'],
    decoder_ffn_dim=SIZES['mlp_dim'],
    max_position_embeddings=512,
    dropout=0.0,
    pad_token_id=tokenizer.pad_id,
    bos_token_id=tokenizer.bos_id,
    eos_token_id=tokenizer.eos_id,
    decoder_start_token_id=tokenizer.bos_id,
    forced_eos_token_id=None,
  )
  model = transformers.MBartForConditionalGeneration(shape)
  room = TASKS[key['task']]['source'] - 1
  closed = lambda text, most: [*tokenizer.encode(text)[:most], tokenizer.eos_id]
  ids = [(closed(a, room), closed(b, LENGTH - 1)) for a, b in train]
  epochs = -(-steps * PAIRS // len(ids))
  order = _real.shuffled(len(ids), epochs, PAIRS, key['seed'])[:steps]

  class Batches(list):
    """Made one at a time: all of them would be large."""

    def __iter__(self):
      return (batch([ids[i] for i in chosen]) for chosen in order)

  def filled(rows, value):
    width = max(map(len, rows))
    return torch.tensor([[*map(int, row), *[value] * (width - len(row))] for row in rows])

  def batch(chosen):
    sources, targets = zip(*chosen, strict=True)
    source, labels = filled(sources, tokenizer.pad_id), filled(targets, -100)
    before = torch.full_like(labels[:, :1], tokenizer.bos_id)
    read = torch.cat([before, labels[:, :-1]], dim=1).clamp(min=0)
    real = filled([[1] * len(s) for s in sources], 0)
    return dict(input_ids=source, attention_mask=real, decoder_input_ids=read, labels=labels)

  found = _real.torch_loop(model, Batches(order), RATE)
  written = []
  for start in range(0, len(held), PAIRS):
    block = [closed(source, room) for source, _ in held[start : start + PAIRS]]
    with torch.no_grad():
      made = model.generate(
        filled(block, tokenizer.pad_id),
        attention_mask=filled([[1] * len(row) for row in block], 0),
        do_sample=False,
        num_beams=1,
        max_new_tokens=LENGTH - 1,
      )
    for row in made[:, 1:].tolist():
      end = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
      written.append(tokenizer.decode(row[:end]))
  return written, {name: found[name] for name in ('trained', 'steps', 'seconds_per_step')}


def cut(tokenizer, text, most):
  """A text of at most so many tokens."""
  ids = tokenizer.encode(text)
  return text if len(ids) <= most else tokenizer.decode(ids[:most].tolist())


def table(lines):
  """Rows of a table in Markdown."""
  head = 'BLEU, or ROUGE-L', 'chrF, or ROUGE-1', 'without a model', 'steps', 's a step'
  rows = [('task', 'side', *head)]
  for task in TASKS:
    names = ('bleu', 'chrf') if task == 'it_en' else ('rougeL', 'rouge1')
    for side in _real.SIDES:
      found = [line for line in lines if line['task'] == task and line['side'] == side]
      if found:
        first, second = (_real.spread(found, name) for name in names)
        plain = _real.spread(found, f'baseline_{names[0]}')
        speed = f'{found[0]["seconds_per_step"]:.3f}'
        rows.append((task, side, first, second, plain, _real.count_of(found, 'steps'), speed))
  return rows


if __name__ == '__main__':
  main(sys.argv[1:])
