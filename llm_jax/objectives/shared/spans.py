"""Questions with spans of texts as answers: the answers of a record, and rows of windows."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from llm_jax.core.contracts import Documents, Example
from llm_jax.data import pairs
from llm_jax.data.pairs import Frame
from llm_jax.objectives.shared.text_rows import plan

CANDIDATE, START, END = 1, 2, 4  # bits of `span`
Answer = tuple[str, int]  # its text, and its first character in the context

# Rule 1 of `read`, to be raised in `qa.Objective.encode` with any change to it: the cache is named
# by the source code of that.


def read(given: Any, context: str) -> tuple[list[Answer], int]:
  """The answers, and how many of them do not stand where they say: they are taken from the nearest
  occurrence of their text.

  Args:
    given: a list of objects with `text` and `answer_start`, or an object of lists.
    context: the text.

  Raises:
    ValueError: another form, or an answer that the context does not hold.
  """
  if isinstance(given, Mapping):
    columns = given.get('text'), given.get('answer_start')
    if not all(isinstance(column, list) for column in columns) or len(columns[0]) != len(
      columns[1]
    ):
      raise ValueError(
        f"field 'answers' is {given!r}; it must have lists of equal lengths as text and "
        'answer_start.'
      )
    given = [dict(text=text, answer_start=start) for text, start in zip(*columns, strict=True)]
  if not isinstance(given, list | tuple):
    raise ValueError(f"field 'answers' is {given!r}; it must be a list.")
  found = [_answer(answer, context) for answer in given]
  moved = sum(answer[1] != said['answer_start'] for answer, said in zip(found, given, strict=True))
  return found, moved


def _answer(answer: Any, context: str) -> Answer:
  text = start = None
  if isinstance(answer, Mapping):
    text, start = answer.get('text'), answer.get('answer_start')
  if not isinstance(text, str) or not text or not isinstance(start, int):
    raise ValueError(
      f"field 'answers' holds {answer!r}; each must have a text and its first character, "
      'answer_start.'
    )
  if start >= 0 and context.startswith(text, start):
    return text, start
  found = [match.start() for match in re.finditer(re.escape(text), context)]
  if not found:
    first = max(start, 0)
    raise ValueError(
      f'the answer {text!r} is not in its context, which has '
      f'{context[first : first + len(text)]!r} at character {start}.'
    )
  return text, min(found, key=lambda position: abs(position - start))


class Window(NamedTuple):
  """A window of a context in a row.

  Attributes:
    text: the document.
    start, stop: which tokens of the context.
    first: the index in the row of the window's first token.
    context: that of the first token of the context.
  """

  text: int
  start: int
  stop: int
  first: int
  context: int


class Windows:
  """Rows of windows.

  Args:
    documents: questions with their contexts.
    seq_len: T.
    answers: of each document; None where they are asked for, or where it has none.
    frame: the special tokens around question and context.
    stride: tokens from the beginning of a window to that of the next, if the windows have as many.
    max_question: tokens of a question.
    slots: G, the most windows of a row.

  Attributes:
    cut: how many questions lose their end.

  Raises:
    ValueError: a row has no room for a context beside its question.
  """

  def __init__(
    self,
    documents: Documents,
    seq_len: int,
    answers: Sequence[Sequence[Answer] | None],
    *,
    frame: Frame,
    stride: int,
    max_question: int,
    slots: int,
  ):
    self.documents, self.seq_len, self.given = documents, seq_len, answers
    self.frame, self.max_question, self.slots = frame, max_question, slots
    asked = documents.lengths('question_tokens')
    self.questions = np.minimum(asked, max_question)
    self.cut = int(np.count_nonzero(asked > self.questions))
    lengths = documents.lengths('tokens')
    room = seq_len - self.frame.double - self.questions
    if len(room) and room.min() < 1:
      raise ValueError(
        f'seq_len={seq_len} leaves no room for a context beside {self.frame.double} special tokens '
        f'and a question of {self.questions.max()}; raise it, or lower objective.max_question.'
      )
    step = np.minimum(stride, room)
    self.counts = 1 + -(-np.maximum(lengths - room, 0) // step)
    self.text = np.repeat(np.arange(len(documents)), self.counts)
    number = np.arange(len(self.text)) - np.repeat(
      np.cumsum(self.counts) - self.counts, self.counts
    )
    self.start = number * step[self.text]
    self.stop = np.minimum(self.start + room[self.text], lengths[self.text])
    self.sizes = self.frame.double + self.questions[self.text] + self.stop - self.start
    self.plan = plan(self.sizes, seq_len, slots)

  def __len__(self) -> int:
    return len(self.plan)

  def texts(self, index: int) -> list[int]:
    """The document of each window of a row, in their order."""
    return [int(self.text[window]) for window, _, _ in self.plan[index]]

  def parts(self, text: int) -> int:
    """How many windows a document has."""
    return int(self.counts[text])

  def answers(self, text: int) -> list[str] | None:
    """The answers that a question was given."""
    given = self.given[text]
    return None if given is None else [answer for answer, _ in given]

  def characters(self, text: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Where the characters of each token of a context begin and end, and the context."""
    begins, ends = (self.documents.array(f'token_{side}', text) for side in ('begins', 'ends'))
    return begins, ends, self.documents.values('context')[text]

  def windows(self, index: int) -> Iterator[Window]:
    """The windows of a row, in their order."""
    first = 0
    for window, _, _ in self.plan[index]:
      text, start, stop = (int(x[window]) for x in (self.text, self.start, self.stop))
      context = first + len(self.frame.first) + int(self.questions[text]) + len(self.frame.between)
      yield Window(text, start, stop, first, context)
      first += int(self.sizes[window])

  def example(self, index: int, rng: np.random.Generator) -> Example:
    del rng
    windows = list(self.windows(index))
    texts = [self._ids(window) for window in windows]
    row = pairs.packed(texts, self.seq_len, self.frame, self.slots)
    row['span'] = np.zeros(self.seq_len, np.int32)
    row['span_weight'] = np.zeros(self.slots, np.float32)
    for slot, window in enumerate(windows):
      stop = window.context + window.stop - window.start
      row['span'][[window.first, *range(window.context, stop)]] = CANDIDATE
      if self.given[window.text] is not None:
        first, last = self._target(window)
        row['span'][first] |= START
        row['span'][last] |= END
        row['span_weight'][slot] = 1
    return row

  def spelled(self, text: int) -> tuple[int, int] | None:
    """The tokens of a context, first and last, that hold its first answer; None where there is no
    answer, or no token has characters of it.
    """
    given = self.given[text]
    if not given:
      return None
    answer, start = given[0]
    begins, ends, _ = self.characters(text)
    inside = (begins < start + len(answer)) & (ends > start) & (ends > begins)
    found = np.flatnonzero(inside)
    return (int(found[0]), int(found[-1])) if len(found) else None

  def log(self) -> None:
    """Says how many windows a row holds, and warns of what is not learned as it is given."""
    documents, windows, rows = len(self.documents), len(self.text), len(self)
    if not documents:
      return
    logging.info(
      'qa: %d questions in %d windows in %d rows of %d tokens, %.1f%% of which are used.',
      documents,
      windows,
      rows,
      self.seq_len,
      100 * self.sizes.sum() / (rows * self.seq_len),
    )
    if self.cut:
      logging.warning(
        'qa: %d of %d questions are longer than objective.max_question=%d and lose their ends.',
        self.cut,
        documents,
        self.max_question,
      )
    moved = [text for text, count in enumerate(self.documents.values('moved') or ()) if count]
    if moved:
      logging.warning(
        'qa: answers of %d questions do not stand where they say; they are taken from the nearest '
        'place that holds them, the first: %s.',
        len(moved),
        self.documents.where(moved[0]),
      )
    unread = [text for text in range(documents) if self.given[text] and self.spelled(text) is None]
    if unread:
      logging.warning(
        'qa: the answers of %d questions are spelled by no token and are learned as none, the '
        'first: %s.',
        len(unread),
        self.documents.where(unread[0]),
      )

  def _ids(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
    question = self.documents.array(
      'question_tokens', window.text, 0, int(self.questions[window.text])
    )
    return question, self.documents.array('tokens', window.text, window.start, window.stop)

  def _target(self, window: Window) -> tuple[int, int]:
    """The indices in the row of the answer's first and last token; where the window does not hold
    both, its own first.
    """
    tokens = self.spelled(window.text)
    if tokens is None or tokens[0] < window.start or tokens[1] >= window.stop:
      return window.first, window.first
    shift = window.context - window.start
    return tokens[0] + shift, tokens[1] + shift
