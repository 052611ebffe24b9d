"""Reads the calls of a text that arrives in pieces."""

from collections.abc import Mapping
from typing import Any

from serving.tools.call_parser import CallParser, Content
from serving.tools.formats import ToolFormat

Read = tuple[str, list[tuple[str, str]]]
"""The content, and of each call its name and its arguments."""


def read(
    tool_format: ToolFormat,
    pieces: list[str],
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    bound: bool = False,
) -> Read:
    """`bound` is a text that follows a grammar of these functions."""
    parser = CallParser(tool_format, parameters or {}, only_these=bound, at_start=bound)
    found = [piece for text in pieces for piece in parser.push(text)] + parser.finish()
    content = "".join(piece.text for piece in found if isinstance(piece, Content))
    calls: dict[int, list[str]] = {}
    for piece in found:
        if not isinstance(piece, Content):
            call = calls.setdefault(piece.index, ["", ""])
            call[0] += piece.name or ""
            call[1] += piece.arguments
    assert [*calls] == list(range(parser.num_calls))
    return content, [(name, arguments) for name, arguments in calls.values()]
