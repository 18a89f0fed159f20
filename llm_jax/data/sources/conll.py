"""Columns, as the shared tasks of CoNLL give them (Sang and De Meulder 2003): a word per line with
its tags beside it, a blank line after each sentence; plain or gzip.
"""

import re
from typing import Any

from llm_jax.data.sources import _paths, _sentences

SUFFIXES = ('.conll', '.conll.gz', '.bio', '.iob', '.iob2', '.txt', '.txt.gz')
DOCUMENT = '-DOCSTART-'  # the word of a line that begins a document


class Source(_sentences.Sentences):
  """The sentences as records with `words` and `tags`; `-DOCSTART-` lines are none.

  Columns are separated by tabs where the line has one, else by spaces.

  Args:
    path: a file, a folder (.conll, .bio, .iob, .iob2, .txt at any depth), a glob, or several with
      commas between them.
    word_column: number of the column with the words, from 0; -1 is the last one.
    tag_column: likewise of that with the tags.

  Raises:
    ValueError: nothing matches the path, or there is no sentence; when a sentence is read: a line
      with another number of columns than the one before, or without the columns that are asked for,
      with file and line number.
  """

  def __init__(self, path: str, word_column: int = 0, tag_column: int = -1):
    super().__init__(path, SUFFIXES)
    self.columns_read = {'word_column': word_column, 'tag_column': tag_column}
    self.fingerprint = _paths.fingerprint(self.files, 'conll', word_column, tag_column)

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = range(len(self))[index]
    words, tags, wanted = [], [], None
    for line, where in self.lines(index):
      cells = _cells(line)
      if cells[0] == DOCUMENT:
        continue
      if len(cells) != (wanted or len(cells)):
        raise ValueError(
          f'{where}: {len(cells)} columns, and {wanted} in the lines before; every line of a '
          'sentence has as many, and a blank line ends it.'
        )
      wanted = len(cells)
      words.append(self._cell(cells, 'word_column', where))
      tags.append(self._cell(cells, 'tag_column', where))
    return {'words': words, 'tags': tags}

  def _cell(self, cells: list[str], option: str, where: str) -> str:
    column = self.columns_read[option]
    if not -len(cells) <= column < len(cells):
      raise ValueError(f'{where}: no column {column}, only {len(cells)}; `{option}` names it.')
    if not cells[column]:
      raise ValueError(f'{where}: column {column} is empty; each word needs a word and a tag.')
    return cells[column]

  def _counts(self, line: bytes) -> bool:
    return not line.lstrip(b'\xef\xbb\xbf').startswith(DOCUMENT.encode())


def _cells(line: str) -> list[str]:
  # Not str.split: a no-break space, say, is a part of a word.
  return line.split('\t') if '\t' in line else re.split(' +', line.strip(' '))
