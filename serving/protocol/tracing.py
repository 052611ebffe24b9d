"""Traces by OpenTelemetry, where the environment names a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`).
Elsewhere spans record nothing.

The sampler, the resource and the exporter are configured by OpenTelemetry's own variables.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from model.tables import pip_line

Headers = list[tuple[bytes, bytes]]
Attributes = Mapping[str, Any]  # those that are None are left out

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_log = logging.getLogger(__name__)
_propagator = TraceContextTextMapPropagator()

NO_TRACER = trace.NoOpTracer()


class RequestSpan:
    """A span that has begun."""

    def __init__(
        self,
        tracer: trace.Tracer,
        name: str,
        parent: Context,
        *,
        kind: trace.SpanKind,
        attributes: Attributes,
    ) -> None:
        self._tracer = tracer
        self._span = tracer.start_span(
            name, context=parent, kind=kind, attributes=_given(attributes)
        )
        self._context = trace.set_span_in_context(self._span, parent)

    @classmethod
    def of_request(cls, tracer: trace.Tracer, name: str, headers: Headers) -> "RequestSpan":
        """Starts a process's part of the trace that the headers name, or a new trace."""
        if tracer is NO_TRACER and b"traceparent" not in dict(headers):
            return NO_SPAN
        carrier = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers}
        return cls(
            tracer, name, _propagator.extract(carrier), kind=trace.SpanKind.SERVER, attributes={}
        )

    @property
    def trace_id(self) -> str | None:
        """The trace that the span is part of; None if there is none."""
        context = self._span.get_span_context()
        return trace.format_trace_id(context.trace_id) if context.is_valid else None

    def child(self, name: str, attributes: Attributes) -> "RequestSpan":
        return RequestSpan(
            self._tracer, name, self._context, kind=trace.SpanKind.CLIENT, attributes=attributes
        )

    def forward(self, headers: Headers) -> Headers:
        """Returns headers for a request to the next process, which continue the trace there."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, self._context)
        kept = [header for header in headers if header[0] not in (b"traceparent", b"tracestate")]
        return [*kept, *((name.encode(), value.encode()) for name, value in carrier.items())]

    def stage(self, name: str, start_s: float | None, end_s: float | None) -> None:
        """Adds a child that is over, if it has taken place; times are of the monotonic clock."""
        if start_s is None or end_s is None:
            return
        zero_s = time.time() - time.monotonic()
        start_ns, end_ns = (int((zero_s + at_s) * 1e9) for at_s in (start_s, end_s))
        self._tracer.start_span(name, context=self._context, start_time=start_ns).end(end_ns)

    def end(self, attributes: Attributes, *, error: str | None = None) -> None:
        self._span.set_attributes(_given(attributes))
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end()


class NoSpan(RequestSpan):
    """The span of a request that belongs to no trace: OpenTelemetry would make contexts and
    carriers for nothing."""

    trace_id = None

    def __init__(self) -> None: ...

    def child(self, name: str, attributes: Attributes) -> RequestSpan:
        return self

    def forward(self, headers: Headers) -> Headers:
        return headers

    def stage(self, name: str, start_s: float | None, end_s: float | None) -> None: ...

    def end(self, attributes: Attributes, *, error: str | None = None) -> None: ...


NO_SPAN = NoSpan()


def tracer_from_environment(service: str) -> trace.Tracer:
    """Returns the tracer of this process, which is named `service` unless `OTEL_SERVICE_NAME` says
    otherwise."""
    asked = [name for name in _ENDPOINTS if os.environ.get(name)]
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not asked or is_off or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return NO_TRACER
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        _log.warning("%s is set, but traces need `%s`: %s", asked[0], pip_line("tracing"), error)
        return NO_TRACER
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    # Not the process's global provider, which belongs to Ray.
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("raymill")


def _given(attributes: Attributes) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
