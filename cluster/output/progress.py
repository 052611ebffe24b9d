"""Progress of a stage: stages report in marked lines, and watchers draw bars at a terminal or print
lines."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cluster.output.result_text import forget, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_MARK = "raymill-progress: "
_NEWS = "raymill-news: "
_REPORT_INTERVAL_S = 1.0
_LINE_INTERVAL_S = 10.0
# Columns of a terminal that has room for these beside labels and whole notes, of which no word is cut
_WIDTH_OF_TIMES, _WIDTH_OF_BARS = 80, 120

# Ray's own lines: those of its processes and its dated log lines. They go to the log file only,
# except the last line of a worker's traceback, which says what happened.
_RAY_LINE = re.compile(
    r"\((\w+ pid=|\w+:.* pid=|pid=|raylet\b|autoscaler\b)"
    # Its C++ parts, which call many harmless things an error
    r"|\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] "
    r"|(INFO )?\d{4}-\d\d-\d\d [\d:,]+\s(INFO|WARNING|serve )|Running entrypoint for job "
    r"|\*\*\* SIGTERM received at "  # with the stack of a process that was asked to end, and does
)
_WORKER_ERROR = re.compile(r"\(RayTrainWorker.*?\) (\w+\.)*\w*(Error|Exception): ")


@dataclass(frozen=True)
class Report:
    """Progress of `done` out of `total` units, with a short note."""

    label: str
    done: float
    total: float
    unit: str
    note: str


def say(text: str) -> None:
    """Prints a line for the person who watches; standard output is for results."""
    try:
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()
    except OSError:  # a full disk, or a terminal that was closed: no reason to end
        forget(sys.stderr)


def say_from_worker(text: str) -> None:
    """Prints a line of a worker for the person who watches, to whom Ray's other lines of workers
    are not shown."""
    say(f"{_NEWS}{text}")


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Says at once what is being done; at a terminal the line counts the seconds of the context."""
    if not sys.stderr.isatty():
        say(what)
        yield
        return
    from rich.console import Console  # noqa: PLC0415 (only a terminal shows any)
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as line:
        task = line.add_task(what, total=None)
        yield
        line.update(task, total=1, completed=1)


_views: list["ProgressView"] = []  # at most one, which shows this process's own reports


@contextmanager
def reports_shown() -> Iterator[None]:
    """Shows this process's own reports while the context lasts, not as marked lines for a
    watcher."""
    with ProgressView() as view:
        _views.append(view)
        try:
            yield
        finally:
            _views.remove(view)


def report_progress(label: str, *, done: float, total: float, unit: str, note: str = "") -> None:
    """Reports a stage's progress, which a `ProgressView` shows."""
    line = _MARK + json.dumps(asdict(Report(label, done, total, unit, note)))
    for view in _views:
        view.line(line)
    if not _views:
        say(line)


@contextmanager
def progress(label: str, *, total: float, unit: str = "MB") -> Iterator[Callable[[float], None]]:
    """Gives a function to call with the number of units just finished."""
    done, reported = 0.0, time.monotonic()

    def show() -> None:
        report_progress(label, done=round(done, 2), total=round(total, 2), unit=unit)

    def advance(amount: float) -> None:
        nonlocal done, reported
        done += amount
        if time.monotonic() - reported >= _REPORT_INTERVAL_S:
            reported = time.monotonic()
            show()

    yield advance
    show()


class RayFilter:
    """Tells Ray's own lines from a stage's."""

    def __init__(self) -> None:
        self._in_block = False

    def shown(self, text: str) -> str | None:
        """Returns what a person sees of the line, None for nothing."""
        return None if self._hides(text) else text.rpartition(_NEWS)[2]

    def _hides(self, text: str) -> bool:
        goes_on = not text or text[0] in " \t" or text.startswith("PC: @")
        self._in_block = bool(_RAY_LINE.match(text)) or (self._in_block and goes_on)
        is_told = _NEWS in text or bool(_WORKER_ERROR.match(text))
        return self._in_block and not is_told


