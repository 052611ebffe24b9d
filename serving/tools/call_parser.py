"""Reads calls of tools out of a model's text as it arrives; what is no call is content."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from serving.tools.arguments import ArgumentReader, length_of_start
from serving.tools.formats import NO_PARAMETERS, PYTHON_TAG, ToolFormat

MAX_HEADER_CHARS = 2048  # up to a call's arguments; what has none until then is content


@dataclass(frozen=True)
class Content:
    """A piece of the text that is no call."""

    text: str


@dataclass(frozen=True)
class CallPiece:
    """The beginning of a call, which has its `name`, or a further piece of its arguments' JSON."""

    index: int  # among the calls of the answer
    name: str | None
    arguments: str


Piece = Content | CallPiece


class _At(Enum):
    """The state of the parser."""

    CONTENT = auto()  # text, until a call opens
    HEADER = auto()  # a call's name, up to its arguments
    ARGUMENTS = auto()  # the end of their JSON
    END = auto()  # what stands between two calls, or after the last one
    PLAIN = auto()  # nothing: all that comes is content


class CallParser:
    """One choice's text. The pieces are the same however the text is cut, when joined."""

    def __init__(
        self,
        tool_format: ToolFormat,
        parameters: Mapping[str, Mapping[str, Any]],
        *,
        only_these: bool = False,
        at_start: bool = False,
    ) -> None:
        """`parameters` has each function's JSON Schema, by its name. With `only_these`, what calls
        another one is content; with `at_start`, so is all of a text that does not begin with a
        call."""
        self._format, self._parameters = tool_format, parameters
        self._only_these, self._at_start = only_these, at_start
        self._opens = tool_format.opens.strip()
        self._at = _At.CONTENT
        self._rest = ""  # has arrived, and may still be either
        self._opened = ""  # of the rest, to be given back as content if it is no call
        self._reader: ArgumentReader  # of the call that is being read
        self._skips_blanks = False  # those that stand after a call
        self.num_calls = 0
        after = re.escape(tool_format.closes.strip())
        following = r"(,|\])" if tool_format.list_closes else rf"\s*{after}"
        self._end = re.compile(tool_format.tail + following)
        self._header = re.compile(tool_format.header)

    def push(self, text: str) -> list[Piece]:
        """Returns what the text makes final."""
        self._rest += text
        return self._read(final=False)

    def finish(self) -> list[Piece]:
        """Returns the rest of a text that has ended."""
        pieces = self._read(final=True)
        kept = self._opened + self._rest
        if self._at is _At.END:
            kept = re.sub(r"^\s*\}?\s*", "", kept)
        self._rest = self._opened = ""
        return [*pieces, Content(kept)] if kept else pieces

    def _read(self, *, final: bool) -> list[Piece]:
        pieces: list[Piece] = []
        steps = {
            _At.CONTENT: self._content,
            _At.HEADER: self._name,
            _At.ARGUMENTS: self._arguments,
            _At.END: self._after,
        }
        while self._rest and self._at is not _At.PLAIN:
            before = self._at, self._rest
            pieces += steps[self._at](final)
            if before == (self._at, self._rest):
                break
        self._skip_blanks()
        if self._at is _At.PLAIN and self._rest:
            pieces.append(Content(self._rest))
            self._rest, self._skips_blanks = "", False
        return pieces

    def _skip_blanks(self) -> None:
        if self._skips_blanks and self._at in (_At.CONTENT, _At.PLAIN):
            self._rest = self._rest.lstrip()

    def _content(self, final: bool) -> list[Piece]:
        """Finds where calls open, and gives the text before it without the blanks between."""
        if not self._opens:
            return self._opens_with_brace(final)
        self._skip_blanks()
        if self._at_start and not self.num_calls and not self._may_open():
            self._at = _At.PLAIN
            return []
        place = self._rest.find(self._opens)
        if place >= 0:
            text, self._rest = self._rest[:place].rstrip(), self._rest[place + len(self._opens) :]
            self._opened, self._at, self._skips_blanks = self._opens, _At.HEADER, False
            return [Content(text)] if text else []
        held = 0 if final else length_of_start(self._rest, self._opens)
        text = self._rest[: len(self._rest) - held]
        text = text if final else text.rstrip()
        self._rest = self._rest[len(text) :]
        self._skips_blanks = self._skips_blanks and not text
        return [Content(text)] if text else []

    def _may_open(self) -> bool:
        """Whether the rest, which may not have arrived whole, begins with what opens calls."""
        begins = self._rest.lstrip()
        return begins.startswith(self._opens) or self._opens.startswith(begins)

    def _opens_with_brace(self, final: bool) -> list[Piece]:
        """Looks whether the whole answer is a call, or another one follows."""
        text = self._rest.lstrip(" \t\r\n;" if self.num_calls else None)
        if text.startswith(PYTHON_TAG):
            self._rest = text.removeprefix(PYTHON_TAG)
        elif text.startswith("{"):
            place = self._rest.index("{")
            self._opened, self._rest, self._at = self._rest[:place], text, _At.HEADER
        elif text and (final or not PYTHON_TAG.startswith(text)):
            self._at = _At.PLAIN
        return []

    def _name(self, final: bool) -> list[Piece]:
        found = self._header.match(self._rest)
        if found is not None:
            name = found["name"]
            name = json.loads(name, strict=False) if name.startswith('"') else name
        if found is not None and not (self._only_these and name not in self._parameters):
            self._rest, self._opened = self._rest[found.end() :], ""
            self._at = _At.ARGUMENTS
            self.num_calls += 1
            self._reader = self._format.reader(self._parameters.get(name, NO_PARAMETERS))
            return [CallPiece(self.num_calls - 1, name, "")]
        is_whole = final or found is not None or len(self._rest) > MAX_HEADER_CHARS
        if is_whole or not self._may_be_header():
            self._rest, self._opened = self._opened + self._rest, ""
            self._at = _At.PLAIN
        return []

    def _arguments(self, final: bool) -> list[Piece]:
        arguments, self._rest, has_ended = self._reader.read(self._rest)
        if has_ended:
            self._at = _At.END
        return [CallPiece(self.num_calls - 1, None, arguments)] if arguments else []

    def _may_be_header(self) -> bool:
        """Whether the rest, which may not have arrived whole, begins as a header does."""
        begins = re.sub(r"^[\s\[{]*", "", self._rest)
        key = self._format.key
        return key.startswith(begins[: len(key)])

    def _after(self, final: bool) -> list[Piece]:
        """Drops what closes a call, and finds out whether another one follows."""
        found = self._end.match(self._rest)
        if found is not None:
            self._rest, self._skips_blanks = self._rest[found.end() :], True
            joined = bool(self._format.list_closes) and found[1] == ","
            self._at = _At.HEADER if joined else _At.CONTENT
        return []
