"""Whether a replica takes a request on: by its limits, and by how long the request would wait."""

import math
from dataclasses import dataclass

from serving.engine_client import EngineClient
from serving.errors import ApiError, overloaded


@dataclass(frozen=True)
class AdmissionLimits:
    """What a replica takes on at once; more gets 429."""

    max_requests: int
    max_sequences: int  # running and waiting ones; each prompt and each choice of a request is one
    max_queue_s: float  # for a first token


def predicted_wait_s(*, num_open: int, num_slots: int, residence_s: float) -> float:
    """How long the next sequence waits for a slot behind `num_open` that run or wait. A sequence holds a slot for
    `residence_s` on average, so that one becomes free each `residence_s / num_slots`, for each that waits in turn."""
    return max(0, num_open + 1 - num_slots) * residence_s / num_slots


def refuse_when_full(engine: EngineClient, num_sequences: int, limits: AdmissionLimits, *, wait_s: float) -> None:
    """Raises `ApiError` (429) where there is no room for as many more, or only after `wait_s` too long."""
    if engine.num_open_requests >= limits.max_requests:
        raise overloaded(f"The replica is at its limit of {limits.max_requests} requests; try again later")
    if engine.num_open_sequences + num_sequences > limits.max_sequences:
        raise overloaded(
            f"The replica is at its limit of {limits.max_sequences} running and waiting sequences "
            f"({engine.num_open_sequences} now, {num_sequences} asked for); try again later"
        )
    if wait_s > limits.max_queue_s:
        raise overloaded(
            f"The request would wait about {wait_s:.1f} s for its first token, longer than {limits.max_queue_s:g} s; "
            "try again later",
            retry_after_s=math.ceil(wait_s - limits.max_queue_s),
        )


def waited_too_long(limits: AdmissionLimits) -> ApiError:
    return overloaded(
        f"The request has waited {limits.max_queue_s:g} s for its first token; try again later",
        retry_after_s=math.ceil(limits.max_queue_s),
    )
