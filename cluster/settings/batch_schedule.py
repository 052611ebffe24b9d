"""How many samples and tokens each step of a run takes: pure arithmetic, also while the batch grows.

A batch is a whole number of lanes (micro-batches). It grows linearly with the tokens seen, as GPT-3's did (Brown et
al., 2020, section 2.3): a stage is the steps in a row of as many lanes, so a run has one stage for each number of lanes
at most, however many steps. Steps count from 1, samples from 0.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Stage:
    """The steps from `first_step` to the next stage's, and the lanes of all steps before them."""

    first_step: int
    lanes_before: int
    num_lanes: int


@dataclass(frozen=True)
class BatchSchedule:
    """The lanes of every step: `start_lanes` of the first one, `full_lanes` once `ramp_tokens` were seen."""

    seq_len: int
    micro_batch_size: int
    full_lanes: int
    max_tokens: int
    start_lanes: int
    ramp_tokens: int = 0

    @property
    def lane_tokens(self) -> int:
        return self.micro_batch_size * self.seq_len

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run: `max_tokens` is never exceeded."""
        lanes = self.max_tokens // self.lane_tokens
        last = next(stage for stage in reversed(self.stages) if stage.lanes_before <= lanes)
        return last.first_step - 1 + (lanes - last.lanes_before) // last.num_lanes

    @property
    def lane_counts(self) -> list[int]:
        """All numbers of lanes that steps of the run have, ascending."""
        max_steps = self.max_steps
        return [stage.num_lanes for stage in self.stages if stage.first_step <= max_steps]

    def num_lanes(self, step: int) -> int:
        return self._stage(step).num_lanes

    def samples(self, step: int) -> range:
        """Global indices of the step's samples; they begin where the step before ends."""
        stage = self._stage(step)
        first = stage.lanes_before + (step - stage.first_step) * stage.num_lanes
        return range(first * self.micro_batch_size, (first + stage.num_lanes) * self.micro_batch_size)

    def samples_of(self, first: int, last: int) -> range:
        """Of the steps from `first` to `last`."""
        return range(self.samples(first).start, self.samples(last).stop)

    def step_tokens(self, step: int) -> int:
        return self.num_lanes(step) * self.lane_tokens

    def tokens_seen(self, step: int) -> int:
        """After the step; 0 before the first one, of number 0."""
        return self.samples(step).stop * self.seq_len if step else 0

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        stages, step, tokens, num_lanes = [], 1, 0, self._due_lanes(0)
        while num_lanes < self.full_lanes:
            stages.append(Stage(step, tokens // self.lane_tokens, num_lanes))
            steps = -((tokens - self._due_tokens(num_lanes + 1)) // (num_lanes * self.lane_tokens))  # rounded up
            step, tokens = step + steps, tokens + steps * num_lanes * self.lane_tokens
            num_lanes = self._due_lanes(tokens)
        return (*stages, Stage(step, tokens // self.lane_tokens, num_lanes))

    def _due_lanes(self, tokens: int) -> int:
        """Of a step that begins after so many tokens."""
        if tokens >= self.ramp_tokens:
            return self.full_lanes
        return self.start_lanes + (self.full_lanes - self.start_lanes) * tokens // self.ramp_tokens

    def _due_tokens(self, num_lanes: int) -> int:
        """After which a step has so many lanes: the fewest."""
        return -((self.start_lanes - num_lanes) * self.ramp_tokens // (self.full_lanes - self.start_lanes))

    def _stage(self, step: int) -> Stage:
        assert step >= 1, "steps count from 1"
        return self.stages[bisect_right(self.stages, step, key=_first_step) - 1]


def _first_step(stage: Stage) -> int:
    return stage.first_step
