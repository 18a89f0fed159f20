"""The quick tier covers every module: a quick test imports it, or one of its room that needs it,
or goes through all modules of its folder.
"""

import ast
import pathlib
import runpy

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / 'llm_jax'
LAYOUT = runpy.run_path(str(TESTS / 'test_layout.py'))
# Folders whose modules are all opened by name, and the quick tests that do so.
OPENED_BY_NAME = {'modes': 'modes/test_command.py', 'hf.families': 'hf/test_families.py'}


def is_quick(path):
  """Whether a file has a test that is marked neither `slow` nor `parity`."""
  tree = ast.parse(path.read_text())
  whole = [node.value for node in tree.body if isinstance(node, ast.Assign) and names_marks(node)]
  tests = [
    node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:4] == 'test'
  ]
  return not any(map(takes_out, whole)) and any(
    not any(map(takes_out, test.decorator_list)) for test in tests
  )


def names_marks(node):
  return isinstance(node.targets[0], ast.Name) and node.targets[0].id == 'pytestmark'


def takes_out(node):
  """Whether a decorator, or the value of `pytestmark`, takes tests out of the quick tier."""
  return any(mark in ast.unparse(node) for mark in ('mark.slow', 'mark.parity'))


def uncovered(tests, package):
  """The modules that no quick test reaches."""
  known = dict(LAYOUT['modules'](package))
  graph = {name: set(LAYOUT['imports'](path, known)) for name, path in known.items()}
  files = [path for path in sorted(tests.rglob('test_*.py')) if is_quick(path)]
  reached = set()
  waiting = [name for path in files for name in LAYOUT['imports'](path, known)]
  waiting += by_name(files, tests, known)
  while waiting:
    name = waiting.pop()
    if name not in reached:
      reached.add(name)
      waiting += [other for other in graph.get(name, ()) if room(other) == room(name)]
  return [name for name, path in known.items() if path.stem != '__init__' and name not in reached]


def by_name(files, tests, known):
  for folder, test in OPENED_BY_NAME.items():
    if tests / test in files:
      yield from (name for name in known if name.startswith(f'{folder}.'))


def room(name):
  return name.split('.')[0]


def test_every_module_is_covered():
  assert uncovered(TESTS, PACKAGE) == []


def test_the_check_finds_what_it_must(tmp_path):
  """Covered directly, through its room, by name; not by a slow test, nor through another room."""
  files = {
    'package/core/tree.py': '',
    'package/core/files.py': '',
    'package/nn/stack.py': 'from llm_jax.core import tree\nfrom llm_jax.nn import rows\n',
    'package/nn/rows.py': '',
    'package/nn/block.py': '',
    'package/modes/train.py': '',
    'tests/nn/test_stack.py': 'from llm_jax.nn import stack\ndef test_it(): pass\n',
    'tests/nn/test_block.py': 'from llm_jax.nn import block\npytestmark = [pytest.mark.slow]\n'
    'def test_it(): pass\n',
    'tests/core/test_files.py': 'from llm_jax.core import files\n'
    '@pytest.mark.parity\ndef test_it(): pass\n',
    'tests/modes/test_command.py': 'def test_it(): pass\n',
  }
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  missing = uncovered(tmp_path / 'tests', tmp_path / 'package')
  assert missing == ['core.files', 'core.tree', 'nn.block']
