"""One rank of several in this process, of which no other one sends anything."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from raymill.workers.worker_group import WorkerGroup


@contextmanager
def rank_0_of(world_size: int) -> Iterator[WorkerGroup]:
    """Lasts while this process is one of so many. What it would receive is whatever its memory
    holds."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(dist, "batch_isend_irecv", lambda messages: [])
            yield WorkerGroup(0, world_size)
    finally:
        dist.destroy_process_group()
