"""A version's figures on a replica, and the comparison of two versions' times."""

from dataclasses import dataclass, field

MIN_JUDGED_STEPS = 20  # of a size, of both versions


@dataclass
class VersionStepTimes:
    """Steps of about the same size that read no prompt."""

    count: int = 0
    busy_s: float = 0.0

    @property
    def mean_s(self) -> float:
        return self.busy_s / self.count


@dataclass
class VersionStats:
    """Counts what a version has done on one replica, without the sequences of clients that left."""

    sequences: int = 0
    errors: int = 0
    # By `step_size` of the sequences that got a token
    steps: dict[int, VersionStepTimes] = field(default_factory=dict)

    def stepped(self, num_sequences: int, busy_s: float, *, num_steps: int = 1) -> None:
        """Counts steps that each gave so many sequences a token, and did nothing else."""
        size = step_size(num_sequences)
        times = self.steps.get(size)
        if times is None:
            times = self.steps[size] = VersionStepTimes()
        times.count += num_steps
        times.busy_s += busy_s

    def add(self, other: "VersionStats") -> None:
        self.sequences += other.sequences
        self.errors += other.errors
        for size, times in other.steps.items():
            total = self.steps.setdefault(size, VersionStepTimes())
            total.count += times.count
            total.busy_s += times.busy_s


def step_size(num_sequences: int) -> int:
    """Returns the class of steps with about as many sequences: 1, 2, 3 to 4, 5 to 8 and so on."""
    return (num_sequences - 1).bit_length()


def step_times_at_like_load(new: VersionStats, old: VersionStats) -> tuple[float, float] | None:
    """Returns the seconds of the new version's mean step, and the old one's for the same mixture of
    sizes. Prompts that are read, and more sequences at a time, make any version slower. Returns
    None before each has made enough steps of sizes that the other has made too."""
    num_steps, new_s, old_s = 0, 0.0, 0.0
    for size, times in new.steps.items():
        before = old.steps.get(size)
        if before is None or min(times.count, before.count) < MIN_JUDGED_STEPS:
            continue
        num_steps += times.count
        new_s += times.busy_s
        old_s += times.count * before.mean_s
    return (new_s / num_steps, old_s / num_steps) if num_steps else None
