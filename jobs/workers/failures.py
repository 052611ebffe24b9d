"""Why attempts failed, and whether another one is worth it: a run that only restarts must stop and say the reason."""

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum

from jobs.run.ledger import Line

_LONGEST_REASON = 600


class Kind(StrEnum):
    """The causes of a failure, the one that explains most first."""

    USER_ERROR = "user_error"  # the user can mend it: tried again, it fails again
    RAISED = "raised"  # any other exception of the training code
    DIED = "died"  # the worker's process ended, or its node did
    LOST = "lost"  # a worker's connection to another one broke: that one's failure is the cause


# As the last line of what Ray Train reports tells them apart.
_NODE_DIED = re.compile(r"node (is dead|has died|was terminated)", re.IGNORECASE)
_DIED = re.compile(
    rf"actor (is dead|died|\w+ is unavailable)|worker process has died|{_NODE_DIED.pattern}", re.IGNORECASE
)
_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|DistBackendError|DistNetworkError")


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a connection to another worker broke; torch has no type of its own for what gloo says."""
    return bool(_LOST.search(f"{type(error).__name__}: {one_line(str(error))}"))


def is_lost_node(error: Exception) -> bool:
    """Whether a worker died with its node."""
    return bool(_NODE_DIED.search(str(error)))


def main_cause(errors: Mapping[int, str]) -> tuple[int, Kind, str]:
    """(rank, kind, reason in one line) of what explains most, from an error's text or traceback by rank."""
    found = []
    for rank, text in errors.items():
        reason = one_line(text)
        kind = Kind.DIED if _DIED.search(reason) else Kind.LOST if _LOST.search(reason) else Kind.RAISED
        found.append((list(Kind).index(kind), rank, kind, reason))
    return min(found)[1:]


def one_line(text: str) -> str:
    """The last line of a traceback or of Ray's account of a dead actor."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason was given"]
    return lines[-1].partition(" Some common causes include")[0][:_LONGEST_REASON]  # Ray's guesses are wrong ones


def why_give_up(lines: Sequence[Line], *, max_fruitless_attempts: int) -> str | None:
    """The reason to start no further attempt; None while there is hope.

    Attempts count that came since the run last got further than ever before, or since it last gave up: whoever
    resumes it then has mended something.
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
            case None if line["step"] > furthest:
                furthest, num_starts, failures = line["step"], 0, []
    last = failures[-1] if failures else None
    if last and last["kind"] == Kind.USER_ERROR:
        return str(last["reason"])
    raised = [_without_numbers(line["reason"]) for line in failures if line["kind"] == Kind.RAISED]
    if len(raised) > 1 and raised[-1] == raised[-2]:
        return f"after step {furthest} the same error came twice: {failures[-1]['reason']}"
    num_fruitless = max(num_starts, len(failures))
    if num_fruitless < max_fruitless_attempts:
        return None
    reason = f"the last failure was: {last['reason']}" if last else "no failure was reported"
    return f"{num_fruitless} attempts in a row got no further than step {furthest}; {reason}"


def _without_numbers(reason: str) -> str:
    """Process ids, ports and addresses differ between two cases of one error."""
    return re.sub(r"\d+", "#", re.sub(r"0x[0-9a-f]+", "#", reason))
