"""Splits a stream of bytes into lines, csv records or stretches of text, with only the current one
in memory.

A range [start, end) owns what begins in it, so the ranges of a file, read by different workers,
together give each line and each stretch once. A long text is cut into pieces, which bounds the
encoder's memory.
"""

import re
from collections import deque
from collections.abc import Iterator
from enum import Enum, auto
from typing import BinaryIO, NamedTuple

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
_BLANK = re.compile(rb"[ \t]")

_LINE_END = re.compile(rb"\r\n?|\n")

_QUOTED = rb'(?:[^"]++|"")*+'
_CLOSING = _QUOTED + rb'"[ \t]*+(?=[,\r\n]|\Z)'
_FIELD = rb'(?:"' + _CLOSING + rb'|[^",\r\n][^,\r\n]*+|)'
_FIELDS = re.compile(_FIELD + rb"(?:[,\r\n]" + _FIELD + rb")*+")
_FIELDS_AFTER_QUOTE = re.compile(_CLOSING + rb"(?:[,\r\n]" + _FIELD + rb")*+")
"""Fields as Python's `csv` reads them: a quote counts only at a field's front, elsewhere it is text
(5" of rain). Unlike there, only blanks may follow a closing quote; anything else shows that it
closes the wrong quote."""

_OPEN_FIELD = re.compile(rb'[,\r\n]?"' + _QUOTED + rb"\Z")
_STILL_OPEN = re.compile(_QUOTED + rb"\Z")


def lines(
    file: BinaryIO, start: int = 0, end: int | None = None, *, limit: int
) -> Iterator[tuple[int, bytes, bool]]:
    """Yields (offset, line, whole) of each line that begins in [start, end); only the front of one
    over `limit`."""
    position = start
    if start:
        file.seek(start - 1)  # the line feed before a line that begins at `start`
        position += _skip_line(file) - 1
    while end is None or position < end:
        line = file.readline(limit)
        if not line:
            return
        offset, position = position, position + len(line)
        is_whole = len(line) < limit or line.endswith(b"\n")
        if not is_whole:
            position += _skip_line(file)
        yield offset, line, is_whole


