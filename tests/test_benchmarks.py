"""The benchmarks take minutes and are not run here; but they load, and all that they call in the
package is there and accepts their arguments.
"""

import ast
import importlib
import inspect
import pathlib
import types

import pytest

from llm_jax.parallel.cpu import memory

FOLDER = pathlib.Path(__file__).parent / 'benchmarks'
SCRIPTS = sorted(path.stem for path in FOLDER.glob('*.py'))


def complaints(module, code):
  """What `code` uses of our modules that is not there, and calls that do not fit the signature.

  Args:
    module: defines the names that the code uses and does not import itself.
    code: source text.
  """
  tree = ast.parse(code)
  names = vars(module) | imported(tree)
  for node in ast.walk(tree):
    used = node.func if isinstance(node, ast.Call) else node
    if not (isinstance(used, ast.Attribute) and isinstance(used.value, ast.Name)):
      continue
    owner, name = names.get(used.value.id), f'{used.value.id}.{used.attr}'
    if not isinstance(owner, types.ModuleType) or not ours(owner.__name__):
      continue
    if not hasattr(owner, used.attr):
      yield f'{name} is not there'
    elif isinstance(node, ast.Call):
      error = refusal(getattr(owner, used.attr), node)
      if error is not None:
        yield f'{name}: {error}'


def imported(tree):
  """What the code, its functions included, imports from our modules, by name."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and ours(node.module):
      for alias in node.names:
        parent = __import__(node.module, fromlist=[alias.name])
        found[alias.asname or alias.name] = getattr(parent, alias.name)
  return found


def ours(name):
  return name.split('.')[0] in ('llm_jax', 'configs', *SCRIPTS)


def refusal(function, call):
  """Why a function does not accept the arguments of a call; None where it does."""
  if any(isinstance(argument, ast.Starred) for argument in call.args):
    return None
  keywords = [argument.arg for argument in call.keywords]
  signature = inspect.signature(function)
  bind = signature.bind_partial if None in keywords else signature.bind  # None: **something
  try:
    bind(*call.args, **dict.fromkeys(filter(None, keywords)))
  except TypeError as error:
    return error
  return None


@pytest.mark.parity
@pytest.mark.parametrize('script', SCRIPTS)
def test_loads_and_calls_what_is_there(script, monkeypatch):
  pytest.importorskip('transformers')
  monkeypatch.setattr(memory, 'set_up', lambda: None)  # would start this process anew
  monkeypatch.syspath_prepend(FOLDER)
  module = importlib.import_module(script)
  assert list(complaints(module, inspect.getsource(module))) == []


def test_the_check_finds_what_has_gone_or_changed():
  module = types.SimpleNamespace(memory=memory)
  assert list(complaints(module, 'memory.release()')) == []
  gone, changed = complaints(module, 'memory.kept\nmemory.release(1)')
  assert gone == 'memory.kept is not there'
  assert changed == 'memory.release: too many positional arguments'


def test_the_check_looks_into_functions():
  code = 'def f():\n  from llm_jax.parallel.cpu import memory as kept\n  kept.release(1)'
  assert list(complaints(types.SimpleNamespace(), code)) == [
    'kept.release: too many positional arguments'
  ]
