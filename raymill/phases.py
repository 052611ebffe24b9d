"""The parts of a training step, by which its time is measured."""

from collections.abc import Mapping
from typing import Literal, get_args

Phase = Literal[
    "load",
    "forward",
    "loss",
    "backward",
    "sync",
    "update",
    "snapshot",
    "checkpoint",
    "validation",
    "statistics",
]
PHASES: tuple[str, ...] = get_args(Phase)
"""Parts of a training step: `loss` is the head and its cross-entropy, with their gradient; `sync`
is the part of the exchange that is not overlapped."""
COMPUTING = ("forward", "loss", "backward", "update")
"""The phases in which a worker waits for nobody: on a CPU its thread has a processor all the time,
unless other programs take it."""
REST, UNTIMED = "stall", "step"
"""The time that no phase claims; the only phase of a step that an earlier version did not time."""


def processor_share(processor_s: float | None, seconds: Mapping[str, float]) -> float:
    """Returns which share of a processor a worker's thread had while it computed, from what it used
    of one and its seconds by phase: all of it where that is not known."""
    computing_s = sum(seconds.get(phase, 0.0) for phase in COMPUTING)
    if processor_s is None or not computing_s:
        return 1.0
    return min(1.0, processor_s / computing_s)
