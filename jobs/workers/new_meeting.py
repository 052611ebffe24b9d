"""A round of a run's workers, whose messages tests may interrupt."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model.files.failpoints import failpoint
from raymill.workers.progress import CPU, Progress
from raymill.workers.worker_group import Meeting


class _Interrupted(Progress):
    @contextmanager
    def message(self, ranks: range, device: torch.device = CPU) -> Iterator[None]:
        failpoint("before_message")
        with super().message(ranks, device):
            failpoint("in_message")
            yield


def new_meeting(number: int = 0) -> Meeting:
    """Returns the round of this number, in which nothing was sent yet."""
    return Meeting(number, progress=_Interrupted())
