"""Decides what happens to a step whose loss or gradient cannot be trusted: pure functions, alike on
every rank.

A bad step is skipped: its data is left out, and weights and moments stay. After too many in a row
the run goes back to the state at an earlier multiple of `save_every_steps` and leaves out all data
from there on, as PaLM's authors did by hand (Chowdhery et al., 2022, section 5.1). The losses alone
decide which state that is, not which checkpoints happen to exist, so the same happens in every
replay, at any world size and after any kill.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median
from typing import Any, Self

from cluster.settings.run import RunConfig, max_steps

SPIKE_WINDOW = 64
"""A loss is compared with those of so many steps before it to be called a spike."""

SMALLEST_DEVIATION = 1e-3
"""The least deviation, as a share of the median: losses that hardly differ do not make the next one
a spike."""


Windows = tuple[tuple[int, int], ...]
"""The first and the last step that each rollback left out."""


class Verdict(StrEnum):
    APPLY = "apply"  # the update is applied
    SKIP = "skip"  # it is not; weights and moments keep their bits
    # Training continues from an earlier state with the data behind this step
    ROLL_BACK = "rollback"
    STOP = "stop"  # the run has nothing left to try


@dataclass(frozen=True)
class GuardState:
    """The history on which decisions depend. It belongs to a state of the weights and is saved with
    it."""

    last_applied: int = 0  # the newest step whose update was applied
    skipped_in_a_row: int = 0
    # Of the newest steps applied, oldest first; kept only to find spikes
    losses: tuple[float, ...] = ()
    rollbacks: Windows = ()  # in the order in which they happened

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        windows = tuple((first, last) for first, last in values["rollbacks"])
        return cls(
            values["last_applied"], values["skipped_in_a_row"], tuple(values["losses"]), windows
        )

    def leaves_out(self, step: int) -> bool:
        """Returns whether a rollback left this step out: then neither its update nor its checkpoint
        counts."""
        return any(first <= step <= last for first, last in self.rollbacks)

    def entering(self, step: int) -> tuple[int, Self]:
        """Returns the step to take when `step` is due, behind what rollbacks left out, and the
        state to take it in."""
        behind = step
        while self.leaves_out(behind):
            behind = next(last for first, last in self.rollbacks if first <= behind <= last) + 1
        return behind, self if behind == step else replace(self, skipped_in_a_row=0)


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    state: GuardState  # after the step
    reason: str = ""  # for every verdict but APPLY


def decide(
    state: GuardState, config: RunConfig, *, step: int, loss: float, grad_norm: float
) -> Decision:
    """Decides what to do with the update of `step`, given the loss and the gradient norm of its
    whole batch."""
    reason = complaint(state.losses, config, loss=loss, grad_norm=grad_norm)
    if not reason:
        losses = (*state.losses, loss)[-SPIKE_WINDOW:] if config.train.spike_factor else ()
        return Decision(
            Verdict.APPLY, replace(state, last_applied=step, skipped_in_a_row=0, losses=losses)
        )
    state = replace(state, skipped_in_a_row=state.skipped_in_a_row + 1)
    if state.skipped_in_a_row <= config.train.max_skipped_steps:
        return Decision(Verdict.SKIP, state, reason)
    return roll_back(
        state,
        config,
        step=step,
        reason=f"{state.skipped_in_a_row} bad steps in a row, the last: {reason}",
    )


def after_wrong_weights(state: GuardState, config: RunConfig, *, step: int) -> Decision:
    """Decides what to do where the updates up to a step have led to weights that are not finite."""
    reason = "the updates made weights that are not finite"
    return roll_back(state, config, step=step, reason=reason)


def complaint(
    losses: tuple[float, ...], config: RunConfig, *, loss: float, grad_norm: float
) -> str:
    """Says what is wrong with a step; empty where nothing is."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        return f"loss {loss}, gradient norm {grad_norm}"
    if config.train.spike_factor and len(losses) == SPIKE_WINDOW:
        usual = median(losses)
        deviation = max(median(abs(value - usual) for value in losses), SMALLEST_DEVIATION * usual)
        if loss > (bound := usual + config.train.spike_factor * deviation):
            return f"loss {loss:.6g} is a spike: above {bound:.6g}, the last {len(losses)} had a median of {usual:.6g}"
    return ""


def roll_back(state: GuardState, config: RunConfig, *, step: int, reason: str) -> Decision:
    """Decides to go back to a state with fewer updates than the present one, or to stop where there
    is none."""
    if len(state.rollbacks) >= config.train.max_rollbacks:
        obstacle = f"train.max_rollbacks={config.train.max_rollbacks} is used up"
    elif state.last_applied == 0:
        obstacle = "no earlier state has trained at all"
    elif step == max_steps(config):
        obstacle = "no data is left to continue with"
    else:
        every = config.checkpoint.save_every_steps
        first = (state.last_applied - 1) // every * every + 1
        return Decision(
            Verdict.ROLL_BACK, replace(state, rollbacks=(*state.rollbacks, (first, step))), reason
        )
    return Decision(
        Verdict.STOP,
        state,
        f"{reason}; {obstacle}: lower train.learning_rate, or look at the data there",
    )
