"""Updates Ray's view of the cluster, by which it plans an elastic group, when nodes have died."""

import socket
import time
from collections.abc import Iterable

import ray

_ANSWER_S = 2.0
_POLL_S = 0.2


def renew_view() -> None:
    """Makes Ray look now at the nodes from which it plans an elastic group; by itself it does so
    every 20 s."""
    try:
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    except ValueError:  # there is none without an elastic group
        return
    ray.wait([coordinator._tick.remote()], timeout=_ANSWER_S)


def gone_nodes(node_ids: Iterable[str]) -> set[str]:
    """Returns the nodes that have died. Asks their raylets too, since the head learns of a death
    some seconds later."""
    known = {node["NodeID"]: node for node in ray.nodes()}
    return {node_id for node_id in node_ids if not _answers(known.get(node_id))}


def wait_until_known(gone: set[str], *, timeout_s: float = 20.0) -> None:
    """Waits until the head knows that these nodes have died, so that it plans nothing on them, or
    until time is up."""
    deadline_s = time.monotonic() + timeout_s
    while (
        any(node["Alive"] and node["NodeID"] in gone for node in ray.nodes())
        and time.monotonic() < deadline_s
    ):
        time.sleep(_POLL_S)


def _answers(node: dict | None) -> bool:
    if node is None or not node["Alive"]:
        return False
    try:
        socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_ANSWER_S
        ).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass  # a node that is cut off or stopped: the head's health checks decide
    return True
