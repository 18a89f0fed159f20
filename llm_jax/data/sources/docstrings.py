"""A labelled corpus on every machine: the docstrings of the Python standard library, and the
package that each comes from.
"""

import ast
import collections
import functools
import hashlib
from typing import Any

from llm_jax.data.sources import stdlib

_MIN_CHARACTERS = 80
_MIN_EXAMPLES = 30


class Source:
  """Docstrings of modules, classes and functions, of 80 characters or more; the label is the
  top-level module or package.

  Equal docstrings count once, for the first in order; labels with fewer than 30 are left out.
  Parsing takes a few seconds, when the records are first asked for.
  """

  def __init__(self):
    self.library = stdlib.Source()
    self.fingerprint = hashlib.sha256(
      repr((self.library.fingerprint, _MIN_CHARACTERS, _MIN_EXAMPLES)).encode()
    ).hexdigest()

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, index: int) -> dict[str, Any]:
    text, label = self._texts[index]
    return {'text': text, 'label': label}

  @functools.cached_property
  def _texts(self) -> list[tuple[str, str]]:
    """The texts with their labels."""
    labels: dict[str, str] = {}
    for file in self.library.files:
      top = file.split('/')[0].removesuffix('.py')
      for text in docstrings(self.library.read(file)):
        if len(text) >= _MIN_CHARACTERS:
          labels.setdefault(text, top)
    counts = collections.Counter(labels.values())
    return [(text, label) for text, label in labels.items() if counts[label] >= _MIN_EXAMPLES]


def docstrings(source: bytes) -> list[str]:
  """The docstrings, indentation removed, of a module and of the classes and functions in it."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
  return [text for text in map(ast.get_docstring, nodes) if text]
