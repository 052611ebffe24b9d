"""Chains a ledger: each line has the SHA-256 of the one before. So a line that was changed, removed,
added or moved shows at its place.

Who rewrites all lines behind it can make a chain of their own: a signature of its head is what
proves the lines to somebody else (Haber and Stornetta, How to time-stamp a digital document, 1991).
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from model.files.strict_json import with_unique_names

KEY = "prev"
"""The field of the hash, in hexadecimal, of the line before; null in a ledger's first line."""


def encoded(line: dict[str, Any], head: str | None) -> bytes:
    """Returns the line as it is written behind the one with the hash `head`, without its end."""
    return json.dumps({**line, KEY: head}).encode()


def hash_of(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def head_of(content: bytes) -> str | None:
    """Returns the hash of the last whole line; None where there is none."""
    lines = content[: content.rfind(b"\n") + 1]
    start = lines.rfind(b"\n", 0, max(0, len(lines) - 1)) + 1
    return hash_of(lines[start:-1]) if lines else None


@dataclass(frozen=True)
class Chain:
    """The links between the lines of a ledger."""

    num_lines: int
    first: int | None  # number of the first line that is chained; None where none is
    head: str | None  # the hash of the last line
    problems: tuple[str, ...] = ()  # where a line does not follow the one before, and why

    @property
    def summary(self) -> str:
        """In words, where there is no problem."""
        return f"all {self.num_lines} lines of the ledger follow one another"


def chain_of(lines: Iterable[bytes]) -> Chain:
    """Checks that each line follows the one before. Lines from before a run's first chained line
    are counted, and the first chained one vouches for the last of them."""
    numbers: dict[str, int] = {}  # of the lines so far, by their hashes
    problems: list[str] = []
    first: int | None = None
    head: str | None = None
    number = 0
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line, object_pairs_hook=with_unique_names)
        except ValueError as error:
            problems.append(f"line {number} is not as raymill writes it: {error}")
            fields = json.loads(line)
        if KEY in fields:
            first = number if first is None else first
            if fields[KEY] != head:
                problems.append(_broken(number, fields[KEY], numbers))
        elif first is not None:
            problems.append(
                f"line {number} names no line before it: raymill did not write it there"
            )
        head = hash_of(line)
        numbers[head] = number
    if number and first != 1:
        front = f"lines 1 to {first - 1} have" if first else "it has"
        problems.append(
            f"{front} no chain: an earlier version of raymill wrote them, or somebody took it off; nothing shows that "
            "they are what was written"
        )
    return Chain(number, first, head, tuple(problems))


def _broken(number: int, named: str | None, numbers: dict[str, int]) -> str:
    if named is None:
        return f"line {number} is the first of a ledger: what stands before it is another's"
    if named in numbers:
        return f"line {number} was written behind line {numbers[named]}: what stands between was not there"
    if number == 1:
        return f"line 1 was written behind another line ({named[:12]}…): the ledger's beginning is missing"
    return (
        f"line {number} was written behind another line ({named[:12]}…) than line {number - 1}: "
        "that one was changed, or lines between them are missing or moved"
    )
