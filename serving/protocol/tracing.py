"""Traces by OpenTelemetry, where the environment names a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`). Elsewhere nothing
is imported, and spans do nothing.

The sampler, the resource and the exporter are configured by OpenTelemetry's own variables.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

Headers = list[tuple[bytes, bytes]]
Attributes = Mapping[str, Any]  # those that are None are left out

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_log = logging.getLogger(__name__)


class Span:
    """A span that is not recorded."""

    trace_id: str | None = None

    def child(self, name: str, attributes: Attributes) -> "Span":
        return self

    def forward(self, headers: Headers) -> Headers:
        """Returns headers for a request to the next process, which continue the trace there."""
        return headers

    def stage(self, name: str, start_s: float | None, end_s: float | None) -> None:
        """Adds a child that is over, if it has taken place; times are of the monotonic clock."""

    def end(self, attributes: Attributes, *, error: str | None = None) -> None:
        """Ends the span."""


class Tracing:
    """Starts spans; here, such that are not recorded."""

    def start(self, name: str, headers: Headers) -> Span:
        """Starts a process's part of the trace that the headers name, or a new trace."""
        return Span()


def tracing_from_environment(service: str) -> Tracing:
    """Returns the tracing of this process, which is named `service` unless `OTEL_SERVICE_NAME` says otherwise."""
    asked = [name for name in _ENDPOINTS if os.environ.get(name)]
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not asked or is_off or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return Tracing()
    try:
        return _OpenTelemetry(service)
    except ImportError as error:
        _log.warning("%s is set, but traces need `pip install raymill[tracing]`: %s", asked[0], error)
        return Tracing()


class _OpenTelemetry(Tracing):
    def __init__(self, service: str) -> None:
        """Raises `ImportError` without the packages."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
        # Not the process's global provider, which belongs to Ray.
        provider = TracerProvider(resource=Resource.create(named))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self.tracer = provider.get_tracer("raymill")
        self.propagator = TraceContextTextMapPropagator()

    def start(self, name: str, headers: Headers) -> Span:
        carrier = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers}
        return _RecordedSpan(self, name, self.propagator.extract(carrier), kind="SERVER", attributes={})


class _RecordedSpan(Span):
    def __init__(self, tracing: _OpenTelemetry, name: str, parent: Any, *, kind: str, attributes: Attributes) -> None:
        from opentelemetry import trace  # noqa: PLC0415

        self._trace, self._tracing = trace, tracing
        self._span = tracing.tracer.start_span(
            name, context=parent, kind=trace.SpanKind[kind], attributes=_given(attributes)
        )
        self._context = trace.set_span_in_context(self._span, parent)
        self.trace_id = trace.format_trace_id(self._span.get_span_context().trace_id)

    def child(self, name: str, attributes: Attributes) -> Span:
        return _RecordedSpan(self._tracing, name, self._context, kind="CLIENT", attributes=attributes)

    def forward(self, headers: Headers) -> Headers:
        carrier: dict[str, str] = {}
        self._tracing.propagator.inject(carrier, self._context)
        kept = [header for header in headers if header[0] not in (b"traceparent", b"tracestate")]
        return [*kept, *((name.encode(), value.encode()) for name, value in carrier.items())]

    def stage(self, name: str, start_s: float | None, end_s: float | None) -> None:
        if start_s is None or end_s is None:
            return
        zero_s = time.time() - time.monotonic()
        start_ns, end_ns = (int((zero_s + at_s) * 1e9) for at_s in (start_s, end_s))
        self._tracing.tracer.start_span(name, context=self._context, start_time=start_ns).end(end_ns)

    def end(self, attributes: Attributes, *, error: str | None = None) -> None:
        self._span.set_attributes(_given(attributes))
        if error is not None:
            self._span.set_status(self._trace.StatusCode.ERROR, error)
        self._span.end()


def _given(attributes: Attributes) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
