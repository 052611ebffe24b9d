"""A collector for OpenTelemetry's traces on loopback, which decodes what it gets and keeps it."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Seen:
    """One span."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    is_error: bool
    attributes: dict[str, Any]


class Collector:
    def __init__(self) -> None:
        self.spans: list[Seen] = []

    def take(self, data: bytes) -> None:
        for of_process in ExportTraceServiceRequest.FromString(data).resource_spans:
            [service] = [
                a.value.string_value
                for a in of_process.resource.attributes
                if a.key == "service.name"
            ]
            for scope in of_process.scope_spans:
                self.spans += [_seen(service, span) for span in scope.spans]

    def of(self, trace_id: str) -> list[Seen]:
        """The spans of a trace, in order of their starts."""
        return sorted(
            (span for span in self.spans if span.trace_id == trace_id),
            key=lambda span: span.start_ns,
        )


def _seen(service: str, span: Any) -> Seen:
    values = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    times = (span.start_time_unix_nano, span.end_time_unix_nano)
    return Seen(service, span.name, *ids, *times, is_error=span.status.code == 2, attributes=values)


@contextmanager
def collector() -> Iterator[tuple[str, Collector]]:
    """Gives its address, and what it gets."""
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            assert (
                self.path == "/v1/traces"
                and self.headers["content-type"] == "application/x-protobuf"
            )
            kept.take(
                gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data
            )
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
