"""The benchmarks take minutes and are not run here; but they load, and what they call of the
package takes what they give it.
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
  """What `code`, whose names are those of `module`, asks of other modules that these lack or do not
  take.
  """
  for node in ast.walk(ast.parse(code)):
    called = node.func if isinstance(node, ast.Call) else node
    if not (isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)):
      continue
    owner, name = getattr(module, called.value.id, None), f'{called.value.id}.{called.attr}'
    if not isinstance(owner, types.ModuleType) or owner.__name__.split('.')[0] not in (
      'llm_jax',
      'configs',
      *SCRIPTS,
    ):
      continue
    if not hasattr(owner, called.attr):
      yield f'{name} is not there'
    elif isinstance(node, ast.Call) and not any(
      isinstance(given, ast.Starred) for given in node.args
    ):
      keywords = [given.arg for given in node.keywords]
      signature = inspect.signature(getattr(owner, called.attr))
      try:
        (signature.bind_partial if None in keywords else signature.bind)(
          *node.args, **dict.fromkeys(filter(None, keywords))
        )
      except TypeError as error:
        yield f'{name}: {error}'


@pytest.mark.parity
@pytest.mark.parametrize('script', SCRIPTS)
def test_loads_and_calls_what_is_there(script, monkeypatch):
  pytest.importorskip('transformers')
  monkeypatch.setattr(
    memory, 'keep', lambda: None
  )  # it would change the memory of this process for good
  monkeypatch.syspath_prepend(FOLDER)
  module = importlib.import_module(script)
  assert list(complaints(module, inspect.getsource(module))) == []


def test_the_check_finds_what_has_gone_or_changed():
  module = types.SimpleNamespace(memory=memory)
  assert list(complaints(module, 'memory.keep()')) == []
  gone, changed = complaints(module, 'memory.kept\nmemory.keep(1)')
  assert gone == 'memory.kept is not there'
  assert changed == 'memory.keep: too many positional arguments'
