"""The JSON of answers, whole or as the events of a stream. chat.py has the shape of chats."""

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from serving.protocol.protocol import Choice, Usage
from serving.protocol.served_model import ServedModel


class Answer(ABC):
    """One request's answer. Subclasses have the shape of their endpoint."""

    ID_PREFIX: ClassVar[str]
    KIND: ClassVar[str]  # `object` of a whole answer
    PART_KIND: ClassVar[str]  # `object` of an event

    def __init__(self, model: ServedModel) -> None:
        self._id = f"{self.ID_PREFIX}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        return self._fields(self.KIND, [self._whole_choice(choice) for choice in choices], usage)

    def part(self, choice: Choice, usage: Usage | None) -> dict[str, Any]:
        """Returns an event; with the usage so far if `stream_options.continuous_usage_stats` asks for it."""
        return self._fields(self.PART_KIND, [self._part_choice(choice)], usage)

    def usage_part(self, usage: Usage) -> dict[str, Any]:
        """Returns the last event if `stream_options.include_usage` asks for one."""
        return self._fields(self.PART_KIND, [], usage)

    def _fields(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.version,
            "choices": choices,
            "usage": None if usage is None else usage.model_dump(),
        }

    @abstractmethod
    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        """Returns a choice of a whole answer."""

    @abstractmethod
    def _part_choice(self, choice: Choice) -> dict[str, Any]:
        """Returns a choice of an event."""


class TextAnswer(Answer):
    """The answer of POST /v1/completions."""

    ID_PREFIX, KIND, PART_KIND = "cmpl", "text_completion", "text_completion"

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return choice.model_dump()

    _part_choice = _whole_choice
