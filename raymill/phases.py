"""The parts of a training step, by which its time is measured."""

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
REST = "stall"
"""The time that no phase claims."""
