"""Measures the parts of a step before it is taken: each lane, each row, and what the step would be
without some rows. One worker does, which holds the whole state.

P trained parameters.
"""

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.output.progress import progress
from jobs.proof.explain.explanation import Lane, Row
from jobs.training.attempt import Attempt
from raymill.observer import StepObserver
from raymill.step_timer import StepTimer


@dataclass(frozen=True)
class TakenStep:
    """A step as it is taken on the rows that count."""

    loss: float  # nats per counted token
    grad_norm: float
    num_counted: int
    update: Tensor  # (P,): by how much it changes the weights


class GradientNorm(StepObserver):
    """Sees the gradients of a turn, and adds up their squares."""

    def __init__(self, device: torch.device) -> None:
        self._squares = torch.zeros((), dtype=torch.float64, device=device)

    def gradient(self, numbers: object, name: str, values: Tensor) -> None:
        self._squares += torch.linalg.vector_norm(values, dtype=torch.float64).square()

    @property
    def norm(self) -> float:
        return float(self._squares.sqrt())


class StepParts:
    """Looks into the next step of an attempt, whose state stays as it is."""

    def __init__(self, attempt: Attempt, step: int) -> None:
        config = attempt.plan.config
        self._attempt, self._step, self._timer = attempt, step, StepTimer()
        self._state, self._gradient = attempt.state, attempt.gradient
        self._passes = attempt.gradient.passes
        self._before = {name: flat.clone() for name, flat in self._state.parts.items()}
        self._rows_at_once = config.train.micro_batch_size
        self._lane_size = attempt.schedule.lane_size
        self.samples = attempt.schedule.samples(step)

    @property
    def num_lanes(self) -> int:
        return len(self.samples) // self._lane_size

    def samples_of_lane(self, lane: int) -> range:
        """Returns the global indices of a lane's samples."""
        return self.samples[lane * self._lane_size : (lane + 1) * self._lane_size]

    def taken(self, *, left_out: Container[int] = ()) -> TakenStep:
        """Takes the step, without the tokens of some samples, and takes its update back."""
        state = self._state
        num_updates = state.num_updates
        with self._passes.leaving_out(left_out):
            measured = self._gradient.of_step(self._step, self._timer)
        state.apply(norm=measured.norm, learning_rate=self._attempt.rate(self._step))
        update = state.values - self._before["values"]
        for name, flat in state.parts.items():
            flat.copy_(self._before[name])
        state.set_num_updates(num_updates)
        return TakenStep(measured.loss, measured.norm, measured.num_counted, update)

    def lanes(self, *, num_counted: int) -> list[Lane]:
        """Returns all lanes of the step, which together counts so many tokens."""
        to_step = self._passes.scale(self._step, num_counted)
        lanes: list[Lane] = []
        with (
            progress("measuring lanes", total=self.num_lanes, unit="lanes") as advance,
            self._state.weights_in_use(),
        ):
            for number in range(self.num_lanes):
                loss, norm, count = self._measured(number)
                to_lane = self._passes.scale(self._step, count)
                lane = Lane(number, loss * to_lane, loss * to_step, norm * to_lane, count)
                lanes.append(lane)
                advance(1)
        return lanes

    def rows(self) -> list[Row]:
        """Returns all rows of the step, in the order of their samples."""
        size = self._rows_at_once
        whole_rows = [(row, slice(None)) for row in range(size)]
        losses: list[tuple[float, int]] = []
        with self._state.weights_in_use():
            for number in range(len(self.samples) // size):
                losses += self._passes.losses_of(self._step, number, whole_rows)
        rows: list[Row] = []
        for place, (loss, count) in enumerate(losses):
            lane, in_lane = divmod(place, self._lane_size)
            mean = loss / max(1, count)
            rows.append(Row(lane, in_lane, self.samples[place], mean, count))
        return rows

    def grad_norm_of(self, row: Row) -> float:
        """Returns the norm of the gradient of a row's own loss."""
        others = {*self.samples_of_lane(row.lane)} - {row.sample}
        with self._state.weights_in_use(), self._passes.leaving_out(others):
            _, norm, count = self._measured(row.lane)
        return norm * self._passes.scale(self._step, count)

    def losses_within(self, row: Row, spans: Iterable[Sequence[int]]) -> list[float]:
        """Returns the loss of stretches of a row's targets, in nats per token that counts."""
        number, in_batch = divmod(row.sample - self.samples.start, self._rows_at_once)
        pieces = [(in_batch, slice(*span)) for span in spans]
        with self._state.weights_in_use():
            losses = self._passes.losses_of(self._step, number, pieces)
        return [loss / max(1, count) for loss, count in losses]

    def _measured(self, lane: int) -> tuple[float, float, int]:
        """Returns a lane's loss and its gradient's norm, both as the passes have them, and how many
        tokens count."""
        seen = GradientNorm(self._state.device)
        loss, count = self._gradient.exact.of_lane(self._step, lane, seen, self._timer).tolist()
        return loss, seen.norm, int(count)


def update_difference(whole: TakenStep, without: TakenStep) -> tuple[float, float] | None:
    """Returns by how much the update without some rows differs from that with all, relative to the
    latter's norm, and the cosine of the two; None where one of them is nothing or not finite."""
    norm, other_norm = _norm(whole.update), _norm(without.update)
    distance = _norm(without.update - whole.update)
    if not (norm and other_norm and math.isfinite(distance)):
        return None
    cosine = (norm**2 + other_norm**2 - distance**2) / (2 * norm * other_norm)
    return distance / norm, cosine


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
