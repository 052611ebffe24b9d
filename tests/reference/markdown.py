"""Markdown as the reference needs it: tables, and texts that stand in their cells."""

import ast
from collections.abc import Iterable, Sequence

MADE = "<!-- Made from the code by `make reference`. Change the declaration there, not this page. -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table with an empty line behind it."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def cell(text: str) -> str:
    """Returns a text that may stand in a cell as it is."""
    words = " ".join(text.split())
    for mark in ("|", "<", "*"):
        words = words.replace(mark, f"\\{mark}")
    return words


def listed(*words: str) -> str:
    """Returns the words that are not empty, in one cell."""
    return ", ".join(word for word in words if word)


def code(text: str) -> str:
    """Returns a text in the letters of code, for a cell."""
    words = " ".join(text.split()).replace("|", "\\|")
    return f"`{words}`" if words else ""


def sentence(text: str) -> str:
    """Returns a text that begins with a capital letter, unless it begins with a name in code."""
    words = " ".join(text.split())
    begin = words.partition(" ")[0]
    is_name = any(mark in begin for mark in "`=._/") or begin[1:].lower() != begin[1:]
    return words if is_name else words[:1].upper() + words[1:]


def template(node: ast.expr) -> str:
    """Returns a message as the code has it, with `…` where a value is put in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(template, values))
        case ast.BinOp(left=left, right=right):
            return template(left) + template(right)
    return "…"
