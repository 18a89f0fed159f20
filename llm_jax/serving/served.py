"""A model as the service has it: its session, and what gathers requests for it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from llm_jax.core.config import Config
from llm_jax.data.conversations import Message
from llm_jax.generation.guides import Guide, Guides
from llm_jax.generation.sampling import Sampling
from llm_jax.inference.session import Session
from llm_jax.programs import summary
from llm_jax.serving.batches import Batches
from llm_jax.serving.writing import Order, Tell, Writer


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the service takes on.

  Attributes:
    rows: texts that a model writes at once.
    slots: tokens of each, the prompt and what is written together; None for all that it takes.
    batch: rows of a batch that is read.
    wait: seconds that a request waits for others to be read with.
    waiting: requests that may wait for each model, of each kind.
    prefixes: prompts that a model remembers, for others that begin alike.
  """

  rows: int = 8
  slots: int | None = None
  batch: int = 8
  wait: float = 0.005
  waiting: int = 256
  prefixes: int = 4


@dataclasses.dataclass(frozen=True)
class Seen:
  """What a model has seen in training, so that what it is asked can be compared with it.

  Attributes:
    unknown_id: the id of what the vocabulary cannot spell; -1 where there is none.
    classes: those that it answers; none where they are too many to count each.
    training: the training set; None where its folder does not describe it. A prompt is not a whole
      example of it, so of a decoder it has no lengths.
  """

  unknown_id: int = -1
  classes: tuple[str, ...] = ()
  training: summary.Summary | None = None


ALONE = ('choice', 'classify', 'pair', 'prompt', 'qa', 'relation', 'rerank', 'tag')  # see `resized`
TOP = 100  # candidates for a mask; a request gets as many as it asks for
TRIED = ('a', 'some text', 'and one that is a little longer than the others', 'word ' * 40)


class Served:
  """What a model answers, for any number of threads.

  Args:
    name: what requests call it.
    session: the model.
    limits: what it takes on.

  Attributes:
    task: the objective that it was trained by; None where the folder does not say.
    embeds, answers, fills: batches of texts to vectors, of records to answers, and of texts to
      filled ones; None where the model has none.
    fills_in: whether it can fill in masks, which is known when it is warm.
    writer: of a model that writes; None of others.
    seen: what it has seen in training.
    exact: whether answers were the same alone and in company, to the bit, when that was tried here;
      None before.
    users: requests that ask it just now.
  """

  def __init__(self, name: str, session: Session, limits: Limits):
    self.name, self.session = name, session
    objective = session.program.objective
    self.task = None if objective is None else session.config.objective.get('name')
    self._batches: list[Batches] = []
    self.embeds = None
    if not session.reads_source:
      self.embeds = self._gathered(lambda texts: list(session.embed(texts)), limits)
    self.answers = None
    if objective is not None and objective.predictor is not None:
      self.answers = self._gathered(lambda records: list(session.answers(records)), limits)
    self.fills, self.fills_in = None, False
    if not session.causal:
      self.fills = self._gathered(lambda texts: session.fill(texts, TOP), limits)
    self.writer = _writer(session, limits) if session.causal else None
    self.seen, self.users = _seen(session, name), 0
    self.exact: bool | None = None

  @contextlib.contextmanager
  def used(self) -> Iterator[None]:
    """It is not closed meanwhile; for one thread."""
    self.users += 1
    try:
      yield
    finally:
      self.users -= 1

  def warm(self) -> None:
    """Compiles all that a request may need."""
    logging.info('%s: compiling.', self.name)
    if self.embeds is not None:
      self.session.ready_to_embed()
    if self.answers is not None:
      self.session.ready_to_answer(_records(self.session)[0])
    if self.fills is not None:
      try:
        self.session.ready_to_fill(TOP)
        self.fills_in = True
      except ValueError as error:  # no mask, no head, or a folder that lacks its weights
        logging.info('%s fills in nothing: %s', self.name, str(error).partition('\n')[0])
    if self.writer is not None:
      self.writer.warm()
    self._try_alone()
    if self.writer is not None:
      self.writer.start()

  def _try_alone(self) -> None:
    """Finds out whether answers are the same alone and in company, and says which are not."""
    asked = {'embed': self.embeds is not None, 'answer': self.answers is not None}
    asked['fill'] = self.fills_in
    differing = _differing(self.session, [kind for kind, one in asked.items() if one])
    if self.writer is not None and self.writer.differs():
      differing.append('write')
    self.exact = not differing
    if differing:
      logging.warning(
        '%s: beside others, answers differ in their last bits here: %s.',
        self.name,
        ', '.join(differing),
      )

  def write(
    self,
    prompt: Sequence[int],
    sampling: Sampling,
    ends: Sequence[int],
    stop: Sequence[str],
    number: int,
    tell: Tell,
    likely: int | None = None,
    guide: Guide | None = None,
  ) -> Order:
    """Begins to write a text; the arguments are those of `writing.Order`.

    Raises:
      ValueError: what cannot be written.
      Full: too many texts wait.
    """
    decided = self.session.completer().decided(sampling)
    order = Order(prompt, decided, ends, tell, tuple(stop), number, likely, guide)
    self.writer.submit(order)
    return order

  @functools.cached_property
  def guides(self) -> Guides:
    """Makes guides of what it writes."""
    completer = self.session.completer()
    return Guides(self.session.tokenizer, completer.generator.vocab_size, completer.ends)

  def spelled(self, token: int) -> bytes:
    """What a token spells, or the text of a special one."""
    tokenizer = self.session.tokenizer
    if token >= tokenizer.vocab_size:
      return b''
    special = tokenizer.special[token]
    return tokenizer.special_text(token).encode() if special else tokenizer.spelling(token)

  def prompt(self, text: str) -> tuple[list[int], tuple[int, ...]]:
    """The ids of a prompt, and those that end what follows."""
    completer = self.session.completer()
    return completer.ids(text), completer.ends

  def turn(self, messages: Sequence[Message]) -> tuple[list[int], tuple[int, ...]]:
    """The same of a conversation."""
    chat = self.session.conversation
    return chat.ids(messages), chat.completer.ends

  def close(self) -> None:
    """Answers what waits, and takes no more."""
    for batches in self._batches:
      batches.close()
    if self.writer is not None:
      self.writer.close()

  def _gathered(self, run: Callable[[list[Any]], list[Any]], limits: Limits) -> Batches:
    # Several short texts share a row.
    batches = Batches(run, 4 * limits.batch, limits.wait, limits.waiting)
    self._batches.append(batches)
    return batches


