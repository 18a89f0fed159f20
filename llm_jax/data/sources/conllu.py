"""CoNLL-U, the format of Universal Dependencies; plain or gzip.

https://universaldependencies.org/format.html
"""

from typing import Any

from llm_jax.core import plugins
from llm_jax.data.sources import _paths, _sentences

SUFFIXES = ('.conllu', '.conllu.gz')
COLUMNS = ('id', 'form', 'lemma', 'upos', 'xpos', 'feats', 'head', 'deprel', 'deps', 'misc')
_FILLED = ('upos', 'xpos', 'deprel')  # '_' says here that nobody has annotated


class Source(_sentences.Sentences):
  """The sentences as records with `words` and `tags`.

  Words are syntactic words: of a multiword token ('1-2 del') its parts ('1 de', '2 el') count, and
  empty nodes ('1.1') do not.

  Args:
    path: a file, a folder (.conllu, .conllu.gz at any depth), a glob, or several with commas
      between them.
    column: the column with the tags, one of `COLUMNS`.

  Raises:
    ValueError: nothing matches the path, there is no sentence, no such column; when a sentence is
      read: a line that is no CoNLL-U, or has no tag, with file and line number.
  """

  def __init__(self, path: str, column: str = 'upos'):
    super().__init__(path, SUFFIXES)
    if column not in COLUMNS:
      raise ValueError(
        f'column={column!r} is not known{plugins.nearest(column, COLUMNS)}; known: '
        f'{", ".join(COLUMNS)}.'
      )
    self.column = column
    self.fingerprint = _paths.fingerprint(self.files, 'conllu', column)

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = range(len(self))[index]
    words, tags = [], []
    for line, where in self.lines(index):
      if line.startswith('#'):
        continue
      cells = line.split('\t')
      if len(cells) != len(COLUMNS):
        raise ValueError(
          f'{where}: {len(cells)} columns; CoNLL-U has {len(COLUMNS)}, with tabs between them.'
        )
      if not cells[0].isdecimal():
        _check_other(cells[0], where)
        continue
      if int(cells[0]) != len(words) + 1:
        raise ValueError(
          f'{where}: the word number {cells[0]} comes after {len(words)}; a blank line ends a '
          'sentence.'
        )
      tag = cells[COLUMNS.index(self.column)]
      if not cells[1] or not tag or (tag == '_' and self.column in _FILLED):
        raise ValueError(f'{where}: no {"form" if not cells[1] else self.column} ({tag!r}).')
      words.append(cells[1])
      tags.append(tag)
    return {'words': words, 'tags': tags}

  def _counts(self, line: bytes) -> bool:
    return not line.lstrip(b'\xef\xbb\xbf').startswith(b'#')


def _check_other(number: str, where: str) -> None:
  """Raises ValueError unless it numbers a multiword token (a range) or an empty node."""
  parts = number.split('-') if '-' in number else number.split('.')
  if len(parts) != 2 or not all(part.isdecimal() for part in parts):
    raise ValueError(f"{where}: {number!r} is no number of a word, range ('1-2') or empty node.")
