"""Text with a tag on each word, `The/DT house/NN`, one sentence per line, as the Brown corpus and
the Chinese People's Daily have it; plain or gzip.
"""

from typing import Any

from llm_jax.data.sources import _lines, _paths

SUFFIXES = ('.txt', '.txt.gz', '.pos', '.pos.gz')


class Source(_lines.Lines):
  """The lines as records with `words` and `tags`; blank lines are none.

  The last slash of each item splits it: `1/2/CD` is the word `1/2`.

  Args:
    path: a file, a folder (.txt, .pos, .gz at any depth), a glob, or several with commas between
      them.
    separator: what stands between a word and its tag.

  Raises:
    ValueError: nothing matches the path, or there is no sentence; when a sentence is read: an item
      without a word or a tag, with file and line number.
  """

  def __init__(self, path: str, separator: str = '/'):
    if not separator or separator.isspace():
      raise ValueError(f'separator={separator!r} must be a sign, such as "/" or "_".')
    super().__init__(path, SUFFIXES)
    self.separator = separator
    self.fingerprint = _paths.fingerprint(self.files, 'word_tag', separator)

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = range(len(self))[index]
    where = self.where(index)
    try:
      line = self.data(index).decode('utf-8-sig' if self._index[index][1] == 1 else 'utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(f'{where}: not UTF-8 ({error.reason}); {_paths.TO_UTF8}.') from error
    items = line.replace('\t', ' ').strip(' \r\n').split(' ')
    split = [item.rpartition(self.separator) for item in items if item]
    for number, (word, _, tag) in enumerate(split):
      if not word or not tag:
        raise ValueError(
          f'{where}: item {number} is {"".join(split[number])!r}; each must be a word, '
          f'{self.separator!r} and a tag.'
        )
    return {'words': [word for word, _, _ in split], 'tags': [tag for _, _, tag in split]}

  def _counts(self, line: bytes) -> bool:
    return bool(line.lstrip(b'\xef\xbb\xbf').strip(b' \t\r\n'))
