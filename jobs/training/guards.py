"""What becomes of a step whose loss or gradient cannot be trusted: pure decisions, the same on every rank.

A bad step is skipped: its data is passed over, weights and moments stay. After too many in a row the run goes back to
the state at an earlier multiple of `save_every_steps` and leaves out all data from there on, as PaLM's authors did by
hand (Chowdhery et al., 2022, section 5.1). Which state that is follows from the losses alone, not from which
checkpoints happen to exist, so the same happens in every replay, at any world size and after any kill.
"""

import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from statistics import median
from typing import Any, Self

from cluster.settings.run import RunConfig, max_steps

SPIKE_WINDOW = 64
"""Steps whose losses a loss is compared with to be a spike."""

SMALLEST_DEVIATION = 1e-3
"""Of the median: losses that hardly differ are no reason to call the next one a spike."""


Windows = tuple[tuple[int, int], ...]
"""The first and the last step that each rollback left out."""


class Verdict(StrEnum):
    APPLY = "apply"  # the update is applied
    SKIP = "skip"  # it is not; weights and moments keep their bits
    ROLL_BACK = "rollback"  # an earlier state goes on with the data behind this step
    STOP = "stop"  # nothing that the run could try is left


@dataclass(frozen=True)
class GuardPolicy:
    """The settings that decisions depend on."""

    max_skipped_steps: int
    max_rollbacks: int
    spike_factor: float  # 0 looks for no spikes
    save_every_steps: int
    last_step: int

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        train = config.train
        return cls(
            max_skipped_steps=train.max_skipped_steps,
            max_rollbacks=train.max_rollbacks,
            spike_factor=train.spike_factor,
            save_every_steps=config.checkpoint.save_every_steps,
            last_step=max_steps(config),
        )


@dataclass(frozen=True)
class GuardState:
    """What later decisions depend on. It belongs to a state of the weights and is saved with it."""

    last_applied: int = 0  # the newest step whose update was applied
    skipped_in_a_row: int = 0
    losses: tuple[float, ...] = ()  # of the newest steps applied, oldest first; kept only to find spikes
    rollbacks: Windows = ()  # in the order they came

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        windows = tuple((first, last) for first, last in values["rollbacks"])
        return cls(values["last_applied"], values["skipped_in_a_row"], tuple(values["losses"]), windows)

    def leaves_out(self, step: int) -> bool:
        """Whether a rollback left this step out: then its update never counted, nor do checkpoints taken there."""
        return any(first <= step <= last for first, last in self.rollbacks)

    def entering(self, step: int) -> tuple[int, Self]:
        """The step to take next when `step` is due, behind what rollbacks left out, and the state to take it in."""
        behind = step
        while self.leaves_out(behind):
            behind = next(last for first, last in self.rollbacks if first <= behind <= last) + 1
        return behind, self if behind == step else replace(self, skipped_in_a_row=0)


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    state: GuardState  # after the step
    reason: str = ""  # for every verdict but APPLY


def decide(state: GuardState, policy: GuardPolicy, *, step: int, loss: float, grad_norm: float) -> Decision:
    """What to do with the update of `step`, given the loss and gradient norm of its whole batch."""
    reason = complaint(state.losses, policy, loss=loss, grad_norm=grad_norm)
    if not reason:
        losses = (*state.losses, loss)[-SPIKE_WINDOW:] if policy.spike_factor else ()
        return Decision(Verdict.APPLY, replace(state, last_applied=step, skipped_in_a_row=0, losses=losses))
    state = replace(state, skipped_in_a_row=state.skipped_in_a_row + 1)
    if state.skipped_in_a_row <= policy.max_skipped_steps:
        return Decision(Verdict.SKIP, state, reason)
    return roll_back(
        state, policy, step=step, reason=f"{state.skipped_in_a_row} bad steps in a row, the last: {reason}"
    )


def complaint(losses: tuple[float, ...], policy: GuardPolicy, *, loss: float, grad_norm: float) -> str:
    """What is wrong with a step; empty when nothing is."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        return f"loss {loss}, gradient norm {grad_norm}"
    if policy.spike_factor and len(losses) == SPIKE_WINDOW:
        usual = median(losses)
        deviation = max(median(abs(value - usual) for value in losses), SMALLEST_DEVIATION * usual)
        if loss > (bound := usual + policy.spike_factor * deviation):
            return f"loss {loss:.6g} is a spike: above {bound:.6g}, the last {len(losses)} had a median of {usual:.6g}"
    return ""


def roll_back(state: GuardState, policy: GuardPolicy, *, step: int, reason: str) -> Decision:
    """Goes back to a state with fewer updates than the present one, or stops where there is none to try."""
    if len(state.rollbacks) >= policy.max_rollbacks:
        obstacle = f"train.max_rollbacks={policy.max_rollbacks} is used up"
    elif state.last_applied == 0:
        obstacle = "no earlier state has trained at all"
    elif step == policy.last_step:
        obstacle = "no data is left to go on with"
    else:
        first = (state.last_applied - 1) // policy.save_every_steps * policy.save_every_steps + 1
        return Decision(Verdict.ROLL_BACK, replace(state, rollbacks=(*state.rollbacks, (first, step))), reason)
    return Decision(Verdict.STOP, state, f"{reason}; {obstacle}: lower train.learning_rate, or look at the data there")


def longest(*histories: Windows) -> Windows:
    """Of one run's rollbacks, as several know them, the most complete knowledge: each is a beginning of it."""
    return max(histories, key=len)
