"""Questions with answers in a text, in the JSON of SQuAD 1.1 and 2.0 (arXiv:1606.05250,
arXiv:1806.03822); plain or gzip.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from llm_jax.data.sources import _paths

SUFFIXES = ('.json', '.json.gz')


class _Position(NamedTuple):
  """Where a question stands: its file, and numbers in the lists of it."""

  file: int
  article: int
  paragraph: int
  question: int


class Source:
  """The questions as records with `id`, `question`, `context`, `title` and `answers`, a list of
  {'text', 'answer_start'}; it is empty where `is_impossible`, and missing where the file has none.

  The files are held in memory.

  Args:
    path: a file, a folder (.json, .json.gz at any depth), a glob, or several with commas between
      them.
    fields: further fields of a question.

  Raises:
    ValueError: nothing matches the path, a file of another form, or no question; when a record is
      read: a question without what it needs; with file and id.
  """

  def __init__(self, path: str, fields: tuple[str, ...] = ()):
    self.path, self.files = path, _paths.find(path, SUFFIXES)
    self.fields = tuple(name for name in fields if name not in _OWN)
    own = [self.fields] if self.fields else []
    self.fingerprint = _paths.fingerprint(self.files, 'squad', *own)

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.values(range(len(self))[index])

  def values(self, index: int) -> dict[str, Any]:
    """One record."""
    position = self._positions[index]
    article, paragraph, question = self._of(position)
    where = self.where(index)
    record = {
      'id': question.get('id'),
      'question': _string(question, 'question', where),
      'context': _string(paragraph, 'context', where),
      'title': article.get('title'),
    }
    if question.get('is_impossible'):
      record['answers'] = []
    elif 'answers' in question:
      record['answers'] = question['answers']
    for name in self.fields:
      if name not in question:
        raise ValueError(f'{where}: no field {name!r}; a question has: {", ".join(question)}.')
      record[name] = question[name]
    return record

  def columns(self) -> list[str]:
    """The fields of a record."""
    return [*_OWN, *self.fields]

  def where(self, index: int) -> str:
    """File, and id of the question, or its number."""
    position = self._positions[index]
    name = self._of(position)[2].get('id')
    return f'{self.files[position.file]}: question {index if name is None else name}'

  def _of(self, position: _Position) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    article = self._articles[position.file][position.article]
    paragraph = article['paragraphs'][position.paragraph]
    return article, paragraph, paragraph['qas'][position.question]

  @functools.cached_property
  def _articles(self) -> list[list[dict[str, Any]]]:
    return [_read(path) for path in self.files]

  @functools.cached_property
  def _positions(self) -> list[_Position]:
    found = [
      _Position(file, *numbers)
      for file, articles in enumerate(self._articles)
      for numbers in _numbers(articles, self.files[file])
    ]
    if not found:
      raise ValueError(
        f'path={self.path!r} is an empty corpus: {len(self.files)} files without a question.'
      )
    return found

  def __getstate__(self) -> dict[str, Any]:
    """Other processes read the files themselves."""
    return {key: x for key, x in self.__dict__.items() if key not in ('_articles', '_positions')}


_OWN = ('id', 'question', 'context', 'title', 'answers')


def _read(path: str) -> list[dict[str, Any]]:
  with _paths.stream(path) as file:
    try:
      text = file.read()
      content = json.loads(text) if text.strip() else None
    except (ValueError, EOFError, OSError) as error:
      raise ValueError(f'{path}: not JSON in UTF-8 ({error}).') from error
  if content is None:
    raise ValueError(f'{path}: the file is empty.')
  articles = content.get('data') if isinstance(content, dict) else None
  if not isinstance(articles, list):
    raise ValueError(
      f'{path}: not the JSON of SQuAD, which is an object with a list `data` of articles; read '
      'JSON Lines with config.data.source=jsonl.'
    )
  return articles


def _numbers(articles: list[Any], path: str) -> Iterator[tuple[int, int, int]]:
  for a, article in enumerate(articles):
    for p, paragraph in enumerate(_list(article, 'paragraphs', f'{path}: article {a}')):
      questions = _list(paragraph, 'qas', f'{path}: article {a}, paragraph {p}')
      for q, question in enumerate(questions):
        if not isinstance(question, dict):
          raise ValueError(
            f'{path}: article {a}, paragraph {p}: question {q} is {question!r}, no object.'
          )
        yield a, p, q


def _list(values: Any, name: str, where: str) -> list[Any]:
  found = values.get(name) if isinstance(values, dict) else None
  if not isinstance(found, list):
    raise ValueError(f'{where} has no list {name!r}, as the JSON of SQuAD has.')
  return found


def _string(values: dict[str, Any], name: str, where: str) -> str:
  if not isinstance(values.get(name), str):
    raise ValueError(f'{where}: {name!r} is {values.get(name)!r}; it must be a string.')
  return values[name]
