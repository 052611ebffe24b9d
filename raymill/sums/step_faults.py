"""Reports of all ranks at the end of a step, so that all of them refuse it alike.

It travels with the figures of the step: a rank whose loss gives a parameter no gradient computes on
as if that was zero, so that nobody waits for it, and nothing is applied.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

from raymill.errors import UserError


class OddGradient(NamedTuple):
    """A parameter that a lane gave its gradient in no part, or in several."""

    lane: int
    name: str
    num_parts: int


class Told(NamedTuple):
    """One rank's report, as float64 numbers."""

    learning_rate: float
    is_odd: float  # 1 where a gradient was odd, of which the other numbers tell
    lane: float
    parameter: float  # its number among the names
    num_parts: float

    @classmethod
    def of(cls, learning_rate: float, odd: OddGradient | None, names: Sequence[str]) -> Self:
        if odd is None:
            return cls(learning_rate, 0, 0, 0, 0)
        return cls(learning_rate, 1, odd.lane, names.index(odd.name), odd.num_parts)


NUM_TOLD = len(Told._fields)


def refuse_what_differs(step: int, told: Sequence[Told], names: Sequence[str]) -> None:
    """Raises `UserError`, the same on all ranks, for an odd gradient of one of them, and for
    learning rates that differ."""
    for rank, of_rank in enumerate(told):
        if of_rank.is_odd:
            name = names[int(of_rank.parameter)]
            told_by = (
                f"step {step} on worker {rank}: the loss of lane {int(of_rank.lane)} gives {name}"
            )
            raise UserError(f"{told_by} {odd_parts(int(of_rank.num_parts))}. Nothing was applied")
    rates = [of_rank.learning_rate for of_rank in told]
    for rank, rate in enumerate(rates):
        if rate != rates[0]:  # it may be NaN
            raise UserError(
                f"step {step}: worker {rank} has the learning rate {rate}, and worker 0 has {rates[0]}: nothing was "
                "applied. Give all workers the same one, as of a scheduler that is stepped on each of them"
            )


def odd_parts(num_parts: int) -> str:
    """Says what is wrong with a gradient in so many parts, and what to do."""
    if num_parts:
        return (
            f"its gradient in {num_parts} parts, as re-entrant activation checkpointing does: use "
            "torch.utils.checkpoint with use_reentrant=False"
        )
    return (
        "no gradient. Every lane must give every parameter one: freeze it (requires_grad_(False)), or let the loss "
        "use it, times zero"
    )
