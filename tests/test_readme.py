"""The documents: their links, the README's length, and the code in them and in docstrings, which
runs.
"""

import ast
import doctest
import importlib
import json
import math
import pathlib
import random
import re
import types

import pytest

import llm_jax
from configs import base
from llm_jax.core import config as config_lib
from llm_jax.core import plugins, tree
from llm_jax.modes import train as train_mode
from llm_jax.training import logs, loop

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = (
  'README.md',
  'configs/README.md',
  'launch/README.md',
  'llm_jax/README.md',
  'tests/benchmarks/README.md',
)
WORDS = 1950
HOUSE = 'llm_jax/README.md'
# Modules whose examples use a session.
OPENED = ('llm_jax', 'llm_jax.inference.session')
SHAPE = dict(dim=16, layers=1, heads=2, mlp_dim=32, max_len=64)
SMALL = dict(steps=2, batch_size=4, seq_len=32, log_every=1, eval_every=2)


def text_of(name):
  return (ROOT / name).read_text(encoding='utf-8')


def broken_links(path):
  """Links of a document to files, or to headings in them, that are not there."""
  text = re.sub(r'^```.*?^```$', '', path.read_text(encoding='utf-8'), flags=re.DOTALL | re.M)
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if re.match(r'\w+:', link):
      continue
    name, _, heading = link.partition('#')
    target = path.parent / name if name else path
    if not target.exists() or (heading and heading not in headings(target)):
      yield link


def headings(path):
  """The headings of a document as links spell them."""
  found = re.findall(r'^#+ (.+)$', path.read_text(encoding='utf-8'), re.M)
  return [re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in found]


def files_of(text):
  """The blocks of code in a document that have a name: '`mine/x.py`:' before the block."""
  blocks = re.findall(r'^`([\w/]+\.py)`:\n\n```python\n(.*?)^```$', text, re.DOTALL | re.M)
  return dict(blocks)


def flags_of(text):
  """(config file, its argument, other flags) of each command in a document that names a config."""
  text = text.replace('\\\n', ' ')
  for line in text.splitlines():
    config = re.search(r'--config=(configs/\w+\.py)(?::([\w.-]+))?', line)
    if config:
      yield config[1], config[2], re.findall(r'--config\.([\w.]+)=', line)


@pytest.mark.parametrize('name', DOCUMENTS)
def test_links_lead_somewhere(name):
  assert list(broken_links(ROOT / name)) == []


def test_the_check_of_links_finds_what_it_must(tmp_path):
  (tmp_path / 'a.md').write_text(
    '# A title\n[here](a.md) [gone](b.md) [far](https://x.org/y) [up](#a-title) [no](a.md#none)'
  )
  assert list(broken_links(tmp_path / 'a.md')) == ['b.md', 'a.md#none']


def test_the_readme_is_short():
  assert len(text_of('README.md').split()) <= WORDS


@pytest.mark.parametrize('name', DOCUMENTS)
def test_configs_and_their_options_are_there(name):
  """Every config file that a command names, with every option that it sets."""
  for path, argument, options in flags_of(text_of(name)):
    module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
    settings = module.get_config() if argument is None else module.get_config(argument)
    for option in options:
      section, _, key = option.rpartition('.')
      holder = settings[section] if section else settings
      assert key in holder, f'{path} has no {option}'


def test_every_mode_is_in_the_table():
  section = text_of('README.md').split('\n## Modes\n')[1].split('\n## ')[0]
  listed = re.findall(r'^\| `(\w+)` \|', section, re.M)
  assert sorted(listed) == plugins.names('mode')


def rooms_of(text):
  """(folders, names of modules) of each row of the table of rooms."""
  section = text.split('\n## The rooms\n')[1].split('\n## ')[0]
  for row in re.findall(r'^\| (\[.*?) \| (.*) \|$', section, re.M):
    yield re.findall(r'\]\((\w+)\)', row[0]), re.findall(r'`([\w/]+)`', row[1])


