"""The phases of a training step, to which its time is counted."""

from typing import Literal, get_args

Phase = Literal[
    "load", "forward", "loss", "backward", "sync", "update", "snapshot", "checkpoint", "validation", "statistics"
]
PHASES: tuple[str, ...] = get_args(Phase)
"""`loss` is the head and its cross-entropy, with their gradient; `sync` what of the exchange is not overlapped."""

REST = "stall"
"""What no phase claims."""

UNTIMED = "step"
"""The one phase of a step whose parts are not timed."""
