"""How far a stage is, on standard error: a bar at a terminal, a line every few seconds when piped."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console

_LINE_INTERVAL_S = 5.0


def say(text: str) -> None:
    """One line for the person who watches; standard output is for results."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def progress(label: str, *, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the bytes that were just finished."""
    if sys.stderr.isatty():
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(label, total=total_bytes)
            yield lambda num_bytes: bars.advance(task, num_bytes)
        return
    lines = _Lines(label, total_bytes)
    yield lines.advance
    lines.show()


class _Lines:
    def __init__(self, label: str, total_bytes: int) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._start_s = self._shown_s = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if time.monotonic() - self._shown_s >= _LINE_INTERVAL_S:
            self.show()

    def show(self) -> None:
        self._shown_s = time.monotonic()
        elapsed_s = self._shown_s - self._start_s
        done, total = self._done_bytes / 1e6, self._total_bytes / 1e6
        say(f"{self._label}: {done:.1f} of {total:.1f} MB in {elapsed_s:.1f} s")
