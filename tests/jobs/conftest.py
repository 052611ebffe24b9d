"""A one-node Ray for the data stages, which the files that use it share."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.lanes import lane_of
from tests.local_ray import local_ray

_NUM_WORKERS = 3
_running: list[ExitStack] = []
"""What ends the shared Ray, while it runs."""


@pytest.fixture(scope="module")
def ray_workers(s3_server: str) -> int:
    """Three Ray workers that can import the stages and reach the S3 server; gives their number.
    They are started for the first file that asks for them, and end with the last one of its
    lane."""
    if not _running:
        keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        stack = ExitStack()
        stack.enter_context(local_ray(num_cpus=_NUM_WORKERS, environment=keys))
        _running.append(stack)
    return _NUM_WORKERS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Ends the shared Ray behind its lane: a process has one Ray, and other files start their
    own. Ends the process group that a failed test left behind: a process has one, and the tests
    after it are to fail for nothing but themselves."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
    is_last = nextitem is None or _lane(nextitem) != _lane(item)
    while is_last and _running:
        _running.pop().close()


def _lane(item: pytest.Item) -> str | None:
    return lane_of(item.nodeid.split("::")[0])
