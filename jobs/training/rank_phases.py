"""Gathers the time by phase of every rank every few steps, and finds the rank that holds the others
up."""

import statistics
from dataclasses import dataclass
from typing import Any

from raymill.phases import PHASES, REST
from raymill.step_timer import StepTime
from raymill.workers.worker_group import WorkerGroup

WINDOW_STEPS = 10

STRAGGLER_RATIO = 1.3
"""A rank is a straggler above this ratio of its time for a lane to the ranks' median."""

_WORK = ("load", "forward", "loss", "backward")
_NAMES = (*PHASES, REST)


@dataclass(frozen=True)
class RankTime:
    """The mean step of one rank over a window."""

    seconds: dict[str, float]  # by phase
    num_lanes: float
    processor_s: float | None = None  # while it computed (`StepTime`)

    @property
    def lane_s(self) -> float:
        """Seconds of work on one lane, in which nothing waits for another rank: what waits for
        weights or for room in the exchange, within a pass, is `sync`."""
        return sum(self.seconds.get(name, 0.0) for name in _WORK) / max(1.0, self.num_lanes)


def stragglers(ranks: list[RankTime]) -> dict[int, float]:
    """Returns the ranks that are too slow, and how many times the median each takes for a lane.

    With an even number of ranks the median is the lower middle one, so that one of two ranks can be
    slow.
    """
    median_s = statistics.median_low([rank.lane_s for rank in ranks])
    if not median_s:
        return {}
    return {
        number: ratio
        for number, rank in enumerate(ranks)
        if (ratio := rank.lane_s / median_s) > STRAGGLER_RATIO
    }


class RankPhases:
    """Gathers the means of all ranks' steps, a hundred bytes a window."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._slow: set[int] = set()  # in the last window
        self._named: set[int] = set()
        self._window: list[StepTime] = []

    def add(self, time: StepTime) -> None:
        """Adds a step of this rank."""
        self._window.append(time)

    def close_window(self) -> list[RankTime]:
        """Returns the ranks in the window that ends with the last step; all ranks call this
        together."""
        window, self._window = _without_compilation(self._window), []
        seconds = [
            statistics.fmean(step.seconds.get(name, 0.0) for step in window) for name in _NAMES
        ]
        processor_s = [step.processor_s for step in window if step.processor_s is not None]
        row = (
            seconds,
            statistics.fmean(step.num_lanes for step in window),
            statistics.fmean(processor_s) if processor_s else None,
        )
        return [
            RankTime(dict(zip(_NAMES, means, strict=True)), num_lanes, its_processor_s)
            for means, num_lanes, its_processor_s in self._group.gather(row)
        ]

    def new_stragglers(self, ranks: list[RankTime]) -> dict[int, float]:
        """Returns the ranks that are slow in a second window in a row, as one may be noise; each
        once while it stays slow."""
        found = stragglers(ranks)
        lasting = found.keys() & self._slow
        new = lasting - self._named
        self._slow, self._named = set(found), lasting
        return {number: found[number] for number in new}


def _without_compilation(window: list[StepTime]) -> list[StepTime]:
    """Returns the steps in which nothing was compiled, which one rank may do alone: all, if there
    are no such steps."""
    usual = [step for step in window if not step.num_compiled]
    return usual or window


def as_fields(ranks: list[RankTime]) -> dict[str, Any]:
    """Returns the fields of the ledger's event `phases`."""
    processor_s = [round(s, 6) for rank in ranks if (s := rank.processor_s) is not None]
    return {
        "ranks": [
            {name: round(value, 6) for name, value in rank.seconds.items() if value}
            for rank in ranks
        ],
        "lanes": [rank.num_lanes for rank in ranks],
        **({"processor_s": processor_s} if len(processor_s) == len(ranks) else {}),
    }


def from_fields(fields: dict[str, Any]) -> list[RankTime]:
    """Reverses `as_fields`."""
    ranks, lanes = fields["ranks"], fields["lanes"]
    processor_s = fields.get("processor_s", [None] * len(ranks))
    return [RankTime(*row) for row in zip(ranks, lanes, processor_s, strict=True)]
