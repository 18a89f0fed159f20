"""The running Python's own library as a corpus: about 11 MB of English and code on every machine,
without a download.
"""

import hashlib
import os
import sys
import sysconfig
from typing import Any

# Tests, other people's packages and what is made for one machine are left out; so is `encodings`:
# 1.4 MB of code tables.
_SKIPPED = frozenset(
  (
    'site-packages',
    'dist-packages',
    '__pycache__',
    'lib-dynload',
    'test',
    'tests',
    'idle_test',
    'encodings',
  )
)
_MADE = ('config-', '_sysconfigdata')  # beginnings of names written by the build


class Source:
  """The .py files of the standard library; another Python version has others, and so another
  fingerprint.
  """

  def __init__(self):
    self.root = sysconfig.get_path('stdlib')
    self.files = _files(self.root)
    digest = hashlib.sha256(repr(sys.version_info[:3]).encode())
    for file in self.files:
      content = self.read(file)
      digest.update(f'{file}\0{len(content)}\0'.encode() + content)
    self.fingerprint = digest.hexdigest()

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {'text': self.read(self.files[index]).decode('utf-8')}

  def read(self, file: str) -> bytes:
    """The content of one of `files`."""
    with open(os.path.join(self.root, file), 'rb') as opened:
      return opened.read()


def _files(root: str) -> list[str]:
  """Names of the .py files, relative to `root`, with forward slashes, sorted."""
  names = []
  for folder, inner, files in os.walk(root):
    inner[:] = [name for name in inner if name not in _SKIPPED and not name.startswith(_MADE)]
    names += [
      os.path.relpath(os.path.join(folder, name), root).replace(os.sep, '/')
      for name in files
      if name.endswith('.py') and not name.startswith(_MADE)
    ]
  return sorted(names)
