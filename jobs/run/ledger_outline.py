"""Takes from a run's ledger what a new attempt asks, fast and in little memory: it may have a line
for a million steps.

Events say how the run went. Of the steps between two of them the last line is enough, as steps
follow one another until an event, a `start`, begins some of them again.
"""

from collections.abc import Collection, Iterable, Iterator

from jobs.run.ledger import Ledger, Line, parsed_line, void

MEASUREMENTS = ("phases", "layers", "validation")
"""Events of which a run has thousands, and which decide nothing."""

_KEY = b'"event"'  # of every event's line, and of no step's
# As `LedgerWriter` begins their lines
_SKIPPED = tuple(f'{{"event": "{name}"'.encode() for name in MEASUREMENTS)


class LedgerOutline:
    """A ledger's events but its measurements, and the last line of each stretch of steps between
    two of them.

    A damaged line is found where it is one of these, and else by whoever reads the whole ledger, as
    each launch does.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.num_bytes = self._num_lines = 0  # so far
        self._lines: list[Line] = []

    def add(self, blocks: Iterable[bytes]) -> Ledger:
        """Takes what follows, in blocks of whole lines; returns the outline of all so far.

        Raises `UserError` for a damaged line.
        """
        # The last line of a stretch of steps so far, and its number
        waiting: tuple[bytes, int] | None = None
        for block in blocks:
            counted = 0  # bytes of the block whose lines are counted
            for start, line in _outlined(block):
                self._num_lines += block.count(b"\n", counted, start)
                counted = start
                if _KEY not in line:
                    waiting = line, self._num_lines + 1
                    continue
                if waiting:
                    self._keep(*waiting)
                    waiting = None
                self._keep(line, self._num_lines + 1)
            self._num_lines += block.count(b"\n", counted)
            self.num_bytes += len(block)
        if waiting:
            self._keep(*waiting)
        return Ledger(list(self._lines))

    def _keep(self, line: bytes, number: int) -> None:
        kept = parsed_line(line, self._uri, number)
        if "event" not in kept and self._lines and "event" not in self._lines[-1]:
            self._lines.pop()
        self._lines.append(kept)


def last_step(outline: Ledger) -> int:
    """Returns the last step that counts, 0 without one: where a rollback left it out, the one
    before its window."""
    step = _last_with(outline, (None,))
    for first, last in sorted(outline.rollbacks, reverse=True):
        if first <= step <= last:
            step = first - 1
    return step


def last_recorded(outline: Ledger) -> int:
    """Returns the last step of which a line says what came of it, 0 without one."""
    return _last_with(outline, (None, "skip"))


def _last_with(outline: Ledger, events: Collection[str | None]) -> int:
    """Returns the last step that has one of these events, or a line without any; where the run went
    back, the step to which, if there was none since."""
    step = 0
    for line in outline.lines:
        if line.get("event") in events:
            step = max(step, line["step"])
        for way in void([line]):
            step = min(step, way.to_step)
    return step


def _outlined(block: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields each line to keep of a block, with the place where it begins; found without looking at
    the others."""
    start = 0
    while start < len(block):
        key = block.find(_KEY, start)
        event = len(block) if key < 0 else max(start, block.rfind(b"\n", start, key) + 1)
        if event > start:
            last = max(start, block.rfind(b"\n", start, event - 1) + 1)
            yield last, block[last : event - 1]
        if key < 0:
            return
        end = block.index(b"\n", key)
        if not block.startswith(_SKIPPED, event):
            yield event, block[event:end]
        start = end + 1
