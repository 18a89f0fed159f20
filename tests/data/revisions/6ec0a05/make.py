"""Makes the kept runs of this folder with the package at revision 6ec0a05, and their expectations.

    git worktree add /tmp/old 6ec0a05
    cd /tmp/old && PYTHONPATH=/tmp/old python .../tests/data/revisions/6ec0a05/make.py /tmp/runs

Three small runs of 4 steps each are packed as they are, without the plot. A copy of each goes on to
step 8; of the copy, only the numbers in expected.json are kept. Between them the runs draw every
kind of random number (masks, dropout, the order of the data), accumulate gradients, and use Muon
and AdamW.
"""

import json
import os
import pathlib
import random
import runpy
import shutil
import subprocess
import sys
import tarfile

HERE = pathlib.Path(__file__).absolute().parent
STEPS, MORE_STEPS = 4, 8
NAMES = {
  'plant': 'ash oak elm fir yew pine rose fern moss reed sage mint'.split(),
  'bird': 'wren crow kite dove swan teal tern rook lark finch'.split(),
}
COMMON = [
  '--config.model.dim=8',
  '--config.model.layers=2',
  '--config.model.heads=2',
  '--config.model.mlp_dim=16',
  '--config.model.max_len=64',
  '--config.seq_len=48',
  '--config.batch_size=4',
  '--config.log_every=1',
  '--config.eval_every=2',
  '--config.checkpoint.every=4',
  '--config.checkpoint.keep=1',
  '--config.tokenizer.vocab_size=300',
  '--config.tokenizer.normalization=identity',
  '--config.data.source=jsonl',
  '--config.data.validation=0.2',
  '--config.data.workers=1',
  '--config.evaluation.samples=0',
  '--config.logging.tensorboard=False',
  '--nocompilation_cache',
]
DROPOUT = ['--config.model.dropout=0.1', '--config.model.attention_dropout=0.1']
RUNS = {
  'bert_tiny': DROPOUT,
  'gpt_tiny': DROPOUT,
  'classify': [
    '--config.data.label=kind',
    '--config.model.variant=bert_base',
    '--config.objective.pool=cls',
    '--config.optimizer.name=adamw',
    '--config.micro_batches=2',
  ],
}


def flags(name, workdir, corpus, cache, steps):
  """The command line of a run, after `python -m llm_jax.main`, from the folder of a checkout."""
  return [
    f'--config=configs/{name}.py',
    f'--workdir={workdir}',
    f'--config.steps={steps}',
    f'--config.data.path={corpus}',
    f'--config.data.cache={cache}',
    *COMMON,
    *RUNS[name],
  ]


def corpus():
  """Short lists of plants and of birds, each labelled with its kind."""
  rng = random.Random(0)
  for number in range(240):
    kind = ('plant', 'bird')[number % 2]
    words = [rng.choice(NAMES[kind]) for _ in range(rng.randrange(3, 12))]
    yield json.dumps({'text': f'{number} {" ".join(words)}', 'kind': kind}) + '\n'


def train(*where):
  command = [sys.executable, '-m', 'llm_jax.main', *flags(*where)]
  subprocess.run(command, check=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})


def pack(workdir, target):
  """Writes a folder as target, the same bytes whenever the files are the same."""

  def plain(member):
    if member.name.endswith('.png'):
      return None
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ''
    return member

  with tarfile.open(target, 'w:xz', preset=9) as archive:
    archive.add(workdir, workdir.name, filter=plain)


def main(out):
  out.mkdir(parents=True)
  path, cache = out / 'corpus.jsonl', out / 'cache'
  path.write_text(''.join(corpus()))
  shutil.copy(path, HERE)
  record = runpy.run_path(str(HERE.parent / 'record.py'))
  runs = {}
  for name in RUNS:
    workdir, continued = out / name, out / 'continued' / name
    train(name, workdir, path, cache, STEPS)
    pack(workdir, HERE / f'{name}.tar.xz')
    shutil.copytree(workdir, continued)
    train(name, continued, path, cache, MORE_STEPS)
    runs[name] = record['record'](continued, STEPS + 1, MORE_STEPS)
  expected = {'machine': record['machine'](), 'runs': runs}
  (HERE / 'expected.json').write_text(json.dumps(expected, indent=1) + '\n')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]).absolute())