def resized(config: Config, limits: Limits) -> Config:
  """The config of a model whose batches are as large as the service wants them.

  What is answered has a row to itself: beside others the last bit of an answer would depend on
  where in a long row it stands.
  """
  objective = dict(config.objective)
  if objective.get('name') in ALONE:
    objective['packing'] = 'none'
  return dataclasses.replace(config, batch_size=limits.batch, objective=objective)


def _writer(session: Session, limits: Limits) -> Writer:
  completer = session.completer()
  slots = session.program.network.longest
  slots = min(slots, limits.slots or slots)
  return Writer(
    completer.generator,
    session.weights,
    session.tokenizer,
    limits.rows,
    slots,
    limits.waiting,
    limits.prefixes,
  )


def _seen(session: Session, name: str) -> Seen:
  predictor = None if session.program.objective is None else session.program.objective.predictor
  classes = (predictor.classes if predictor is not None else None) or ()
  try:
    training = summary.read(session.origin)
  except ValueError as error:
    logging.warning('%s', error)
    training = None
  if training is None:
    logging.info(
      '%s: %s says nothing of the training set, so what is asked is not compared with it.',
      name,
      session.origin,
    )
  elif session.causal and not session.reads_source:
    training = training._replace(lengths={})
  known = classes if len(classes) <= summary.MOST_CLASSES else ()
  number = summary.unknown_id(session.tokenizer)
  return Seen(-1 if number is None else number, tuple(known), training)


def _records(session: Session) -> list[dict[str, Any]]:
  """Records of the kind that a model answers, of unequal lengths."""
  objective = session.program.objective
  if objective is None:
    return []
  sample = next(iter(type(objective).sample_records(session.config.objective)))
  short = {key: x for key, x in sample.items() if key not in ('label', 'labels', 'answers')}
  long = {key: ' '.join([x] * 3) if isinstance(x, str) else x for key, x in short.items()}
  return [short, long, short]


def _differing(session: Session, kinds: Sequence[str]) -> list[str]:
  """Which of some kinds of answers are others alone than in company, on this platform.

  Batches have one shape, so nothing but the platform can make them differ: a compiler that adds up
  in another order for another row, say.

  Args:
    session: a model that is ready.
    kinds: of 'embed', 'answer', 'fill'.
  """
  tried: dict[str, tuple[Callable[[list[Any]], Sequence[Any]], list[Any]]] = {
    'embed': (session.embed, list(TRIED)),
    'answer': (lambda some: list(session.answers(some)), _records(session)),
    'fill': (session.fill, [f'[MASK] {text[:20]}' for text in TRIED]),
  }
  return [kind for kind in kinds if not _same(*tried[kind])]


def _same(run: Callable[[list[Any]], Sequence[Any]], items: list[Any]) -> bool:
  together = run(items)
  return all(_equal(run([item])[0], one) for item, one in zip(items, together, strict=True))


def _equal(one: Any, other: Any) -> bool:
  if isinstance(one, np.ndarray):
    return np.array_equal(one, other)
  return bool(one == other)
