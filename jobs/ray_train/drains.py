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

from jobs.ray_train.group_watch import GroupWatch
from jobs.workers.failures import one_line

_POLL_S = 1.0


class Drains(GroupWatch):
    """Watches for draining nodes as long as a group lasts."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        threading.Thread(
            target=_watch, args=(worker_group, self._begin_watch()), name="drains", daemon=True
        ).start()


def _watch(worker_group: Any, ended: threading.Event) -> None:
    told: dict[Any, PreemptionInfo] = {}  # by the worker's actor
    while not ended.wait(_POLL_S):
        try:
            draining, workers = state.get_draining_nodes(), worker_group.get_workers()
        except (RayError, RuntimeError) as error:
            sys.stderr.write(f"which nodes drain is not known: {one_line(str(error))}\n")
            continue
        except ValueError:  # the group has just ended
            return
        news = news_by_actor(
            {worker.actor: worker.metadata.node_id for worker in workers}, draining
        )
        for actor, info in news.items():
            if told.get(actor) != info:
                actor.mark_preempt.remote(info)
        told = news


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
