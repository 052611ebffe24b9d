"""What lasts as long as a group of Ray Train's does."""

import threading
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback


class GroupWatch(WorkerGroupCallback):
    """A callback with threads of its own in Ray Train's controller, which end with the group."""

    def __init__(self) -> None:
        # Of the newest group; none yet, as an event does not travel to the controller
        self._ended: threading.Event | None = None

    def _begin_watch(self) -> threading.Event:
        """Returns what is set once the group that has started ends."""
        self._end_watch()
        self._ended = threading.Event()
        return self._ended

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._end_watch()

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        self._end_watch()

    def _end_watch(self) -> None:
        if self._ended is not None:
            self._ended.set()
