"""The running Python's own library as a corpus: about 11 MB of English and code on every machine, without a download."""

import ast
import collections
import functools
import hashlib
import os
import sys
import sysconfig
from typing import Any

# Tests, other people's packages and what is made for one machine are left out; so is `encodings`: 1.4 MB of code tables.
_SKIPPED = frozenset(('site-packages', 'dist-packages', '__pycache__', 'lib-dynload', 'test', 'tests', 'idle_test', 'encodings'))
_MADE = ('config-', '_sysconfigdata')  # beginnings of names written by the build
_MIN_CHARACTERS = 80
_MIN_EXAMPLES = 30


class Source:
  """Documents of the standard library: its .py files, or its docstrings with the package that they come from.

  Another Python version has other documents, and so another fingerprint.

  Args:
    labelled: False: a document is a file. True: a document is the docstring, of 80 characters or more, of a module, class or
      function; its label is the top-level module or package. Equal docstrings count once, for the first in order; labels with
      fewer than 30 are left out. Parsing takes a few seconds, when the documents are first asked for.
  """

  def __init__(self, labelled: bool = False):
    self.labelled = labelled
    self.root = sysconfig.get_path('stdlib')
    self.files = _files(self.root)
    digest = hashlib.sha256(repr((sys.version_info[:3], labelled, _MIN_CHARACTERS, _MIN_EXAMPLES)).encode())
    for file in self.files:
      content = self._read(file)
      digest.update(f'{file}\0{len(content)}\0'.encode() + content)
    self.fingerprint = digest.hexdigest()

  def __len__(self) -> int:
    return len(self._docstrings) if self.labelled else len(self.files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if self.labelled:
      text, label = self._docstrings[index]
      return {'text': text, 'label': label}
    return {'text': self._read(self.files[index]).decode('utf-8')}

  @functools.cached_property
  def _docstrings(self) -> list[tuple[str, str]]:
    labels: dict[str, str] = {}
    for file in self.files:
      top = file.split('/')[0].removesuffix('.py')
      for text in docstrings(self._read(file)):
        if len(text) >= _MIN_CHARACTERS:
          labels.setdefault(text, top)
    counts = collections.Counter(labels.values())
    return [(text, label) for text, label in labels.items() if counts[label] >= _MIN_EXAMPLES]

  def _read(self, file: str) -> bytes:
    with open(os.path.join(self.root, file), 'rb') as opened:
      return opened.read()


def docstrings(source: bytes) -> list[str]:
  """The docstrings, indentation removed, of a module and of the classes and functions in it."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
  return [text for text in found if text]


def _files(root: str) -> list[str]:
  """Names of the .py files, relative to `root`, with forward slashes, sorted."""
  names = []
  for folder, inner, files in os.walk(root):
    inner[:] = [name for name in inner if name not in _SKIPPED and not name.startswith(_MADE)]
    names += [os.path.relpath(os.path.join(folder, name), root).replace(os.sep, '/')
              for name in files if name.endswith('.py') and not name.startswith(_MADE)]
  return sorted(names)
