"""Numbers of the service for Prometheus, at `/metrics`.

What is asked is counted beside what the model was trained on (`programs.summary`), so that a rule
can say when the one no longer looks like the other: `launch/alerts.yml`.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import prometheus_client as prometheus
from prometheus_client import core, registry, utils

from llm_jax.programs import summary
from llm_jax.serving.batches import Batches
from llm_jax.serving.served import Served
from llm_jax.serving.writing import Writer

PREFIX = 'llm_jax'
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclasses.dataclass
class Asked:
  """What is known of a request; of its text nothing but its length.

  Attributes:
    method: of HTTP.
    route: its path, or 'other' where there is no such route.
    since: when it came, by `time.monotonic`.
    model: the name of the model that answers; '' where none does.
    read, written: tokens.
    begun: when a model began with it; None where none has, or where it has several parts to begin
      with.
  """

  method: str
  route: str
  since: float = dataclasses.field(default_factory=time.monotonic)
  model: str = ''
  read: int = 0
  written: int = 0
  begun: float | None = None

  def begin(self) -> None:
    """A model begins."""
    self.begun = time.monotonic()


class _Compiled:
  """Counts the programs that this process compiles."""

  def __init__(self) -> None:
    self.count = 0
    self._lock, self._here = threading.Lock(), threading.local()

  def listen(self) -> int:
    """Makes JAX say what it compiles from here on, once for the process however often this is
    called; returns the count so far.
    """
    with contextlib.suppress(AssertionError):  # it does not say so yet, or no more
      jax.monitoring.unregister_event_duration_listener(self._said)
    jax.monitoring.register_event_duration_secs_listener(self._said)
    return self.count

  @contextlib.contextmanager
  def expected(self) -> Iterator[None]:
    """What this thread compiles meanwhile is not counted."""
    self._here.expected = True
    try:
      yield
    finally:
      self._here.expected = False

  def _said(self, event: str, duration_secs: float, **_: Any) -> None:
    del duration_secs
    if 'backend_compile' in event and not getattr(self._here, 'expected', False):
      with self._lock:
        self.count += 1


_COMPILED = _Compiled()


class Watch(registry.Collector):
  """Counts what is asked and answered; each service has its own registry.

  Args:
    models: whose queues are looked at whenever somebody reads the numbers; it may change.

  Attributes:
    ready: whether the service is.
    taken, cut: how many requests were read, and how many of them were broken off by the service.
  """

  def __init__(self, models: Collection[Served]):
    self._models = models
    self.ready: Callable[[], bool] = lambda: True
    self.taken = self.cut = 0
    self._before = _COMPILED.listen()
    self._registry = prometheus.CollectorRegistry()
    made: dict[str, Any] = {'registry': self._registry, 'namespace': PREFIX}
    self._requests = prometheus.Counter(
      'requests', 'Answers, by route and status.', ('route', 'status'), **made
    )
    self._seconds = prometheus.Histogram(
      'request_seconds',
      'From the request to the end of its answer.',
      ('route', 'model'),
      buckets=SECONDS,
      **made,
    )
    self._refused = prometheus.Counter(
      'refused', 'Requests that a limit kept from being answered.', ('reason',), **made
    )
    self._tokens = prometheus.Counter(
      'tokens', 'Tokens, read and written.', ('model', 'kind'), **made
    )
    self._lengths = prometheus.Histogram(
      'input_tokens', 'Tokens of each input.', ('model',), buckets=summary.BOUNDS, **made
    )
    self._unknown = prometheus.Counter(
      'unknown_tokens', 'Tokens read that stand for what has none.', ('model',), **made
    )
    self._predictions = prometheus.Counter(
      'predictions', 'Classes, and tags, that were answered.', ('model', 'class'), **made
    )
    self._loads = prometheus.Counter(
      'loads', 'Models that were loaded in the place of others.', ('model', 'result'), **made
    )
    self._registry.register(self)

  @staticmethod
  def warming() -> contextlib.AbstractContextManager[None]:
    """What this thread compiles meanwhile is not counted: it is before anything is asked of it."""
    return _COMPILED.expected()

  def answered(self, asked: Asked, status: int) -> None:
    """Counts an answer."""
    self._requests.labels(asked.route, str(status)).inc()
    self._seconds.labels(asked.route, asked.model).observe(time.monotonic() - asked.since)

  def refused(self, reason: str) -> None:
    """Counts a request that is not answered, for a reason of which there are few."""
    self._refused.labels(reason).inc()

  def read(self, model: Served, asked: Asked, inputs: Iterable[Sequence[int]]) -> None:
    """Counts the ids of inputs."""
    for ids in inputs:
      self._lengths.labels(model.name).observe(len(ids))
      asked.read += len(ids)
      self._tokens.labels(model.name, 'read').inc(len(ids))
      unknown = np.count_nonzero(np.asarray(ids) == model.seen.unknown_id)
      self._unknown.labels(model.name).inc(int(unknown))

  def wrote(self, model: Served, asked: Asked, tokens: int) -> None:
    """Counts tokens that a model wrote."""
    asked.written += tokens
    self._tokens.labels(model.name, 'written').inc(tokens)

  def predicted(self, model: Served, answers: Iterable[Mapping[str, Any]]) -> None:
    """Counts the classes of answers."""
    for answer in answers if model.seen.classes else ():
      for name in summary.labels(answer):
        if name in model.seen.classes:
          self._predictions.labels(model.name, name).inc()

  def loaded(self, model: str, ok: bool) -> None:
    """Counts a model that was to take the place of the one of this name."""
    self._loads.labels(model, 'ok' if ok else 'failed').inc()

  def text(self) -> bytes:
    """All numbers, in the text format."""
    for model in list(self._models):  # what was never counted is 0, and not missing
      for name in model.seen.classes:
        self._predictions.labels(model.name, name)
      for result in ('ok', 'failed'):
        self._loads.labels(model.name, result)
    return prometheus.generate_latest(self._registry)

  def collect(self) -> Iterator[core.Metric]:
    """What is not counted but looked at."""
    yield _gauge('ready', 'Whether it answers.', (), [((), float(self.ready()))])
    yield _counter(
      'compiled_programs',
      'Programs that were compiled while it answered.',
      (),
      [((), _COMPILED.count - self._before)],
    )
    yield from _of_queues(list(self._models))
    yield from _of_training(list(self._models))


def _of_queues(models: Sequence[Served]) -> Iterator[core.Metric]:
  queues: list[tuple[tuple[str, str], Batches | Writer]] = []
  batches: list[tuple[tuple[str, str], Batches]] = []
  for model in models:
    kinds = {'embed': model.embeds, 'answer': model.answers, 'fill': model.fills}
    batches += [((model.name, kind), one) for kind, one in kinds.items() if one is not None]
    if model.writer is not None:
      queues.append(((model.name, 'write'), model.writer))
  queues += batches
  for name, about, value in (
    ('waiting', 'Requests that wait.', lambda queue: queue.waiting),
    ('waiting_limit', 'Requests that may wait.', lambda queue: queue.limit),
    ('oldest_waiting_seconds', 'How long the first has waited.', lambda queue: queue.oldest),
  ):
    yield _gauge(name, about, ('model', 'kind'), [(key, value(queue)) for key, queue in queues])
  for name, about, value in (
    ('batches', 'Batches that were read.', lambda batch: batch.batches),
    ('batch_items', 'Items of these batches.', lambda batch: batch.items),
  ):
    yield _counter(name, about, ('model', 'kind'), [(key, value(one)) for key, one in batches])
  most = [(key, one.most) for key, one in batches]
  yield _gauge(
    'batch_limit_items', 'Items for which a batch waits no longer.', ('model', 'kind'), most
  )
  writers = [((model.name,), model.writer) for model in models if model.writer is not None]
  rows = [(key, writer.rows) for key, writer in writers]
  yield _gauge('rows', 'Texts that are written at once, at most.', ('model',), rows)
  taken = [(key, writer.writing) for key, writer in writers]
  yield _gauge('rows_writing', 'Rows that are written.', ('model',), taken)


def _of_training(models: Sequence[Served]) -> Iterator[core.Metric]:
  known = [(model, found) for model in models if (found := model.seen.training) is not None]
  examples = [((model.name,), found.documents) for model, found in known]
  yield _gauge('training_examples', 'Examples of the training set.', ('model',), examples)
  lengths = [
    ((model.name, utils.floatToGoString(bound)), share)
    for model, found in known
    for bound, share in found.lengths.items()
  ]
  yield _gauge(
    'training_length_share',
    'The share of the training set that has at most le tokens.',
    ('model', 'le'),
    lengths,
  )
  unknown = [
    ((model.name,), found.unknown_share)
    for model, found in known
    if found.unknown_share is not None
  ]
  yield _gauge(
    'training_unknown_share',
    'The share of unknown tokens in the training set.',
    ('model',),
    unknown,
  )
  shares = [
    ((model.name, name), share) for model, found in known for name, share in found.classes.items()
  ]
  yield _gauge(
    'training_class_share',
    'The share of each class, or tag, in the training set.',
    ('model', 'class'),
    shares,
  )


def _gauge(
  name: str, about: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> core.Metric:
  family = core.GaugeMetricFamily(f'{PREFIX}_{name}', about, labels=labels)
  for key, value in values:
    family.add_metric(key, value)
  return family


def _counter(
  name: str, about: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> core.Metric:
  family = core.CounterMetricFamily(f'{PREFIX}_{name}', about, labels=labels)
  for key, value in values:
    family.add_metric(key, value)
  return family
