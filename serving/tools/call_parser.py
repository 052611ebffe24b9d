"""Reads calls of tools out of a model's text as it arrives; what is no call is content."""

import json
import re
from dataclasses import dataclass
from enum import Enum, auto

from serving.tools.formats import PYTHON_TAG, ToolFormat

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
    """What the parser waits for."""

    CONTENT = auto()  # text, until a call opens
    HEADER = auto()  # a call's name, up to its arguments
    ARGUMENTS = auto()  # the end of their JSON
    END = auto()  # what stands between two calls, or after the last one
    PLAIN = auto()  # nothing: all that comes is content


class CallParser:
    """One choice's text. The pieces are the same however the text is cut, when joined."""

    def __init__(self, tool_format: ToolFormat) -> None:
        self._format = tool_format
        self._opens, self._closes = tool_format.opens.strip(), tool_format.closes.strip()
        self._at = _At.CONTENT
        self._rest = ""  # has arrived, and may still be either
        self._opened = ""  # of the rest, to be given back as content if it is no call
        self._depth, self._in_text, self._escaped = 0, False, False
        self._skips_blanks = False  # those that stand after a call
        self.num_calls = 0
        after = re.escape(tool_format.closes.strip())
        following = r"(,|\])" if tool_format.joins else after
        self._end = re.compile(rf'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}}\s*{following}')
        self._header = re.compile(
            r'\s*\[?\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
            rf'"{tool_format.arguments}"\s*:\s*(?=\{{)'
        )

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
        place = self._rest.find(self._opens)
        if place >= 0:
            text, self._rest = self._rest[:place].rstrip(), self._rest[place + len(self._opens) :]
            self._opened, self._at, self._skips_blanks = self._opens, _At.HEADER, False
            return [Content(text)] if text else []
        held = 0 if final else _length_of_start(self._rest, self._opens)
        text = self._rest[: len(self._rest) - held]
        text = text if final else text.rstrip()
        self._rest = self._rest[len(text) :]
        self._skips_blanks = self._skips_blanks and not text
        return [Content(text)] if text else []

    def _opens_with_brace(self, final: bool) -> list[Piece]:
        """Looks whether the whole answer is a call."""
        text = self._rest.lstrip()
        if text.startswith(PYTHON_TAG):
            self._rest = text.removeprefix(PYTHON_TAG)
        elif text.startswith("{"):
            self._at = _At.HEADER
        elif text and (final or not PYTHON_TAG.startswith(text)):
            self._at = _At.PLAIN
        return []

    def _name(self, final: bool) -> list[Piece]:
        found = self._header.match(self._rest)
        if found is not None:
            self._rest, self._opened = self._rest[found.end() :], ""
            self._depth, self._in_text, self._escaped = 0, False, False
            self._at = _At.ARGUMENTS
            self.num_calls += 1
            name = json.loads(found[1], strict=False)
            return [CallPiece(self.num_calls - 1, name, "")]
        if final or len(self._rest) > MAX_HEADER_CHARS or not _may_be_header(self._rest):
            self._rest, self._opened = self._opened + self._rest, ""
            self._at = _At.PLAIN
        return []

    def _arguments(self, final: bool) -> list[Piece]:
        """Takes the JSON object up to its closing brace."""
        for place, character in enumerate(self._rest):
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped = character == "\\"
                self._in_text = character != '"'
            elif character == '"':
                self._in_text = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if self._depth == 0:
                    text, self._rest = self._rest[: place + 1], self._rest[place + 1 :]
                    self._at = _At.END
                    return [CallPiece(self.num_calls - 1, None, text)]
        text, self._rest = self._rest, ""
        return [CallPiece(self.num_calls - 1, None, text)]

    def _after(self, final: bool) -> list[Piece]:
        """Drops what closes a call, and finds out whether another one follows."""
        found = self._end.match(self._rest)
        if found is not None:
            self._rest, self._skips_blanks = self._rest[found.end() :], True
            joined = bool(self._format.joins) and found[1] == ","
            self._at = _At.HEADER if joined else _At.CONTENT if self._opens else _At.PLAIN
        return []


def _length_of_start(text: str, mark: str) -> int:
    """Returns the length of the longest end of `text` with which `mark` starts."""
    lengths = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((length for length in lengths if mark.startswith(text[-length:])), 0)


def _may_be_header(text: str) -> bool:
    """Whether the first key of an object that may not have arrived whole is `name`."""
    key = re.sub(r"^\s*\[?\s*\{?\s*", "", text)
    return '"name"'.startswith(key[:6])
