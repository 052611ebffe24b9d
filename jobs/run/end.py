"""The ends of an attempt at a run, and the consequences of each."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from cluster.stages.stage_module import HOPELESS, MAY_SUCCEED, OVER_BUDGET


class End(StrEnum):
    """The end of an attempt. All but the last one end the run's stage too, with a line of the ledger
    whose event is the value.

    A worker that is lost, or left out since it computed wrong, ends an attempt by an exception: Ray
    Train and the meetings of workers act on nothing else.
    """

    FINISHED = "finish"  # the run's last step is taken and stored
    STOPPED = "preempted"  # a person, or the plan of a replay, wants no more steps for now
    SPENT = "spent"  # it has cost what `scaling.max_cost` allows, and is saved
    GAVE_UP = "gave_up"  # another attempt would end likewise, until somebody changes something
    WENT_BACK = "went_back"  # the same workers continue from an earlier state


FORGOTTEN = "forgotten"
"""The event behind the lines that a run has from another one, without some of whose documents it is
trained."""

EXIT_CODES = {
    End.FINISHED: 0,
    End.STOPPED: MAY_SUCCEED,
    End.SPENT: OVER_BUDGET,
    End.GAVE_UP: HOPELESS,
}
"""The exit code of the stage, from which follow the state of its job and whether it is repeated."""


def is_stop(line: Mapping[str, Any]) -> bool:
    """Reports whether the run was saved because somebody had asked it to stop, by Ctrl-C or
    `raymill stop`."""
    return line.get("event") == End.STOPPED and line["notice"] == "stop"


def is_pause(line: Mapping[str, Any]) -> bool:
    """Reports whether nothing failed and the run stands still from here on until a person continues
    it; in a run that goes on from another one's state, from the last line of that."""
    return line.get("event") in (End.SPENT, FORGOTTEN) or is_stop(line)


def end_of(lines: Iterable[Mapping[str, Any]]) -> End | None:
    """Returns how the run with these lines has ended; None while it may be at work."""
    end = None
    for line in lines:
        match line.get("event"):
            case End.FINISHED:
                return End.FINISHED
            case End.GAVE_UP:
                end = End.GAVE_UP
            case End.SPENT:
                end = End.SPENT
            case End.STOPPED if is_stop(line):
                end = End.STOPPED
            case "start":
                end = None
    return end
