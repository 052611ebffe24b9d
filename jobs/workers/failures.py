"""Explains why attempts failed, and decides when a run that only restarts must stop."""

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum

from jobs.run.ledger import Line

_LONGEST_REASON = 600


class Kind(StrEnum):
    """The causes of a failure, the one that explains most first."""

    USER_ERROR = "user_error"  # only the user can fix it: another attempt fails again
    RAISED = "raised"  # any other exception of the training code
    CORRUPTED = "corrupted"  # it was found wrong, and all workers start again without its node
    DIED = "died"  # the worker's process ended, or its node did
    LOST = "lost"  # a worker's connection to another one broke: that one's failure is the cause


# Patterns in the last line of Ray Train's report.
_NODE_DIED = re.compile(r"node (is dead|has died|was terminated)", re.IGNORECASE)
_DIED = re.compile(
    rf"actor (is dead|died|\w+ is unavailable)|worker process has died|{_NODE_DIED.pattern}",
    re.IGNORECASE,
)
_CORRUPTED = re.compile(r"CorruptionError")
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|caused pair closure|DistBackendError|DistNetworkError|LostPeerError"
)


def is_lost_peer(error: RuntimeError) -> bool:
    """Reports whether a connection to another worker broke; torch has no error type of its own for
    gloo's."""
    return bool(_LOST.search(f"{type(error).__name__}: {one_line(str(error))}"))


def is_lost_node(error: Exception) -> bool:
    """Reports whether a worker died with its node."""
    return bool(_NODE_DIED.search(str(error)))


def is_left_out(error: Exception) -> bool:
    """Reports whether a worker ended since one of them was found wrong."""
    return bool(_CORRUPTED.search(str(error)))


def main_cause(errors: Mapping[int, str]) -> tuple[int, Kind, str]:
    """Returns (rank, kind, reason in one line) of the error that explains most, from the text of
    each rank's error."""
    found = []
    for rank, text in errors.items():
        reason = one_line(text)
        kind = _kind(reason)
        found.append((list(Kind).index(kind), rank, kind, reason))
    return min(found)[1:]


def _kind(reason: str) -> Kind:
    if _CORRUPTED.search(reason):
        return Kind.CORRUPTED
    if _DIED.search(reason):
        return Kind.DIED
    return Kind.LOST if _LOST.search(reason) else Kind.RAISED


def one_line(text: str) -> str:
    """Returns the last line of a traceback or of Ray's account of a dead actor."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason was given"]
    # Ray's guesses are wrong
    return lines[-1].partition(" Some common causes include")[0][:_LONGEST_REASON]


def why_give_up(lines: Sequence[Line], *, max_fruitless_attempts: int) -> str | None:
    """Returns the reason to start no further attempt; None while there is hope.

    The attempts that count are those since the run's furthest step, or since it last gave up: a
    user who resumes it then has fixed something.
    """
    furthest = 0
    failures: list[Line] = []
    num_starts = 0
    for line in lines:
        match line.get("event"):
            case "start":
                num_starts += 1
            case "failure":
                failures.append(line)
            case "gave_up":
                num_starts, failures = 0, []
            case "corruption" | "undecided" | "refuted" if line["to_step"] is not None:
                # The workers that are left take these steps again
                furthest, num_starts, failures = line["to_step"], 0, []
            case None if line["step"] > furthest:
                furthest, num_starts, failures = line["step"], 0, []
    last = failures[-1] if failures else None
    if last and last["kind"] == Kind.USER_ERROR:
        return str(last["reason"])
    # Process ids, ports and addresses differ between two cases of one error.
    raised = [
        re.sub(r"0x[0-9a-f]+|\d+", "#", line["reason"])
        for line in failures
        if line["kind"] == Kind.RAISED
    ]
    if len(raised) > 1 and raised[-1] == raised[-2]:
        return f"after step {furthest} the same error came twice: {failures[-1]['reason']}"
    num_fruitless = max(num_starts, len(failures))
    if num_fruitless < max_fruitless_attempts:
        return None
    reason = f"the last failure was: {last['reason']}" if last else "no failure was reported"
    return f"{num_fruitless} attempts in a row got no further than step {furthest}; {reason}"
