"""Results as people read them: a line a value, aligned columns, numbers with four digits, times with a date.

Text that others wrote, such as a corpus or a model, goes out as characters that no terminal obeys.
"""

import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A line a value; what is nested stands below its name, indented, with an empty line between its parts."""
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


def table(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The names, and below them the rows' values in aligned columns; a value that a row lacks is left out."""
    cells = [list(names), *([text_of(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        yield "  ".join(f"{word:{width}}" for word, width in zip(line, widths, strict=True)).rstrip()


def text_of(value: Any) -> str:
    """Numbers that are not whole have four digits; --json has all of them."""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(text_of, value)) or "none"
    return "-" if value is None else printable(str(value), keep="")


def date_of(seconds: float) -> str:
    """A Unix time as this machine's clocks show it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def printable(text: str, *, keep: str = "\n\t") -> str:
    r"""Returns the text with whatever is not printable, but for blanks and the characters of `keep`, as `\x1b`.

    So no ESC moves the cursor or sets the clipboard, and no bidirectional mark turns a line around.
    """
    if text.isprintable():
        return text
    return "".join(char if _is_shown(char) or char in keep else _escaped(char) for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
