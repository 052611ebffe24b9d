"""Where one line, csv record or stretch of text ends in a stream of bytes; nothing is held but the one at hand.

A range [start, end) owns what begins in it, so the ranges of a file, read by different workers, together give each
line and each stretch once. A long text is cut into pieces, so that the encoder's memory is bounded.
"""

import io
import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import BinaryIO

_BLOCK_BYTES = 1 << 20
_BLANK = re.compile(rb"[ \t]")

_QUOTED = rb'(?:[^"]++|"")*+'
_CLOSING = _QUOTED + rb'"[ \t]*+(?=[,\r\n]|\Z)'
_FIELD = rb'(?:"' + _CLOSING + rb'|[^",\r\n][^,\r\n]*+|)'
_FIELDS = re.compile(_FIELD + rb"(?:[,\r\n]" + _FIELD + rb")*+")
_FIELDS_AFTER_QUOTE = re.compile(_CLOSING + rb"(?:[,\r\n]" + _FIELD + rb")*+")
"""Fields as Python's `csv` reads them: a quote is one at a field's front only, elsewhere a character (5" of rain).
Unlike there, only blanks may follow a closing quote: more shows that it closes another one than it should."""

_OPEN_FIELD = re.compile(rb'[,\r\n]?"' + _QUOTED + rb"\Z")
_STILL_OPEN = re.compile(_QUOTED + rb"\Z")


def lines(file: BinaryIO, start: int = 0, end: int | None = None, *, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """(offset, line, whole) of each line that begins in [start, end); of one over `limit` bytes only its front."""
    position = start
    if start:
        file.seek(start - 1)  # a line that begins at `start` has its line feed there
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
    """Bytes up to the next line, which are passed over."""
    skipped = 0
    while rest := file.readline(_BLOCK_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


class _Quotes(Enum):
    CLOSED = auto()
    OPEN = auto()  # the line ends within a quoted field
    STRAY = auto()  # text follows a closing quote


def records(file: BinaryIO, *, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """(offset, record, whole) of each csv record (RFC 4180): lines up to one that closes all quotes.

    After `limit` bytes without that, or where text follows a closing quote, the quote is taken for a stray one: its
    line alone is given as not whole, and the next line begins a record. Of a line over `limit` bytes only the front is
    given.
    """
    sources = [lines(file, limit=limit)]  # below the last one: what follows the lines that are read again
    record, start, front, state = bytearray(), 0, 0, _Quotes.CLOSED  # `front`: bytes of its first line
    again_until = alone_until = 0  # lines are read a second time, and not a third: then each is a record
    while sources or record:
        found = next(sources[-1], None) if sources else None
        if found is not None:
            offset, line, is_whole = found
            if not record:
                start, front = offset, len(line)
            record += line
            state = _after(line, state)
            if is_whole and state is _Quotes.CLOSED:
                yield start, bytes(record), True
                record = bytearray()
                continue
            if is_whole and state is _Quotes.OPEN and len(record) < limit and start >= alone_until:
                continue
        elif sources:
            sources.pop()
            continue
        yield start, bytes(record[:front]), False
        if start < again_until:
            alone_until = again_until
        if rest := record[front:]:
            again_until = start + len(record)
            sources.append(_moved(lines(io.BytesIO(rest), limit=limit), start + front))
        record, state = bytearray(), _Quotes.CLOSED


def _moved(found: Iterator[tuple[int, bytes, bool]], by: int) -> Iterator[tuple[int, bytes, bool]]:
    return ((by + offset, line, is_whole) for offset, line, is_whole in found)


def _after(line: bytes, before: _Quotes) -> _Quotes:
    """How the line leaves the quotes, and `before` how it finds them."""
    if b'"' not in line:
        return before
    fields, rest = (_FIELDS_AFTER_QUOTE, _STILL_OPEN) if before is _Quotes.OPEN else (_FIELDS, _OPEN_FIELD)
    found = fields.match(line)
    if found is not None and found.end() == len(line):
        return _Quotes.CLOSED
    if rest.match(line) if found is None else _OPEN_FIELD.match(line, found.end()):
        return _Quotes.OPEN
    # Where CR ends the lines, this one is many: they are read as they come, rather than lost together.
    return _Quotes.CLOSED if b"\r" in line.rstrip(b"\r\n") else _Quotes.STRAY


def cut_stream(
    file: BinaryIO, start: int, end: int | None, *, step: int, slack: int, front: bytes = b""
) -> Iterator[tuple[int, bytes]]:
    """(offset, text) of a long text's stretches whose nominal place, a multiple of `step`, lies in [start, end).

    The real border is the first line end in the `slack` bytes after the nominal one, or else a blank, or else the
    border of a UTF-8 character: it depends on those bytes only, so any range finds it alone. `front` are the bytes
    that were read already from `start` = 0 on.
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
    """Bytes of the window that still belong to the stretch before it."""
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
    """The text in pieces of `piece_chars` to twice as many.

    A piece ends where a letter is followed by a blank. The patterns of GPT-2's tokenizer and of its followers never
    join these two, so the pieces' ids, end to end, are the text's. Only a text without such a place is cut anywhere.
    """
    start = 0
    while len(text) - start > 2 * piece_chars:
        border = _BORDER.search(text, start + piece_chars, start + 2 * piece_chars)
        end = border.start() if border else start + 2 * piece_chars
        yield text[start:end]
        start = end
    yield text[start:]
