"""Every method of fine-tuning, on an encoder and a decoder, with layers in a loop and not: is a run
that was cut off and resumed the undisturbed one, and does what it saved open as it was?

    python tests/benchmarks/resume.py [--only=lora,prefix] [--kinds=encoder] [--unroll=0]

Tiny runs of four steps with a checkpoint after the second. The last checkpoint is taken away, and
the run resumed: parameters and optimizer state must be the same to the bit. What `llm_jax.open`
finds in either workdir must be the parameters that training ended with, to the bit, and give the
same answers: probabilities of classes, or the text that a decoder goes on with.
"""

import argparse
import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np
from absl import logging

import llm_jax
from configs import classify, gpt_tiny
from llm_jax.core import config as config_lib
from llm_jax.inference import export
from llm_jax.training import loop

KINDS = {
  'encoder': (classify, dict(name='encoder', variant='bert_base')),
  'decoder': (gpt_tiny, dict(name='decoder', variant='gpt2_small')),
}
SHAPE = dict(dim=16, layers=2, heads=2, mlp_dim=32, max_len=40, dropout=0.1, attention_dropout=0.0)
BOTTLENECK = dict(name='bottleneck', size=4)
METHODS = {
  'lora': dict(name='lora', rank=2, dropout=0.1),
  'lora_everywhere': dict(name='lora', rank=2, targets='.*', rslora=True),
  'lora_plus': dict(name='lora', rank=2, loraplus_lr_ratio=16.0),
  'lora_embeddings': dict(name='lora', rank=2, embeddings=True),
  'dora': dict(name='lora', rank=2, dora=True),
  'adalora': dict(name='adalora', rank=2, target_rank=1, warmup_steps=1, final_steps=1),
  'ia3': dict(name='ia3'),
  'bitfit': dict(name='bitfit'),
  'houlsby': BOTTLENECK,
  'pfeiffer': BOTTLENECK | dict(placement='pfeiffer'),
  'parallel': BOTTLENECK | dict(placement='parallel'),
  'prefix': dict(name='prefix', length=4),
  'prefix_mlp': dict(name='prefix', length=4, hidden=5),
  'prompt': dict(name='prompt', length=4),
  'p_tuning': dict(name='p_tuning', length=4, hidden=5),
  'freeze': dict(name='freeze', layers=1),
  'unfreeze': dict(name='freeze', layers=2, every=1),
}
TEXTS = ['one two three', 'a b c d', 'four five', 'x y z']


def main():
  """Prints a line for each case, and how many held."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--only', default=','.join(METHODS), help='methods, with commas between them')
  parser.add_argument('--kinds', default=','.join(KINDS))
  parser.add_argument('--unroll', default='1,0', help='1: layers in a loop, 0: without')
  options = parser.parse_args()
  logging.set_verbosity(logging.ERROR)
  faults = []
  with tempfile.TemporaryDirectory() as folder:
    for kind in options.kinds.split(','):
      base = started(kind, pathlib.Path(folder) / kind)
      for unroll in map(int, options.unroll.split(',')):
        for method in options.only.split(','):
          settings = base | dict(adapter=METHODS[method])
          settings['model'] = base['model'] | dict(unroll=unroll)
          found = fault(settings, pathlib.Path(folder) / f'{kind}_{unroll}_{method}')
          faults.append(found)
          print(f'{kind}, unroll={unroll}, {method}: {found or "to the bit"}', flush=True)
  print(f'{len(faults)} cases, {sum(map(bool, faults))} with a fault.')


def started(kind, folder):
  """Settings with a folder to start from, whose model is trained for four steps."""
  folder.mkdir()
  records = [{'text': f'{TEXTS[i % 4]} {i}', 'label': 'ab'[i % 2]} for i in range(24)]
  (folder / 'data.jsonl').write_text('\n'.join(map(json.dumps, records)))
  config, model = KINDS[kind]
  settings = config.get_config().to_dict()
  settings.pop('pretrained', None)
  settings['data'] = dict(source='jsonl', path=str(folder / 'data.jsonl'), validation=0.0)
  settings['data'] |= dict(cache=str(folder / 'cache'), workers=1)
  if config is classify:
    settings['data'] |= dict(label='label')
    settings['objective'] |= dict(pool='cls')
  settings['tokenizer'] = dict(name='byte')
  settings['model'] = model | dict(remat='none') | SHAPE
  settings['optimizer'] = dict(name='adamw', learning_rate=0.05)
  settings |= dict(steps=4, batch_size=4, seq_len=32, log_every=1, eval_every=2)
  settings['evaluation'] = dict(samples=0)
  settings['checkpoint'] = dict(every=2, keep=2)
  settings['logging'] = dict(tensorboard=False)
  trained(settings, folder / 'start')
  export.export(llm_jax.open(folder / 'start'), folder / 'base')
  return settings | dict(init_from=str(folder / 'base'))


def fault(settings, workdir):
  """What is not as it must be; None where all is."""
  whole, again = trained(settings, workdir), workdir.with_name('again')
  shutil.copytree(workdir, again)
  shutil.rmtree(again / 'checkpoints' / '4')
  resumed = loop.prepare(config_lib.parse(settings), again)
  if resumed.step != 2:
    return f'it was to be resumed after step 2, not {resumed.step}'
  loop.train(resumed)
  sessions = [llm_jax.open(folder) for folder in (workdir, again)]
  answers = [said(session) for session in sessions]
  opened = [bits(session.params) for session in sessions]
  for folder in (workdir, again):
    shutil.rmtree(folder)
  if bits(resumed.state) != bits(whole.state):
    return 'resumed, it ended elsewhere'
  if opened != [bits(whole.state.network_params)] * 2:
    return 'what was saved opens as something else'
  return None if np.array_equal(*answers) else 'the answers differ'


def trained(settings, workdir):
  """The run, at its end."""
  run = loop.prepare(config_lib.parse(settings), workdir)
  loop.train(run)
  return run


def bits(arrays):
  """All of a tree's arrays as bytes."""
  return jax.tree.map(lambda x: (str(x.dtype), np.asarray(x).tobytes()), arrays)


def said(session):
  """Probabilities of classes, or what a decoder goes on with."""
  if session.causal:
    return session.complete(TEXTS, max_new_tokens=4, temperature=0)
  return [list(answer['probabilities'].values()) for answer in session.predict(TEXTS)]


if __name__ == '__main__':
  main()
