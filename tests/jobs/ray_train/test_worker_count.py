"""The number of workers that an elastic run keeps: fewer while some are lent, and spares where all
would be slower."""

import pytest

from jobs.ray_train.worker_count import WorkerCount, can_join, starts_again, workers_to_run


@pytest.mark.parametrize(
    ("possible", "num_lent", "num_running", "num_free", "to_run"),
    [
        (4, 0, 4, 0, 4),
        (4, 1, 4, 0, 3),  # lent
        (3, 1, 3, 0, 3),  # a lost node was one less already
        (4, 9, 4, 0, 2),  # never below min_workers
        (4, 0, 3, 0, 3),  # the loan is over, and its place is not free yet
        (4, 0, 3, 1, 4),
        (4, 0, 1, 1, 2),
        (4, 0, 0, 0, 4),  # no group: what ends makes room
        (1, 0, 2, 0, 1),  # Ray Train itself refuses fewer than min_workers
    ],
)
def test_workers_to_run(
    possible: int, num_lent: int, num_running: int, num_free: int, to_run: int
) -> None:
    found = workers_to_run(
        possible,
        num_lent=num_lent,
        min_workers=2,
        max_workers=4,
        num_running=num_running,
        num_free=num_free,
        counts={},
    )
    assert found == WorkerCount(to_run, spares=0)


WHOLE_NODES = dict.fromkeys(range(57, 64), 56)
"""Of 64 workers in groups of eight, where fewer would be slower in larger groups."""


@pytest.mark.parametrize(
    ("possible", "num_lent", "num_running", "num_free", "found"),
    [
        (64, 0, 64, 0, WorkerCount(64)),
        (63, 0, 0, 0, WorkerCount(56, spares=7)),  # a GPU is lost
        (63, 0, 56, 7, WorkerCount(56, spares=7)),  # and nothing changes while it is
        (62, 0, 0, 0, WorkerCount(56, spares=6)),  # nor with the next one
        (56, 0, 0, 0, WorkerCount(56)),
        (64, 0, 56, 7, WorkerCount(56, spares=7)),  # it is back, and not free yet
        (64, 0, 56, 8, WorkerCount(64)),
        (64, 3, 64, 0, WorkerCount(56, spares=5)),  # lent
        (64, 3, 56, 5, WorkerCount(56, spares=5)),
        (5, 0, 0, 0, WorkerCount(5)),
    ],
)
def test_workers_to_run__keeps_spares_where_the_plan_says_so(
    possible: int, num_lent: int, num_running: int, num_free: int, found: WorkerCount
) -> None:
    sizes = {"num_lent": num_lent, "num_running": num_running, "num_free": num_free}
    assert (
        workers_to_run(possible, min_workers=1, max_workers=64, **sizes, counts=WHOLE_NODES)
        == found
    )


@pytest.mark.parametrize(
    ("num_workers", "num_training", "num_lent", "starts"),
    [
        (3, 4, 0, False),  # a node is about to go
        (3, 3, 0, False),  # it is gone
        (4, 3, 0, False),  # it is back, and a worker joins the others
        (6, 4, 0, False),  # so do two
        (4, 6, 2, True),  # lent
        (4, 4, 2, False),  # the lost nodes were as many
        (3, 4, 3, True),
        (2, 2, 9, False),  # never below min_workers
    ],
)
def test_a_group_starts_again_only_where_its_workers_cannot_go_on(
    num_workers: int, num_training: int, num_lent: int, starts: bool
) -> None:
    assert (
        starts_again(
            num_workers,
            num_lent=num_lent,
            min_workers=2,
            max_workers=6,
            num_training=num_training,
            counts={},
        )
        == starts
    )


@pytest.mark.parametrize(
    ("num_training", "num_workers", "joins"),
    [(54, 56, True), (56, 64, False), (62, 64, False), (63, 64, True), (56, 57, True)],
)
def test_workers_join_one_by_one_only_through_numbers_that_it_runs(
    num_training: int, num_workers: int, joins: bool
) -> None:
    sizes = {"num_training": num_training, "counts": WHOLE_NODES}
    assert can_join(num_workers, **sizes) == joins
    bounds = {"num_lent": 0, "min_workers": 1, "max_workers": 64}
    assert starts_again(num_workers, **bounds, **sizes) != joins
