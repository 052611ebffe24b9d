"""A request's spans are one trace through all processes, with or without the client's part of
it."""

import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from serving.protocol.tracing import RequestSpan


@pytest.mark.parametrize("client", [None, "5a" * 16])
def test_spans_of_two_processes_are_one_trace(client: str | None) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    proxy, replica = provider.get_tracer("proxy"), provider.get_tracer("replica")
    headers = (
        [] if client is None else [(b"traceparent", f"00-{client}-00f067aa0ba902b7-01".encode())]
    )
    asked = RequestSpan.of_request(proxy, "POST", [*headers, (b"host", b"x")])
    attempt = asked.child("attempt", {"number": 1, "unknown": None})
    forwarded = attempt.forward([*headers, (b"host", b"x")])
    answered = RequestSpan.of_request(replica, "replica", forwarded)
    answered.stage("queue", time.monotonic() - 2, time.monotonic() - 1)
    answered.stage("decode", time.monotonic(), None)  # has not taken place
    answered.end({})
    attempt.end({}, error="the replica ended")
    asked.end({"status": 500})

    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert [name for name, _ in forwarded] == [b"host", b"traceparent"]
    assert {name: span.parent and span.parent.span_id for name, span in spans.items()} == {
        "POST": client and 0x00F067AA0BA902B7,
        "attempt": spans["POST"].context.span_id,
        "replica": spans["attempt"].context.span_id,
        "queue": spans["replica"].context.span_id,
    }
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {asked.trace_id}
    assert client in (None, asked.trace_id)
    assert dict(spans["attempt"].attributes) == {"number": 1}
    assert spans["attempt"].status.status_code is StatusCode.ERROR and dict(
        spans["POST"].attributes
    ) == {"status": 500}
    assert 0.99 < (spans["queue"].end_time - spans["queue"].start_time) / 1e9 < 1.01
