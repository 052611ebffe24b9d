"""The lending policy: the number of workers that a run keeps."""

import pytest

from jobs.ray_train.worker_backend import workers_to_run


@pytest.mark.parametrize(
    ("possible", "num_lent", "num_running", "num_free", "to_run"),
    [
        (4, 0, 4, 0, 4),
        (4, 1, 4, 0, 3),  # lent
        (3, 1, 3, 0, 3),  # a lost node was one less already
        (4, 9, 4, 0, 2),  # never below min_workers
        (4, 0, 3, 0, 3),  # the loan is over, and its place is not free yet
        (4, 0, 3, 1, 4),
        (4, 0, 0, 0, 4),  # no group: what ends makes room
        (1, 0, 2, 0, 1),  # Ray Train itself refuses fewer than min_workers
    ],
)
def test_workers_to_run(possible: int, num_lent: int, num_running: int, num_free: int, to_run: int) -> None:
    assert to_run == workers_to_run(
        possible, num_lent=num_lent, min_workers=2, max_workers=4, num_running=num_running, num_free=num_free
    )
