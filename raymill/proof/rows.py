"""The trainings of the proof: how many workers take which steps, and where one of them is killed. This
module does not import PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass

NUM_LANES = 12  # which one to four workers, and six, divide evenly: PyTorch's own ways need it
LEAST_STEPS = 6
LEAST_WORKERS = 4  # of which one is killed, and to which one grows

OURS = ("none", "optimizer", "gradients")
"""The parts of the state that raymill divides among the workers."""
PEERS = ("DDP", "FSDP2")
"""PyTorch's own ways."""


@dataclass(frozen=True)
class Stint:
    """A number of workers that train together, from the newest saved state to a step."""

    num_workers: int
    last_step: int
    killed_in_step: int | None = None  # the last worker gets SIGKILL in the middle of it


@dataclass(frozen=True)
class Row:
    """A training from its first step to its last."""

    name: str
    stints: Sequence[Stint]

    @property
    def is_even(self) -> bool:
        """Whether each worker always has as many lanes as any other."""
        return not any(NUM_LANES % stint.num_workers for stint in self.stints)


def rows_of(num_steps: int, *, most_workers: int = LEAST_WORKERS) -> list[Row]:
    """Returns the trainings of so many steps, `LEAST_STEPS` or more, by as many workers at most."""
    rows = [Row("1 worker", [Stint(1, num_steps)])]
    for num_workers in range(2, most_workers + 1):
        rows.append(Row(f"{num_workers} workers", [Stint(num_workers, num_steps)]))
    killed = [Stint(4, num_steps, killed_in_step=num_steps * 3 // 4), Stint(3, num_steps)]
    resized = [Stint(1, num_steps // 3), Stint(4, num_steps * 2 // 3), Stint(2, num_steps)]
    return [*rows, Row("4, one killed, 3", killed), Row("1, then 4, then 2", resized)]
