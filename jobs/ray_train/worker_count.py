"""Decides how many workers an elastic group has. Knows neither Ray nor its cluster, only
numbers."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerCount:
    """The workers to run, and those for which there is a place too, kept for the next loss."""

    to_run: int
    spares: int = 0


def workers_to_run(
    possible: int,
    *,
    num_lent: int,
    min_workers: int,
    max_workers: int,
    num_running: int,
    num_free: int,
    counts: Mapping[int, int],
) -> WorkerCount:
    """Returns the number of workers to run. A group grows only into free room: lent resources may
    still be in use when their loan is over, and a group that is started without room waits and
    starts over. `counts` has the number to run by the number that could, where they differ."""
    wanted = min(possible, max(max_workers - num_lent, min_workers))
    if wanted > num_running > 0:
        wanted = min(wanted, num_running + num_free)
    to_run = counts.get(wanted, wanted)
    return WorkerCount(to_run, spares=wanted - to_run)


def starts_again(
    num_workers: int,
    *,
    num_lent: int,
    min_workers: int,
    max_workers: int,
    num_training: int,
    counts: Mapping[int, int],
) -> bool:
    """Reports whether a group in which `num_training` workers train is to start again with this
    number. One that loses nodes does not, nor one that others can join one by one."""
    if num_workers > num_training:
        return not can_join(num_workers, num_training=num_training, counts=counts)
    return max(max_workers - num_lent, min_workers) < num_training


def can_join(num_workers: int, *, num_training: int, counts: Mapping[int, int]) -> bool:
    """Reports whether a group can grow to this number one by one: every number on the way is one
    that it runs."""
    return all(
        counts.get(number, number) == number for number in range(num_training + 1, num_workers)
    )
