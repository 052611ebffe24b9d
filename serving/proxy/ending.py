"""How a request ended, for counts, the request log and traces."""

from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from typing import Any

CLIENT_LEFT, REPLICAS_ENDED = "client_left", "replicas_ended"  # reasons in the request log


class Outcome(StrEnum):
    """The end of a completion as its client saw it. The endpoint's service objective is measured by
    it."""

    OK = "ok"
    INVALID = "invalid"  # any other 4xx: the request cannot be answered
    REFUSED = "refused"  # 429: more than the endpoint takes on
    DRAINED = "drained"  # 503 while an operator drains the endpoint, which is not a failure
    FAILED = "failed"  # any other 5xx
    CUT = "cut"  # the front door ended a stream with an error, or the answer is incomplete
    LEFT = "left"  # the client went away first


@dataclass(frozen=True)
class Ending:
    """The end of a request, for counts, the request log and traces."""

    outcome: Outcome
    status: int | None = None  # None if none has gone out
    reason: str | None = None
    num_attempts: int = 0  # replicas that were asked
    facts: dict[str, Any] = field(default_factory=dict)  # from the replica


def outcome_of(status: int) -> Outcome:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return Outcome.REFUSED
    return Outcome.FAILED if status >= 500 else Outcome.INVALID if status >= 400 else Outcome.OK