def _skip_line(file: BinaryIO) -> int:
    """Skips to the next line and returns the number of bytes skipped."""
    skipped = 0
    while rest := file.readline(_BLOCK_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def csv_lines(file: BinaryIO, *, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """Yields (offset, line, whole) of each line, whether it ends with LF, CR or both; only the
    front of one that has `limit` bytes before its end."""
    # What begins at `offset`; the line whose front was given
    offset, rest, is_skipped = 0, b"", False
    while piece := file.readline(_BLOCK_BYTES):
        if (
            not rest
            and len(piece) < limit
            and piece.endswith(b"\n")
            and piece.find(b"\r", 0, -2) < 0
            and not is_skipped
        ):
            yield offset, piece, True  # as nearly every line is
            offset += len(piece)
            continue
        searched, rest = max(0, len(rest) - 1), rest + piece
        is_settled = rest.endswith(b"\n")  # a CR at the end of a block may be half of a line end
        position = 0
        for found in _LINE_END.finditer(rest, searched, len(rest) - (not is_settled)):
            if not is_skipped:
                yield _fitting(offset + position, rest[position : found.end()], limit)
            position, is_skipped = found.end(), False
        offset, rest = offset + position, rest[position:]
        if len(rest) > limit and not is_skipped:
            yield _fitting(offset, rest, limit)
            is_skipped = True
        if is_skipped and len(rest) > 1:  # a last CR is still needed
            offset, rest = offset + len(rest) - 1, rest[-1:]
    if rest and not is_skipped:
        yield _fitting(offset, rest, limit)


def _fitting(offset: int, line: bytes, limit: int) -> tuple[int, bytes, bool]:
    is_whole = len(line.rstrip(b"\r\n")) < limit
    return offset, line if is_whole else line[:limit], is_whole


class _Quotes(Enum):
    CLOSED = auto()
    OPEN = auto()  # the line ends within a quoted field
    STRAY = auto()  # text follows a closing quote


class Record(NamedTuple):
    """A row of a csv file, or what is no row."""

    offset: int
    content: bytes
    is_whole: bool
    # No earlier record was judged by what this one holds: reading may as well begin here
    is_fresh: bool


def records(file: BinaryIO, *, limit: int) -> Iterator[Record]:
    """Yields each csv record (RFC 4180, with any line ends): lines up to one that closes all
    quotes.

    A quote that is not closed within `limit` bytes, or whose closing quote text follows, is taken
    for a stray one: its line alone is yielded as not whole, and the next line begins a record. Only
    the front of a line over `limit` bytes is yielded.
    """
    fresh, again = csv_lines(file, limit=limit), deque[tuple[int, bytes, bool]]()
    held: list[tuple[int, bytes, bool]] = []  # the record's lines so far
    state = _Quotes.CLOSED
    again_until = alone_until = 0  # lines are read twice, never a third time: then each is a record
    while (found := again.popleft() if again else next(fresh, None)) or held:
        if found is not None:
            held.append(found)
            offset, line, is_whole = found
            state = _after(line if offset else line.removeprefix(BYTE_ORDER_MARK), state)
            start = held[0][0]
            if is_whole and state is _Quotes.CLOSED:
                yield Record(
                    start, b"".join(line for _, line, _ in held), True, start >= again_until
                )
                held = []
                continue
            size = offset + len(line) - start
            if is_whole and state is _Quotes.OPEN and size < limit and start >= alone_until:
                continue
        (start, first, _), *rest = held
        yield Record(start, first, False, start >= again_until)
        if start < again_until:
            alone_until = again_until
        if rest:
            again_until = max(again_until, rest[-1][0] + len(rest[-1][1]))
            again.extendleft(reversed(rest))
        held, state = [], _Quotes.CLOSED


def _after(line: bytes, before: _Quotes) -> _Quotes:
    """Returns the state of the quotes after the line; `before` is the state before it."""
    if b'"' not in line:
        return before
    fields, rest = (
        (_FIELDS_AFTER_QUOTE, _STILL_OPEN) if before is _Quotes.OPEN else (_FIELDS, _OPEN_FIELD)
    )
    found = fields.match(line)
    if found is not None and found.end() == len(line):
        return _Quotes.CLOSED
    if rest.match(line) if found is None else _OPEN_FIELD.match(line, found.end()):
        return _Quotes.OPEN
    return _Quotes.STRAY


def cut_stream(
    file: BinaryIO, start: int, end: int | None, *, step: int, slack: int, front: bytes = b""
) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, text) of the stretches of a long text whose nominal start, a multiple of
    `step`, is in the range.

    The real border is the first line end in the `slack` bytes after the nominal one, or else a
    blank, or else the border of a UTF-8 character. It depends only on those bytes, so any range
    finds it alone. `front` holds the bytes that were already read where `start` is 0.
    """
    buffer, position = front, start
    if start:
        file.seek(start)
        buffer = file.read(slack)
        border = _border(buffer)
        buffer, position = buffer[border:], start + border
    nominal = start
    while end is None or nominal < end:
        nominal += step
        wanted = nominal + slack - position
        buffer += file.read(max(0, wanted - len(buffer)))
        if position + len(buffer) <= nominal:  # the text ends before the next border
            if buffer:
                yield position, buffer
            return
        size = nominal - position
        size += _border(buffer[size:wanted])
        yield position, buffer[:size]
        buffer, position = buffer[size:], position + size


def _border(window: bytes) -> int:
    """Returns the number of bytes of the window that belong to the stretch before it."""
    line_end = window.find(b"\n")
    if line_end >= 0:
        return line_end + 1
    if blank := _BLANK.search(window):
        return blank.start()
    end = len(window) - 1
    while end > 0 and window[end] & 0xC0 == 0x80:
        end -= 1
    return max(end, 0)


_PIECE_CHARS = 1 << 18
_BORDER = re.compile(r"(?<=[^\W\d_])(?=\s)")


def cut_text(text: str, *, piece_chars: int = _PIECE_CHARS) -> Iterator[str]:
    """Yields the text in pieces of `piece_chars` to twice as many.

    A piece ends where a blank follows a letter. The patterns of GPT-2's tokenizer and of its
    successors never join these two, so the pieces' ids, end to end, are the text's. Only a text
    without such a place is cut anywhere.
    """
    start = 0
    while len(text) - start > 2 * piece_chars:
        border = _BORDER.search(text, start + piece_chars, start + 2 * piece_chars)
        end = border.start() if border else start + 2 * piece_chars
        yield text[start:end]
        start = end
    yield text[start:]
