"""A long text in pieces that are encoded one by one, so that the encoder's memory is bounded."""

import re
from collections.abc import Iterator

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
