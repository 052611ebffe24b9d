"""Results as people read them: one value per line, aligned columns, numbers with four digits, times
with a date.

Text from outside, such as a corpus or a model's, is printed as characters that no terminal obeys.
"""

import os
import signal
import stat
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from raymill.errors import UserError


def put(text: str, stream: TextIO | None = None) -> None:
    """Writes at once, `printable` for a terminal. Exits if the reader is gone; raises `UserError`
    for a full disk."""
    stream = stream or sys.stdout
    try:
        stream.write(printable(text) if stream.isatty() else text)
        stream.flush()
    except OSError as error:
        forget(stream)
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise UserError(
            f"cannot write the output: {error.strerror}; free some room, or send it elsewhere"
        ) from None


def forget(stream: TextIO) -> None:
    """Lets go of a stream that takes nothing any more: Python writes what is left when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def forget_closed_terminal() -> None:
    """Lets go of a terminal that is gone: each further line would be an error. Other outputs stay."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # one without a descriptor, such as a test's
            is_device = stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
            if is_device and not os.isatty(stream.fileno()):
                forget(stream)


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each value; nested values stand below their name, indented, with empty
    lines between them."""
    width = max(map(len, result), default=0)
    for name, value in result.items():
        inner = value if isinstance(value, list) else [value]
        if inner and all(isinstance(item, dict) for item in inner):
            yield printable(name, keep="")
            for number, item in enumerate(inner):
                if number and len(item) > 1:
                    yield ""
                yield from (f"  {line}" for line in lines(item))
        else:
            yield f"{printable(name, keep=''):{width}}  {text_of(value)}"


def table(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns lines with the names and, below them, the rows' values in aligned columns; missing
    ones stay empty. Without rows there are no lines."""
    if not rows:
        return ""
    cells = [list(names), *([text_of(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    padded = (
        "  ".join(f"{word:{width}}" for word, width in zip(line, widths, strict=True))
        for line in cells
    )
    return "".join(f"{line.rstrip()}\n" for line in padded)


def text_of(value: Any) -> str:
    """Returns a value as text; fractions get four digits here, and all of them with --json."""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text_of, value)) or "none"
    return "-" if value is None else printable(str(value), keep="")


def counted(number: int, noun: str) -> str:
    """Returns a number of things, such as `1 worker` and `2 workers`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def date_of(seconds: float) -> str:
    """Returns a Unix time in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""Returns the text with unprintable characters as escapes such as `\x1b`, except blanks and
    those in `keep`: no ESC moves the cursor or sets the clipboard, and no bidirectional mark
    reverses a line."""
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in keep or unicodedata.category(char) == "Zs"
        else char.encode("unicode_escape").decode()
        for char in text
    )
