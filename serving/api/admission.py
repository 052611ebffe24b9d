"""Whether a replica takes a request on: by its limits, and by how long the request would wait."""

import math
from dataclasses import dataclass

from serving.engine_process.client import EngineClient
from serving.protocol.errors import ApiError, overloaded

EXPECTED_SHARE = 0.8  # of the longest wait: a refusal at once is better than one after a wait that was misjudged


@dataclass(frozen=True)
class AdmissionLimits:
    """What a replica takes on at once; more gets 429."""

    max_requests: int
    max_sequences: int  # running and waiting ones; each prompt and each choice of a request is one
    max_queue_s: float  # from its arrival until the engine begins with it


def refuse_when_full(engine: EngineClient, num_sequences: int, limits: AdmissionLimits) -> None:
    """Raises `ApiError` (429) where there is no room for as many more, or only after too long a wait."""
    if engine.num_open_requests >= limits.max_requests:
        raise overloaded(f"The replica is at its limit of {limits.max_requests} requests; try again later")
    if engine.num_open_sequences + num_sequences > limits.max_sequences:
        raise overloaded(
            f"The replica is at its limit of {limits.max_sequences} running and waiting sequences "
            f"({engine.num_open_sequences} now, {num_sequences} asked for); try again later"
        )
    if (wait_s := engine.queue.wait_s()) > EXPECTED_SHARE * limits.max_queue_s:
        raise overloaded(
            f"The request would wait about {wait_s:.1f} s, and {limits.max_queue_s:g} s are the most; try again later",
            retry_after_s=max(1, math.ceil(wait_s - limits.max_queue_s)),
        )


def waited_too_long(limits: AdmissionLimits) -> ApiError:
    return overloaded(
        f"The request has waited for {limits.max_queue_s:g} s, which is the most; try again later",
        retry_after_s=math.ceil(limits.max_queue_s),
    )
