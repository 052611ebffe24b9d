"""Facts about a request that its client does not see: for the request log and for
traces."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from serving.protocol.tracing import NO_SPAN, RequestSpan

# In an ASGI message's dictionary, which Ray Serve hands on to the proxy as it is
FACTS = "raymill.facts"


@dataclass
class RequestFacts:
    """Filled in while the request is worked on. Times are of the monotonic clock."""

    key: str | None = None  # name of the API key
    model_version: str | None = None
    stream: bool | None = None
    reason: str | None = None  # finish reasons, or an error's code
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    queued_s: float | None = None  # when the engine's queue had it
    begun_s: float | None = None  # when the engine began with it
    first_token_s: float | None = None
    last_token_s: float | None = None

    def shown(self) -> dict[str, Any]:
        """Returns the replica's part of a line of the request log."""
        return {
            "key": self.key,
            "model_version": self.model_version,
            "stream": self.stream,
            "reason": self.reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_s": _seconds(self.queued_s, self.begun_s),
            "first_token_s": _seconds(self.arrived_s, self.first_token_s),
        }

    def trace(self, span: RequestSpan) -> None:
        """Ends the replica's span, with the engine's work as its stages."""
        if span is NO_SPAN:
            return
        span.stage("queue", self.queued_s, self.begun_s)
        span.stage("prefill", self.begun_s, self.first_token_s)
        span.stage("decode", self.first_token_s, self.last_token_s)
        span.end(
            {
                "gen_ai.usage.input_tokens": self.prompt_tokens,
                "gen_ai.usage.output_tokens": self.completion_tokens,
                "raymill.key": self.key,
                "raymill.model_version": self.model_version,
                "raymill.reason": self.reason,
            }
        )


def timestamp(unix_s: float) -> str:
    """Returns a time as logs have it."""
    return (
        datetime.fromtimestamp(unix_s, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def _seconds(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else round(end_s - start_s, 4)
