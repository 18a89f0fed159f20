"""Every module imports from its own room, never in a circle, and from the rooms below it."""

import ast
import pathlib

from llm_jax.core import plugins

PACKAGE = pathlib.Path(__file__).parents[1] / 'llm_jax'
ROOMS = (  # from the ground up
  'core',
  'parallel',
  'data',
  'nn',
  'models',
  'objectives',
  'adapters',
  'compress',
  'evaluators',
  'hf',
  'programs',
  'generation',
  'training',
  'inference',
  'compressing',
  'planning',
  'serving',
  'modes',
  'main',
)
SIDE_BY_SIDE = (
  'models',
  'objectives',
  'adapters',
  'compress',
  'evaluators',
)  # plug-ins: none knows another room


def modules(package):
  """Every module by its dotted name, without the package's own."""
  for path in sorted(package.rglob('*.py')):
    parts = path.relative_to(package).with_suffix('').parts
    name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
    if name:
      yield name, path


def imports(path, known):
  """The modules of the package that a file imports, wherever in it the import stands."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'llm_jax':
      base = node.module.removeprefix('llm_jax').lstrip('.')
      for alias in node.names:
        whole = f'{base}.{alias.name}'.lstrip('.')
        yield whole if whole in known else base
    elif isinstance(node, ast.Import):
      yield from (
        alias.name.removeprefix('llm_jax.')
        for alias in node.names
        if alias.name.startswith('llm_jax.')
      )


def violations(package):
  """Imports that point upward or sideways, then circles inside rooms."""
  known = dict(modules(package))
  graph = {name: sorted(set(imports(path, known)) - {''}) for name, path in known.items()}
  for name, others in graph.items():
    room = name.split('.')[0]
    for other in others:
      theirs = other.split('.')[0]
      sideways = room != theirs and room in SIDE_BY_SIDE and theirs in SIDE_BY_SIDE
      if ROOMS.index(theirs) > ROOMS.index(room) or sideways:
        yield f'{name} imports {other}'
  yield from circles(graph)


def circles(graph):
  """Each circle once, as 'a -> b -> a'."""
  done, path = set(), []

  def visit(name):
    if name in path:
      yield ' -> '.join([*path[path.index(name) :], name])
      return
    if name in done:
      return
    path.append(name)
    for other in graph.get(name, ()):
      yield from visit(other)
    done.add(path.pop())

  for name in graph:
    yield from visit(name)


def test_imports_point_downward_and_in_no_circle():
  assert list(violations(PACKAGE)) == []


def test_the_check_finds_what_it_must(tmp_path):
  """Imports that point upward, one inside a function, one between plug-ins, and a circle."""
  files = {
    'parallel/sharding.py': 'def f():\n  from llm_jax.nn import layers\n',
    'nn/layers.py': 'from llm_jax.nn.stack import Stack\n',
    'nn/stack.py': 'import llm_jax.nn.layers\n',
    'models/encoder.py': '',
    'objectives/mlm.py': 'from llm_jax.models import encoder\n',
    'data/cache.py': 'from llm_jax.core.tree import nest\n',
    'core/tree.py': '',
  }
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  assert list(violations(tmp_path)) == [
    'objectives.mlm imports models.encoder',
    'parallel.sharding imports nn.layers',
    'nn.layers -> nn.stack -> nn.layers',
  ]


def test_rooms_and_files_can_be_taken_in_at_a_sitting():
  """But for those of plug-ins, each of which is read by itself."""
  plugged = {
    package.split('.')[1] for package, _ in plugins.KINDS.values() if package.count('.') == 1
  }
  kept = [room for room in ROOMS if (PACKAGE / room).is_dir() and room not in plugged]
  rooms = {room: list((PACKAGE / room).glob('*.py')) for room in kept}
  assert {room: len(files) for room, files in rooms.items() if len(files) > 15} == {}
  assert [name for name, _ in modules(PACKAGE) if 'util' in name] == []


def test_one_module_loads_plugins():
  users = [path.name for path in PACKAGE.rglob('*.py') if 'plugins.load(' in path.read_text()]
  assert sorted(users) == ['assemble.py', 'main.py']  # the command line loads modes