def test_every_room_is_in_the_table_with_modules_that_are_there():
  package, rooms = ROOT / 'llm_jax', []
  for folders, names in rooms_of(text_of(HOUSE)):
    rooms += folders
    for name in names:
      files = [
        package / folder / (name if name.endswith('/') else f'{name}.py') for folder in folders
      ]
      assert any(file.exists() for file in files), f'{name} is not in {folders}'
  assert sorted(rooms) == sorted(path.parent.name for path in package.glob('*/__init__.py'))


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Lines with two kinds of text."""
  folder = tmp_path_factory.mktemp('corpus')
  rng = random.Random(0)
  with open(folder / 'labelled.jsonl', 'w') as file:
    for number in range(200):
      kind = ('count', 'letter')[number % 2]
      words = range(number, number + rng.randrange(2, 9)) if kind == 'count' else 'abcdefgh'
      record = {'text': f'{number} ' + ' '.join(map(str, words)), 'kind': kind}
      file.write(json.dumps(record) + '\n')
  return folder


def small(settings, corpus):
  """A config, as nested dictionaries, with a tiny model, the byte tokenizer and little data."""
  settings['data'] = dict(
    source='jsonl',
    path=str(corpus / 'labelled.jsonl'),
    label='kind',
    validation=0.1,
    cache=str(corpus / 'cache'),
    workers=1,
  )
  settings['tokenizer'] = dict(name='byte')
  settings['model'] |= SHAPE
  settings['logging'] = dict(tensorboard=False)
  settings['evaluation'] = dict(rows=8, samples=0)
  settings['checkpoint'] = dict(every=2)
  return settings | SMALL


def train(settings, corpus, workdir):
  """Trains for two steps as the command line does; returns the run and its last numbers."""
  run = loop.prepare(config_lib.parse(small(settings, corpus)), workdir)
  return run, loop.train(run, train_mode.configured(run))


@pytest.fixture(scope='module')
def sessions(corpus, tmp_path_factory):
  """The names that examples in docstrings use."""
  folder = tmp_path_factory.mktemp('runs')
  encoder = base.get_config().to_dict()
  encoder['model'] = dict(name='encoder', variant='bert_tiny')
  encoder['objective'] = dict(
    name='mix',
    rows='classify',
    weights=dict(mlm=1.0, classify=1.0),
    parts=dict(mlm=dict(), classify=dict(pool='mean')),
  )
  decoder = base.get_config().to_dict()
  decoder['model'] = dict(name='decoder', variant='gpt_tiny')
  decoder['objective'] = dict(name='clm')
  train(encoder, corpus, folder / 'encoder')
  train(decoder, corpus, folder / 'decoder')
  return dict(
    folder=folder / 'encoder',
    session=llm_jax.open(folder / 'encoder'),
    decoder=llm_jax.open(folder / 'decoder'),
  )


def modules_with_examples():
  """Every module of the package with `>>>` in it."""
  for path in sorted((ROOT / 'llm_jax').rglob('*.py')):
    if '>>> ' in path.read_text(encoding='utf-8'):
      parts = path.relative_to(ROOT).with_suffix('').parts
      yield '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def run_examples(module, **names):
  """(examples run, what went wrong) of the docstrings of a module."""
  runner, said = doctest.DocTestRunner(verbose=False), []
  for test in doctest.DocTestFinder().find(module, extraglobs=names):
    runner.run(test, out=said.append)
  return runner.tries, ''.join(said)


@pytest.mark.parametrize('name', [n for n in modules_with_examples() if n not in OPENED])
def test_examples_in_docstrings(name):
  attempted, said = run_examples(importlib.import_module(name))
  assert attempted and not said, said


@pytest.mark.slow
@pytest.mark.parametrize('name', OPENED)
def test_examples_of_a_session(name, sessions):
  attempted, said = run_examples(importlib.import_module(name), **sessions)
  assert attempted and not said, said


def test_the_check_of_examples_finds_what_is_wrong():
  module = types.ModuleType('wrong')
  module.__doc__ = '>>> 1 + 1\n3\n'
  attempted, said = run_examples(module)
  assert attempted == 1 and 'Expected' in said


@pytest.fixture
def mine(tmp_path, monkeypatch):
  """The files of llm_jax/README.md where a user would have them."""
  files = files_of(text_of(HOUSE))
  assert sorted(files) == ['mine/bitfit.py', 'mine/config.py', 'mine/norms.py', 'mine/replaced.py']
  for name, code in files.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  importlib.invalidate_caches()
  return importlib.import_module('mine.config').get_config()


def test_the_objective_is_as_short_as_it_is_said_to_be():
  """Lines of code in its class, without docstring and blank ones."""
  (found,) = (
    node
    for node in ast.parse(files_of(text_of(HOUSE))['mine/replaced.py']).body
    if isinstance(node, ast.ClassDef) and node.name == 'Objective'
  )
  lines = ast.unparse(found).splitlines()
  assert len([line for line in lines if line.strip()]) <= 30


@pytest.mark.slow
def test_the_objective_of_the_document_trains(mine, corpus, tmp_path):
  run, values = train(mine.to_dict(), corpus, tmp_path / 'run')
  losses = [line['replaced'] for line in logs.read(tmp_path / 'run') if line['split'] == 'train']
  assert len(losses) == 2 and all(0.1 < loss < 3 for loss in losses)
  assert values['loss'] == values['replaced'] and 0 <= values['replaced_accuracy'] <= 1
  assert 'heads_replaced/kernel' in tree.paths(run.state.params)
  example = run.train[0]
  share = example['replaced'].sum() / (example['segments'] > 0).sum()
  assert 0 < share < 0.5


@pytest.mark.slow
def test_the_adapter_and_the_hook_of_the_document_work(mine, corpus, tmp_path):
  settings = mine.to_dict()
  settings['adapter'] = dict(name='mine.bitfit')
  settings['hooks'] = dict(norms=dict(name='mine.norms', every=1))
  run, _ = train(settings, corpus, tmp_path / 'run')
  kinds = {path.split('/')[-1] for path in tree.paths(run.state.params) if 'heads_' not in path}
  assert kinds == {'bias'}
  assert 'heads_replaced/kernel' in tree.paths(run.state.params)
  assert any(path.endswith('/kernel') for path in tree.paths(run.state.frozen))
  norms = [line for line in logs.read(tmp_path / 'run') if line['split'] == 'parameters']
  assert [line['step'] for line in norms] == [1, 2]
  assert all(math.isfinite(line['norm']) for line in norms)


def test_a_wrong_option_of_a_hook_is_an_error_before_the_run(mine, corpus, tmp_path):
  settings = mine.to_dict()
  settings['hooks'] = dict(norms=dict(name='mine.norms', evry=1))
  with pytest.raises(ValueError, match=r'config\.hooks\.norms\.evry .*did you mean .every'):
    loop.prepare(config_lib.parse(small(settings, corpus)), tmp_path / 'run')
