"""How a request ended, for counts, the request log and traces."""

from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from typing import Any

CLIENT_LEFT, REPLICAS_ENDED = "client_left", "replicas_ended"  # reasons in the request log


class AnswerOutcome(StrEnum):
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
class AnswerEnding:
    """The end of a request, for counts, the request log and traces."""

    outcome: AnswerOutcome
    status: int | None = None  # None if none has gone out
    reason: str | None = None
    num_attempts: int = 0  # replicas that were asked
    facts: dict[str, Any] = field(default_factory=dict)  # from the replica


def outcome_of(status: int) -> AnswerOutcome:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return AnswerOutcome.REFUSED
    return (
        AnswerOutcome.FAILED
        if status >= 500
        else AnswerOutcome.INVALID
        if status >= 400
        else AnswerOutcome.OK
    )
