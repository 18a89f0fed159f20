"""Runs of earlier revisions, kept in tests/data/revisions: they go on as if nothing had changed, to
the last bit, and open in every mode.
"""

import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from absl import flags

from llm_jax import main

ROOT = pathlib.Path(__file__).parents[2]
REVISIONS = ROOT / 'tests' / 'data' / 'revisions'
RECORD = runpy.run_path(str(REVISIONS / 'record.py'))
KEPT = [
  (folder.name, name)
  for folder in sorted(REVISIONS.iterdir())
  if (folder / 'make.py').is_file()
  for name in runpy.run_path(str(folder / 'make.py'))['RUNS']
]
RELATIVE = 1e-5  # on another CPU, or with another JAX, than the expectation's


class Kept:
  """A run of an earlier revision, unpacked for one test: its folder, corpus and expectation."""

  def __init__(self, revision, name, folder):
    self.name, self.folder = name, folder
    source = REVISIONS / revision
    self.make = runpy.run_path(str(source / 'make.py'))
    expected = json.loads((source / 'expected.json').read_text())
    self.machine, self.expected = expected['machine'], expected['runs'][name]
    with tarfile.open(source / f'{name}.tar.xz') as archive:
      archive.extractall(folder, filter='data')
    shutil.copy(source / 'corpus.jsonl', folder)
    self.workdir, self.corpus = folder / name, folder / 'corpus.jsonl'
    self._move_corpus()

  def _move_corpus(self):
    """The path of the corpus is part of what makes a run the same run; here it is another."""
    path = self.workdir / 'config.json'
    config = json.loads(path.read_text())
    config['data'] |= {'path': str(self.corpus), 'cache': str(self.folder / 'cache')}
    path.write_text(json.dumps(config))

  def go_on(self):
    """Trains to the last step of the expectation, as a user would: by the same command."""
    where = (self.workdir, self.corpus, self.folder / 'cache', self.make['MORE_STEPS'])
    command = [sys.executable, '-m', 'llm_jax.main', *self.make['flags'](self.name, *where)]
    return subprocess.run(
      command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )

  def validation(self):
    """The validation metrics that were logged when the run was kept."""
    first = last = self.make['STEPS']
    (line,) = [m for m in RECORD['metrics'](self.workdir, first, last) if m['split'] != 'train']
    return line

  def use(self, mode, *arguments):
    """Runs a mode of the command line in this process."""
    argv = ['llm_jax', f'--workdir={self.workdir}', f'--mode={mode}', '--nocompilation_cache']
    flags.FLAGS.unparse_flags()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
      patch.setattr(sys, 'argv', [*argv, *arguments])
      main.cli()
    flags.FLAGS.unparse_flags()
    assert not ended.value.code, (mode, ended.value.code)


def environment():
  return os.environ | {'JAX_PLATFORMS': 'cpu'}


@pytest.fixture(params=KEPT, ids='-'.join)
def kept(request, tmp_path):
  return Kept(*request.param, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:Sharding info not provided')  # the arrays go to any device
def test_a_kept_run_goes_on_to_the_same_numbers(kept):
  done = kept.go_on()
  assert done.returncode == 0, done.stderr
  found = RECORD['record'](kept.workdir, kept.make['STEPS'] + 1, kept.make['MORE_STEPS'])
  if RECORD['machine']() == kept.machine:
    assert found == kept.expected
  else:
    assert_close(found, kept.expected)


def assert_close(found, expected):
  assert len(found['metrics']) == len(expected['metrics'])
  for ours, theirs in zip(found['metrics'], expected['metrics'], strict=True):
    assert ours['split'] == theirs['split']
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=RELATIVE)
  assert [kind(array) for array in found['state'].items()] == [
    kind(array) for array in expected['state'].items()
  ]
  assert norms(found['state']) == pytest.approx(norms(expected['state']), rel=RELATIVE, abs=1e-9)


def numbers(line):
  """A line of metrics.jsonl without what is not a number."""
  return {key: value for key, value in line.items() if key != 'split'}


def kind(array):
  """The path of an array, its dtype and its shape."""
  path, summary = array
  return path, summary.rsplit(' ', 2)[0]


def norms(state):
  """The norm of each array, without those of the keys' bias.

  Adding the same number to all scores of a query changes no probability, so this bias has no
  gradient but rounding, which is another on every machine.
  """
  return {
    path: float(summary.rsplit(' ', 1)[1])
    for path, summary in state.items()
    if not path.endswith('key/bias')
  }


def test_the_comparison_finds_what_it_must():
  state = {'params/table': 'float32[2, 8] aa 1.5', 'step': 'int32[] bb 8'}
  expected = {'metrics': [{'step': 5, 'split': 'train', 'loss': 0.5}], 'state': state}
  assert_close(expected, expected)
  for change in (
    {'metrics': [{'step': 5, 'split': 'train', 'loss': 0.50001}]},
    {'metrics': [{'step': 5, 'split': 'train'}]},
    {'metrics': []},
    {'state': state | {'params/table': 'float32[2, 8] aa 1.5001'}},
    {'state': state | {'params/table': 'float32[8, 2] aa 1.5'}},
    {'state': {'params/tables': 'float32[2, 8] aa 1.5', 'step': 'int32[] bb 8'}},
  ):
    with pytest.raises(AssertionError):
      assert_close(expected | change, expected)


@pytest.mark.slow
def test_a_kept_run_opens_in_every_mode(kept, capfd):
  kept.use('eval')
  found = json.loads((kept.workdir / 'eval.json').read_text())
  logged = numbers(kept.validation())
  del logged['step']
  assert {key: found[key] for key in logged} == pytest.approx(logged, rel=1e-6)
  embeds(kept)
  exports(kept)
  {'bert_tiny': fills_in, 'gpt_tiny': writes, 'classify': predicts}[kept.name](kept, capfd)


def embeds(kept):
  (kept.folder / 'texts.txt').write_text('oak fern\nwren kite\nsage\n')
  target = kept.folder / 'vectors.npy'
  kept.use('embed', f'--input={kept.folder / "texts.txt"}', f'--output={target}')
  vectors_ND = np.load(target)
  assert vectors_ND.shape == (3, 8)
  assert np.linalg.norm(vectors_ND, axis=1) == pytest.approx(1, rel=1e-5)


def exports(kept):
  target = kept.folder / 'exported'
  kept.use('export', f'--output={target}')
  assert {'config.json', 'model.safetensors', 'tokenizer.json'} <= {
    p.name for p in target.iterdir()
  }


def fills_in(kept, capfd):
  capfd.readouterr()
  kept.use('generate', '--prompt=3 oak [MASK] fern')
  assert capfd.readouterr().out.strip()


def writes(kept, capfd):
  capfd.readouterr()
  kept.use('generate', '--prompt=3 oak', '--max_new_tokens=8')
  assert capfd.readouterr().out.startswith('3 oak')


def predicts(kept, capfd):
  source, target = kept.folder / 'in.jsonl', kept.folder / 'out.jsonl'
  source.write_text('{"text": "3 oak fern"}\n{"text": "4 wren kite"}\n')
  kept.use('predict', f'--input={source}', f'--output={target}')
  answers = [json.loads(line) for line in target.read_text().splitlines()]
  assert [answer['text'] for answer in answers] == ['3 oak fern', '4 wren kite']
  assert {answer['label'] for answer in answers} <= {'plant', 'bird'}
