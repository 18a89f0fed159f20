"""Functions with docstrings on every machine: code of the Python standard library, a function at a
time.
"""

import ast
import functools
import hashlib
import textwrap
from typing import Any

from llm_jax.data.sources import stdlib

_LEAST, _MOST = 150, 1500  # characters


class Source:
  """The source of functions and methods that have a docstring, each once, as `text`: indentation
  removed, decorators left out, 150 to 1,500 characters.

  Parsing takes a few seconds, when the records are first asked for.
  """

  def __init__(self):
    self.library = stdlib.Source()
    known = repr((self.library.fingerprint, 'functions', _LEAST, _MOST))
    self.fingerprint = hashlib.sha256(known.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {'text': self._texts[index]}

  @functools.cached_property
  def _texts(self) -> list[str]:
    found: dict[str, None] = {}
    for file in self.library.files:
      for text in functions(self.library.read(file)):
        if _LEAST <= len(text) <= _MOST:
          found.setdefault(text)
    return list(found)


def functions(source: bytes) -> list[str]:
  """The functions of a module that have a docstring, in the order in which they begin."""
  lines = source.decode('utf-8').splitlines(keepends=True)
  nodes = [
    node
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node)
  ]
  nodes.sort(key=lambda node: node.lineno)
  return [textwrap.dedent(''.join(lines[node.lineno - 1 : node.end_lineno])) for node in nodes]