class PlainProgress:
    """A stage's log without bars: reports become a line now and then, everything else stays."""

    def __init__(self) -> None:
        self._printed_at: dict[str, float] = {}

    def line(self, text: str) -> str | None:
        """Returns the text for a line of the log, or None for a report soon after the last one."""
        report = _report(text)
        if report is None:
            return text
        now, is_done = time.monotonic(), report.done >= report.total
        if (
            not is_done
            and now - self._printed_at.get(report.label, -_LINE_INTERVAL_S) < _LINE_INTERVAL_S
        ):
            return None
        self._printed_at[report.label] = now
        note = f", {report.note}" if report.note else ""
        return f"{report.label}: {report.done:g} of {report.total:g} {report.unit}{note}"


class ProgressView:
    """Shows a stage's log as it comes: its own lines, and its reports as bars at a terminal or as a
    line now and then. All of it, with Ray's lines, is kept in the file `log` if given. `waiting` is
    shown until the first line comes."""

    def __init__(self, log: Path = Path(os.devnull), *, waiting: str = "") -> None:
        self.log = log
        self._waiting, self._until_first_line = waiting, ExitStack()
        self._bars = _new_bars() if sys.stderr.isatty() else None
        self._tasks: dict[str, TaskID] = {}
        self._plain = PlainProgress()
        self._rays = RayFilter()

    def __enter__(self) -> Self:
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.log.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            self._give_up_log(error)
        if self._waiting:
            self._until_first_line.enter_context(doing(self._waiting))
        return self

    def __exit__(self, *failure: object) -> None:
        self._until_first_line.close()
        if self._bars is not None:
            self._bars.stop()
        with suppress(OSError):  # what a full disk did not take
            self._file.close()

    def keep(self, text: str) -> None:
        """Writes a line to the file alone. One that cannot be written is given up, and no reason to
        end."""
        try:
            self._file.write(f"{text}\n")
        except OSError as error:
            with suppress(OSError):
                self._file.close()
            self._give_up_log(error)

    def _give_up_log(self, error: OSError) -> None:
        self._show(f"this log is not kept from here on: {self.log}: {error.strerror}")
        self._file = Path(os.devnull).open("a", encoding="utf-8")  # noqa: SIM115 (closed on exit)

    def line(self, text: str) -> None:
        """Shows one line of a stage's log."""
        report = _report(text)
        shown: str | None = text
        if report is None:
            self.keep(text)
            shown = self._rays.shown(text)
        if shown is None:
            return
        self._until_first_line.close()
        if self._bars is not None and report is not None:
            self._draw(self._bars, report)
        elif (line := self._plain.line(shown)) is not None:
            self._show(line)

    def _show(self, text: str) -> None:
        if self._bars is None:
            say(text)
        else:
            if self._tasks and self._bars.finished:  # they stand above what comes after them
                self._bars.stop()
                self._bars, self._tasks = _new_bars(), {}
            self._bars.console.print(printable(text), markup=False, highlight=False)

    def _draw(self, bars: "Progress", report: Report) -> None:
        if report.label not in self._tasks:
            bars.start()  # not before: without a bar it would keep painting an empty line
            self._tasks[report.label] = bars.add_task(
                report.label, total=report.total, unit="", note=""
            )
        bars.update(
            self._tasks[report.label], completed=report.done, unit=report.unit, note=report.note
        )


def _new_bars() -> "Progress":
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.table import Column  # noqa: PLC0415

    console = Console(stderr=True)
    label = TextColumn("{task.description:>12}", table_column=Column(no_wrap=True))
    amount = TextColumn(
        "{task.completed:g} of {task.total:g} {task.fields[unit]}",
        table_column=Column(no_wrap=True),
    )
    note = TextColumn("{task.fields[note]}", table_column=Column(overflow="fold"))
    if console.width < _WIDTH_OF_TIMES:
        return Progress(label, amount, note, console=console)
    bars = [BarColumn()] if console.width >= _WIDTH_OF_BARS else []
    return Progress(label, *bars, amount, TimeRemainingColumn(), note, console=console)


def _report(line: str) -> Report | None:
    """Returns the report in a marked line; None for another line, and for one that is cut."""
    if not line.startswith(_MARK):
        return None
    try:
        return Report(**json.loads(line[len(_MARK) :]))
    except (ValueError, TypeError):
        return None
