"""Reads a trace of spot nodes: how many of them a cloud had for a run, and from when on."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from raymill.errors import UserError

HEADER = "seconds,nodes"
"""The first line of a trace that is no comment; the lines below it are two such numbers each."""

MAX_NODES = 10_000
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class SpotTrace:
    """The numbers of nodes that there were, and the seconds from which on."""

    changes: tuple[tuple[float, int], ...]  # (seconds, nodes), by time; the first one is at 0
    duration: float  # seconds: the last change, and what the last number of nodes is taken to last

    def intervals(self) -> Iterator[tuple[float, float, int]]:
        """Yields (start, end, nodes) of each stretch with one number of nodes, in seconds."""
        ends = [start for start, _ in self.changes[1:]] + [self.duration]
        for (start, nodes), end in zip(self.changes, ends, strict=True):
            yield start, end, nodes

    @property
    def node_seconds(self) -> float:
        """The seconds of all nodes together."""
        return math.fsum((end - start) * nodes for start, end, nodes in self.intervals())

    @property
    def mean_nodes(self) -> float:
        return self.node_seconds / self.duration

    @property
    def max_nodes(self) -> int:
        return max(nodes for _, nodes in self.changes)

    def compressed(self, factor: float) -> "SpotTrace":
        """Returns the same numbers of nodes in time that runs `factor` times as fast."""
        changes = tuple((seconds / factor, nodes) for seconds, nodes in self.changes)
        return SpotTrace(changes, self.duration / factor)


def read_trace(path: str) -> SpotTrace:
    """Returns the trace in a file of lines `seconds,nodes` below such a header; lines that begin
    with # are comments.

    The last number of nodes is taken to last as long as the shortest stretch between two lines,
    which is the tick of a trace that was sampled. A line may repeat the number before it. Raises
    `UserError` that says the line, and what was expected there.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path} is no file; expected a trace of lines {HEADER}")
    if file.stat().st_size > _MAX_BYTES:
        raise UserError(
            f"{path} has more than {_MAX_BYTES >> 20} MiB; expected a trace of {HEADER}"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: expected lines {HEADER}") from error
    rows = _rows(path, text)
    tick = min(after - before for (before, _), (after, _) in pairwise(rows))
    changes = [rows[0]]
    for row in rows[1:]:
        if row[1] != changes[-1][1]:
            changes.append(row)
    return SpotTrace(tuple(changes), rows[-1][0] + tick)


def _rows(path: str, text: str) -> list[tuple[float, int]]:
    """Returns the seconds and nodes of all lines: two at least, the first one at 0, in order."""
    rows: list[tuple[float, int]] = []
    below_header = False
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        if not below_header:
            if line.replace(" ", "") != HEADER:
                raise _unexpected(path, number, line, f"the header {HEADER}")
            below_header = True
            continue
        seconds, nodes = _row(path, number, line)
        if not rows and seconds != 0:
            raise _unexpected(path, number, line, "a first line at 0 seconds")
        if rows and seconds <= rows[-1][0]:
            raise _unexpected(path, number, line, f"more than {rows[-1][0]:g} seconds")
        rows.append((seconds, nodes))
    if len(rows) < 2:
        raise UserError(f"{path} has {len(rows)} lines of {HEADER}; expected two at least")
    return rows


def _row(path: str, number: int, line: str) -> tuple[float, int]:
    cells = [cell.strip() for cell in line.split(",")]
    expected = f"two numbers, {HEADER}, of them a whole number of nodes from 0 to {MAX_NODES:,}"
    try:
        seconds, nodes = float(cells[0]), int(cells[1])
    except (ValueError, IndexError) as error:
        raise _unexpected(path, number, line, expected) from error
    if len(cells) != 2 or not 0 <= seconds < math.inf or not 0 <= nodes <= MAX_NODES:
        raise _unexpected(path, number, line, expected)
    return seconds, nodes


def _unexpected(path: str, number: int, line: str, expected: str) -> UserError:
    return UserError(f"{path}, line {number}: {line[:80]!r} was read, expected {expected}")
