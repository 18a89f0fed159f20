"""Numbers of the service for Prometheus, at `/metrics`."""

from collections.abc import Sequence

import prometheus_client as prometheus

from llm_jax.serving.served import Served

PREFIX = 'llm_jax'
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Watch:
  """Counts what is asked and answered; each service has its own registry.

  Args:
    models: whose queues are looked at when somebody reads the numbers.
  """

  def __init__(self, models: Sequence[Served]):
    self._registry = registry = prometheus.CollectorRegistry()
    self._requests = prometheus.Counter(
      f'{PREFIX}_requests', 'Answers, by route and status.', ('route', 'status'), registry=registry
    )
    self._seconds = prometheus.Histogram(
      f'{PREFIX}_request_seconds',
      'From the request to the end of its answer.',
      ('route',),
      buckets=SECONDS,
      registry=registry,
    )
    self._tokens = prometheus.Counter(
      f'{PREFIX}_tokens', 'Tokens, read and written.', ('model', 'kind'), registry=registry
    )
    waiting = prometheus.Gauge(
      f'{PREFIX}_waiting', 'Requests that wait.', ('model', 'kind'), registry=registry
    )
    rows = prometheus.Gauge(
      f'{PREFIX}_rows_writing', 'Rows that are written.', ('model',), registry=registry
    )
    for model in models:
      kinds = {'embed': model.embeds, 'answer': model.answers, 'fill': model.fills}
      kinds |= {'write': model.writer}
      for kind, queue in kinds.items():
        if queue is not None:
          waiting.labels(model.name, kind).set_function(lambda queue=queue: queue.waiting)
      if model.writer is not None:
        rows.labels(model.name).set_function(lambda writer=model.writer: writer.writing)

  def answered(self, route: str, status: int, seconds: float) -> None:
    """Counts an answer."""
    self._requests.labels(route, str(status)).inc()
    self._seconds.labels(route).observe(seconds)

  def counted(self, model: str, read: int, written: int) -> None:
    """Counts tokens."""
    self._tokens.labels(model, 'read').inc(read)
    self._tokens.labels(model, 'written').inc(written)

  def text(self) -> bytes:
    """All numbers, in the text format."""
    return prometheus.generate_latest(self._registry)
