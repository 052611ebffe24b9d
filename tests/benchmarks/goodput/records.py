"""What a contender leaves of a run: its completed steps, the marks of its starts, and the nodes that
were there. Times are Unix time, in seconds."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Event(StrEnum):
    """The marks of a group's start, in order. Of several workers' marks the last one counts, but of
    `STARTED` the first."""

    STARTED = "started"  # a process of the new group began, or one that stays noticed the loss
    MET = "met"  # a worker is connected with all others
    LOADED = "loaded"  # a worker has the state to continue from


@dataclass(frozen=True)
class Mark:
    time_s: float
    event: Event


@dataclass(frozen=True)
class Step:
    """A step that a group completed, whether it stands or was taken again later."""

    time_s: float  # when it was complete
    number: int
    world_size: int  # the workers whose gradients are in it
    samples: tuple[int, ...]  # of all of them
    weights: str = ""  # the hash after the step, where it was taken


@dataclass(frozen=True)
class NodeCount:
    time_s: float  # from when on
    nodes: int


@dataclass(frozen=True)
class Record:
    """A contender's run. `steps` are in the order of time; `nodes` begins when the clock does."""

    steps: tuple[Step, ...]
    marks: tuple[Mark, ...]
    nodes: tuple[NodeCount, ...]
    end_s: float

    @property
    def start_s(self) -> float:
        return self.nodes[0].time_s


def write_mark(log: Path, event: Event, *, time_s: float | None = None) -> None:
    write_line(log, {"mark": event.value, "time": time_s or time.time()})


def write_step(
    log: Path, *, number: int, world_size: int, samples: Iterable[int], weights: str = ""
) -> None:
    line = {"time": time.time(), "step": number, "world_size": world_size}
    write_line(log, line | {"samples": list(samples), "weights": weights})


def write_line(log: Path, line: dict[str, Any]) -> None:
    """Appends at once: several processes may write into one log, as each line is short."""
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_log(log: Path) -> tuple[list[Step], list[Mark]]:
    """Returns what workers wrote into a log, in the order of time."""
    lines = read_lines(log)
    marks = [Mark(line["time"], Event(line["mark"])) for line in lines if "mark" in line]
    steps = [
        Step(
            line["time"], line["step"], line["world_size"], tuple(line["samples"]), line["weights"]
        )
        for line in lines
        if "step" in line
    ]
    return steps, marks


def read_lines(log: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a log by time; a killed process may leave a part of one."""
    if not log.exists():
        return []
    lines = []
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return sorted(lines, key=lambda line: line["time"])
