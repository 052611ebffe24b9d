"""The samples and tokens of each step of a run, even while the batch grows: pure arithmetic.

A batch is a whole number of lanes, of `lane_size` samples each. It grows linearly with the tokens
seen, as GPT-3's did (Brown et al., 2020, section 2.3). A stage is a row of steps with equally many
lanes, so a run has at most one stage for each number of lanes. Steps count from 1, samples from 0.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class BatchStage:
    """The steps from `first_step` to the next stage, and the number of lanes in all earlier
    steps."""

    first_step: int
    lanes_before: int
    num_lanes: int


@dataclass(frozen=True)
class BatchSchedule:
    """The lanes of every step: `start_lanes` in the first, `full_lanes` once `ramp_tokens` were
    seen."""

    seq_len: int
    lane_size: int
    full_lanes: int
    max_tokens: int
    start_lanes: int
    ramp_tokens: int = 0

    @property
    def lane_tokens(self) -> int:
        return self.lane_size * self.seq_len

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run, which never exceeds `max_tokens`."""
        lanes = self.max_tokens // self.lane_tokens
        last = next(stage for stage in reversed(self.stages) if stage.lanes_before <= lanes)
        return last.first_step - 1 + (lanes - last.lanes_before) // last.num_lanes

    @property
    def lane_counts(self) -> list[int]:
        """The numbers of lanes that steps of the run have, in ascending order."""
        max_steps = self.max_steps
        return [stage.num_lanes for stage in self.stages if stage.first_step <= max_steps]

    def num_lanes(self, step: int) -> int:
        return self._stage(step).num_lanes

    def samples(self, step: int) -> range:
        """Returns global indices of the step's samples, which begin where the previous step's
        end."""
        stage = self._stage(step)
        first = stage.lanes_before + (step - stage.first_step) * stage.num_lanes
        return range(first * self.lane_size, (first + stage.num_lanes) * self.lane_size)

    def samples_of(self, first: int, last: int) -> range:
        """Returns the samples of the steps from `first` to `last`."""
        return range(self.samples(first).start, self.samples(last).stop)

    def step_of(self, sample: int) -> int:
        """Returns the step that takes a sample, by its global index."""
        lane = sample // self.lane_size
        before = bisect_right(self.stages, lane, key=lambda stage: stage.lanes_before)
        stage = self.stages[before - 1]
        return stage.first_step + (lane - stage.lanes_before) // stage.num_lanes

    def step_tokens(self, step: int) -> int:
        return self.num_lanes(step) * self.lane_tokens

    def tokens_seen(self, step: int) -> int:
        """Returns the tokens seen after the step; step 0 is before the first."""
        return self.samples(step).stop * self.seq_len if step else 0

    @cached_property
    def stages(self) -> tuple[BatchStage, ...]:
        stages, step, tokens, num_lanes = [], 1, 0, self._due_lanes(0)
        while num_lanes < self.full_lanes:
            stages.append(BatchStage(step, tokens // self.lane_tokens, num_lanes))
            # Rounded up
            steps = -((tokens - self._due_tokens(num_lanes + 1)) // (num_lanes * self.lane_tokens))
            step = step + steps
            tokens = tokens + steps * num_lanes * self.lane_tokens
            num_lanes = self._due_lanes(tokens)
        return (*stages, BatchStage(step, tokens // self.lane_tokens, num_lanes))

    def _due_lanes(self, tokens: int) -> int:
        """Returns the lanes of a step that begins after so many tokens."""
        if tokens >= self.ramp_tokens:
            return self.full_lanes
        return self.start_lanes + (self.full_lanes - self.start_lanes) * tokens // self.ramp_tokens

    def _due_tokens(self, num_lanes: int) -> int:
        """Returns the fewest tokens after which a step has so many lanes."""
        return -(
            (self.start_lanes - num_lanes)
            * self.ramp_tokens
            // (self.full_lanes - self.start_lanes)
        )

    def _stage(self, step: int) -> BatchStage:
        assert step >= 1, "steps count from 1"
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]
