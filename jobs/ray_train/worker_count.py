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
    num_seats: int,
    num_vacant: int,
) -> bool:
    """Reports whether a group of these seats is to start again with this number of workers. One does
    not that only loses nodes, or that gets back all that it has lost: its other workers go on."""
    num_training = num_seats - num_vacant
    if num_workers > num_training:
        return num_workers != num_seats
    return max(max_workers - num_lent, min_workers) < num_training
