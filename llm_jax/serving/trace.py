"""Spans of requests for OpenTelemetry: what was asked for, by whose trace, and when; never a text.

A request that came with W3C's `traceparent` (https://www.w3.org/TR/trace-context) continues that
trace. Names follow OpenTelemetry's conventions for HTTP servers and for generative models.
"""

import time
from collections.abc import Iterable

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llm_jax.serving.watch import Asked

NAME = 'llm_jax'
FAILED = 500  # statuses from here on are errors of the service


class Trace:
  """Makes a span of each request once it is answered.

  Args:
    processor: takes the spans.
  """

  def __init__(self, processor: SpanProcessor):
    self._provider = TracerProvider(resource=Resource.create({'service.name': NAME}))
    self._provider.add_span_processor(processor)
    self._tracer = self._provider.get_tracer(NAME)
    self._context = TraceContextTextMapPropagator()

  def answered(self, asked: Asked, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Makes the span of a request, and below it one of its waiting and one of its running."""
    epoch = time.time_ns() - time.monotonic_ns()
    since, end = epoch + int(asked.since * 1e9), time.time_ns()
    given = {name.decode('latin-1'): value.decode('latin-1') for name, value in headers}
    span = self._tracer.start_span(
      f'{asked.method} {asked.route}',
      self._context.extract(given),
      trace.SpanKind.SERVER,
      {
        'http.request.method': asked.method,
        'http.route': asked.route,
        'http.response.status_code': status,
        'gen_ai.request.model': asked.model,
        'gen_ai.usage.input_tokens': asked.read,
        'gen_ai.usage.output_tokens': asked.written,
      },
      start_time=since,
    )
    if status >= FAILED:
      span.set_status(trace.StatusCode.ERROR)
    if asked.begun is not None:
      begun = epoch + int(asked.begun * 1e9)
      below = trace.set_span_in_context(span)
      for name, start, stop in (('wait', since, begun), ('run', begun, end)):
        self._tracer.start_span(name, below, start_time=start).end(stop)
    span.end(end)

  def close(self) -> None:
    """Sends what is not yet sent."""
    self._provider.shutdown()


def to(url: str) -> Trace:
  """Spans to a collector, by OTLP over HTTP, in a thread of their own.

  Args:
    url: http://collector:4318/v1/traces, say.

  Raises:
    ValueError: an address of another kind.
  """
  if not url.startswith(('http://', 'https://')):
    raise ValueError(f'--trace={url} must be an address: http://HOST:4318/v1/traces.')
  return Trace(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
