"""Spans of requests: whose trace, which times, and no text."""

import subprocess
import sys

import pytest
from opentelemetry import trace as otel
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from llm_jax.serving import app as apps
from llm_jax.serving import trace

THEIRS = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'  # of W3C's specification
SECRET = 'zq9-unheard-of'


@pytest.fixture
def traced(serving):
  """A client of a service, and its spans."""
  kept = InMemorySpanExporter()
  headers = {'Authorization': f'Bearer {serving.KEY}'}
  app = apps.create(serving.make(trace=trace.Trace(SimpleSpanProcessor(kept))))
  return TestClient(app, raise_server_exceptions=False, headers=headers), kept


def spans(kept):
  return {span.name: span for span in kept.get_finished_spans()}


def test_a_request_is_a_span_of_the_trace_that_asked(traced):
  client, kept = traced
  body = dict(model='writer', prompt=SECRET, max_tokens=3, min_tokens=3)
  client.post('/v1/completions', json=body, headers={'traceparent': THEIRS})
  found = spans(kept)
  whole, wait, run = found['POST /v1/completions'], found['wait'], found['run']
  assert f'{whole.context.trace_id:032x}' == THEIRS.split('-')[1]
  assert f'{whole.parent.span_id:016x}' == THEIRS.split('-')[2]
  assert whole.kind == otel.SpanKind.SERVER
  assert whole.attributes['gen_ai.request.model'] == 'writer'
  assert whole.attributes['gen_ai.usage.output_tokens'] == 3
  assert whole.attributes['gen_ai.usage.input_tokens'] > 0
  assert whole.attributes['http.response.status_code'] == 200
  assert wait.parent.span_id == run.parent.span_id == whole.context.span_id
  assert whole.start_time == wait.start_time <= wait.end_time == run.start_time < run.end_time
  assert run.end_time == whole.end_time
  assert SECRET not in ' '.join(span.to_json() for span in kept.get_finished_spans())


def test_a_request_alone_begins_a_trace_and_probes_have_none(traced):
  client, kept = traced
  for path in ('/health', '/ready', '/metrics'):
    client.get(path)
  assert not kept.get_finished_spans()
  client.post('/classify', json={'inputs': ['a']})
  client.post('/classify', json={'inputs': 3})
  whole, refused = (s for s in kept.get_finished_spans() if s.name == 'POST /classify')
  assert whole.parent is None and whole.attributes['gen_ai.usage.input_tokens'] == 1
  assert refused.attributes['http.response.status_code'] == 400
  assert refused.status.status_code == otel.StatusCode.UNSET  # the client's fault
  assert whole.context.trace_id != refused.context.trace_id
  assert len([s for s in kept.get_finished_spans() if s.name == 'run']) == 1


def test_a_defect_is_an_error(traced, serving, monkeypatch):
  client, kept = traced

  def fails(texts):
    raise RuntimeError(f'cannot read {texts}')

  monkeypatch.setattr(serving.models['reader'].answers, '_run', fails)
  assert client.post('/classify', json={'inputs': [SECRET]}).status_code == 500
  span = spans(kept)['POST /classify']
  assert span.status.status_code == otel.StatusCode.ERROR and not span.events
  assert SECRET not in span.to_json()


def test_an_address_that_is_none():
  with pytest.raises(ValueError, match='http://HOST:4318/v1/traces'):
    trace.to('collector:4317')


@pytest.mark.slow
def test_nothing_is_imported_that_nobody_asked_for():
  code = 'import sys; import llm_jax.serving.app, llm_jax.modes.serve; '
  code += 'assert not [name for name in sys.modules if "opentelemetry" in name]'
  subprocess.run([sys.executable, '-c', code], check=True)
