"""Text that others wrote, such as a corpus or a model, as characters that no terminal obeys."""

import unicodedata


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
