"""The output of a response as it comes: its items, and the events by which a stream tells them."""

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Event = dict[str, Any]
"""An event of a stream but for its number."""
Logprobs = Sequence[dict[str, Any]]
ItemStatus = Literal["completed", "incomplete"]


class _Message:
    """A message that is being written."""

    def __init__(self, place: int) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._in_output = {"output_index": place}
        self._in_item = {"item_id": self._id, "output_index": place, "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def opened(self) -> Iterator[Event]:
        yield _event("output_item.added", self._in_output, item=self._shown("in_progress", []))
        yield _event("content_part.added", self._in_item, part=self._part)

    def more(self, text: str, logprobs: Logprobs) -> Iterator[Event]:
        self._texts.append(text)
        self._logprobs += logprobs
        if text or logprobs:
            yield _event("output_text.delta", self._in_item, delta=text, logprobs=logprobs)

    def closed(self, status: ItemStatus) -> Iterator[Event]:
        part = self._part
        told = {"text": part["text"], "logprobs": part["logprobs"]}
        yield _event("output_text.done", self._in_item, **told)
        yield _event("content_part.done", self._in_item, part=part)
        yield _event("output_item.done", self._in_output, item=self.item(status))

    def item(self, status: ItemStatus) -> dict[str, Any]:
        return self._shown(status, [self._part])

    @property
    def _part(self) -> dict[str, Any]:
        text = "".join(self._texts)
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": [*self._logprobs],
        }

    def _shown(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }


class _Call:
    """A call that is being written."""

    def __init__(self, place: int, name: str, call_id: str) -> None:
        self._id = f"fc_{uuid.uuid4().hex}"
        self._in_output = {"output_index": place}
        self._in_item = {"item_id": self._id, "output_index": place}
        self._name, self._call_id = name, call_id
        self._arguments: list[str] = []

    def opened(self) -> Iterator[Event]:
        yield _event("output_item.added", self._in_output, item=self._shown("in_progress"))

    def more(self, arguments: str) -> Iterator[Event]:
        self._arguments.append(arguments)
        yield _event("function_call_arguments.delta", self._in_item, delta=arguments)

    def closed(self, status: ItemStatus) -> Iterator[Event]:
        told = {"name": self._name, "arguments": "".join(self._arguments)}
        yield _event("function_call_arguments.done", self._in_item, **told)
        yield _event("output_item.done", self._in_output, item=self.item(status))

    def item(self, status: ItemStatus) -> dict[str, Any]:
        return self._shown(status)

    def _shown(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }


class Output:
    """The items of one answer, of which the last one may be open."""

    def __init__(self) -> None:
        self._closed: list[dict[str, Any]] = []
        self._open: _Message | _Call | None = None

    def text(self, text: str, logprobs: Logprobs) -> Iterator[Event]:
        """Adds to the message that is open, or opens one."""
        if not isinstance(self._open, _Message):
            yield from self.close("completed")
            self._open = _Message(len(self._closed))
            yield from self._open.opened()
        yield from self._open.more(text, logprobs)

    def call(self, name: str, call_id: str) -> Iterator[Event]:
        """Opens a call."""
        yield from self.close("completed")
        self._open = _Call(len(self._closed), name, call_id)
        yield from self._open.opened()

    def arguments(self, arguments: str) -> Iterator[Event]:
        """Adds to the call that is open."""
        assert isinstance(self._open, _Call)
        yield from self._open.more(arguments)

    def close(self, status: ItemStatus) -> Iterator[Event]:
        """Closes what is open, if anything."""
        if self._open is not None:
            yield from self._open.closed(status)
            self._closed.append(self._open.item(status))
            self._open = None

    @property
    def takes_text(self) -> bool:
        """Whether a last piece of text has its place: in the message that is open, or in the only
        one."""
        return isinstance(self._open, _Message) or not self.items

    @property
    def items(self) -> list[dict[str, Any]]:
        """The output so far; an item that is open is incomplete."""
        return [*self._closed, *([] if self._open is None else [self._open.item("incomplete")])]


def _event(kind: str, place: dict[str, Any], **content: Any) -> Event:
    return {"type": f"response.{kind}", **place, **content}
