"""What a finished or growing generation becomes in JSON; chat.py has the other implementation."""

import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol, Self

from serving.protocol.protocol import Choice, Usage


class Answer(Protocol):
    """The shape of one endpoint's answers."""

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]: ...

    def part(self, choice: Choice, usage: Usage | None) -> dict[str, Any]:
        """An event of a stream, with the usage so far where `stream_options.continuous_usage_stats` asked for it."""

    def usage_part(self, usage: Usage) -> dict[str, Any]:
        """Its last event, where `stream_options.include_usage` asked for one."""


@dataclass(frozen=True)
class AnswerHead:
    """What all events of an answer have in common."""

    id: str
    created: int  # unix seconds
    model: str
    system_fingerprint: str  # the model's version

    @classmethod
    def new(cls, prefix: str, *, model: str, version: str) -> Self:
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, version)

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


@dataclass(frozen=True)
class TextAnswer:
    """`Answer` of POST /v1/completions."""

    head: AnswerHead

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        return self._fields([choice.model_dump() for choice in choices], usage.model_dump())

    def part(self, choice: Choice, usage: Usage | None) -> dict[str, Any]:
        return self._fields([choice.model_dump()], None if usage is None else usage.model_dump())

    def usage_part(self, usage: Usage) -> dict[str, Any]:
        return self._fields([], usage.model_dump())

    def _fields(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return self.head.fields("text_completion") | {"choices": choices, "usage": usage}
