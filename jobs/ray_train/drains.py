"""Tells the workers of a group which of their nodes are to go, and when.

Ray Train's own watch knows the workers with which a group began, takes one moment for all nodes, and
is a process of its own for each group.
"""

import sys
import threading
from collections import defaultdict
from typing import Any

from ray._private.state import state
from ray.exceptions import RayError
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from jobs.workers.failures import one_line

_POLL_S = 1.0


class Drains(WorkerGroupCallback):
    """Watches for draining nodes as long as a group lasts, in Ray Train's controller."""

    def __init__(self) -> None:
        self._ended: threading.Event | None = None  # of the newest group

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._end_watch()
        self._ended = threading.Event()
        threading.Thread(
            target=_watch, args=(worker_group, self._ended), name="drains", daemon=True
        ).start()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._end_watch()

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        self._end_watch()

    def _end_watch(self) -> None:
        if self._ended is not None:
            self._ended.set()


def _watch(worker_group: Any, ended: threading.Event) -> None:
    told: dict[Any, PreemptionInfo] = {}  # by the worker's actor
    while not ended.wait(_POLL_S):
        try:
            draining = state.get_draining_nodes()
        except (RayError, RuntimeError) as error:
            sys.stderr.write(f"which nodes drain is not known: {one_line(str(error))}\n")
            continue
        nodes = {worker.actor: worker.metadata.node_id for worker in worker_group.get_workers()}
        news = {
            actor: info
            for actor, info in news_by_actor(nodes, draining).items()
            if told.get(actor) != info
        }
        for actor, info in news.items():
            actor.mark_preempt.remote(info)
        told |= news


def news_by_actor(nodes: dict[Any, str], draining: dict[str, int]) -> dict[Any, PreemptionInfo]:
    """Returns what each worker is told, if any of their nodes drains: all the seats that go, and when
    its own node does, in milliseconds of UNIX time. `nodes` has the workers in the order of their
    seats."""
    going: dict[str, list[int]] = defaultdict(list)
    for seat, node in enumerate(nodes.values()):
        if node in draining:
            going[node].append(seat)
    if not going:
        return {}
    return {
        actor: PreemptionInfo(
            deadline_ms=draining.get(node) or None, preempted_node_to_ranks=dict(going)
        )
        for actor, node in nodes.items()
    }
