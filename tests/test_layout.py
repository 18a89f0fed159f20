"""Layers import strictly downward: the table of the README, held against the imports of every module."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / 'llm_jax'
RANKS = {
    **dict.fromkeys(('contracts', 'tree', 'plugins', 'config'), 0),
    **dict.fromkeys(('layers', 'attention', 'ring_attention', 'splash_attention', 'cudnn_attention', 'scores', 'dropout',
                     'sharding', 'fsdp', 'vocabulary', 'metrics', 'state', 'chips', 'hosts', 'hlo', 'topology', 'safetensors',
                     'family', 'compilation', 'heap'), 1),
    **dict.fromkeys(('heads', 'optim', 'checkpoint', 'logs', 'data'), 2),
    **dict.fromkeys(('models', 'objectives', 'evaluators', 'hf'), 3),
    **dict.fromkeys(('step', 'generate'), 4),
    'build': 5,
}
# Of one rank, in the order in which they may use each other.
TOP = ('runs', 'pretrained', 'prepare', 'evaluate', 'use', 'complete', 'memory', 'train', 'embed', 'plan', 'main')
RANKS |= dict.fromkeys(TOP, 6)


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'llm_jax':
      tail = node.module.split('.')[1:]
      yield from [tail] if tail else [[alias.name] for alias in node.names]


def violations(package):
  for path in sorted(package.rglob('*.py')):
    module = path.relative_to(package).with_suffix('').parts
    if module == ('__init__',):
      continue
    for other in imports(path):
      mine, theirs = RANKS[module[0]], RANKS[other[0]]
      same_package = module[0] == other[0] and mine == 2
      in_order = mine == theirs == 6 and TOP.index(other[0]) < TOP.index(module[0])
      below_in_rank = mine == theirs == 1 or module[0] == other[0] == 'plugins' or mine == theirs == 0
      if not (theirs < mine or same_package or in_order or below_in_rank):
        yield f'{"/".join(module)} imports {".".join(other)}'


def test_imports_point_downward():
  assert list(violations(PACKAGE)) == []


def test_the_check_finds_an_upward_import(tmp_path):
  (tmp_path / 'tree.py').write_text('from llm_jax import build\nfrom llm_jax.data.cache import build as b\n')
  assert list(violations(tmp_path)) == ['tree imports build', 'tree imports data.cache']


def test_only_build_loads_plugins():
  users = [path.name for path in PACKAGE.rglob('*.py') if 'plugins.load(' in path.read_text()]
  assert users == ['build.py']
