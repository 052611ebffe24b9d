"""Where a run's workers compute: the room that a cluster lacks for them, and the precision that is
fast there."""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from cluster.local.local_cluster import NODE_NAME_VARIABLE
from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.run import ScalingConfig
from jobs.workers.left_out_nodes import KUBERNETES_NODE_VARIABLE
from model.hardware.processor import Device, fast_precision
from model.numerics import NUMERICS, Precision

# Without workers before a run says what it waits for, and between two such messages
REPEAT_S = 60.0

_MARKET = "ray.io/market-type"
"""Ray's label of a node that says how it is paid for: `spot` or `on-demand`."""


def place_here(*, on_ray: bool) -> dict[str, Any]:
    """Returns where this worker computes: its process, its node, and how that is paid for, if Ray
    knows it."""
    place: dict[str, Any] = {
        "pid": os.getpid(),
        "node": os.environ.get(NODE_NAME_VARIABLE, socket.gethostname()),
        "node_id": None,
        "kubernetes_node": os.environ.get(KUBERNETES_NODE_VARIABLE),
    }
    if not on_ray:
        return place
    context = ray.get_runtime_context()
    market = context.get_node_labels().get(_MARKET)
    return place | {"node_id": context.get_node_id()} | ({"market": market} if market else {})


def waiting_for(
    scaling: ScalingConfig,
    *,
    nodes: Sequence[Mapping[str, float]],
    free: Mapping[str, float],
    idle_s: float,
) -> str | None:
    """Returns what is missing for a run that has had no workers for `idle_s` seconds; None if
    nothing is.

    `nodes` has the resources of each living node, `free` the unused ones of the whole cluster.
    """
    needs = {"CPU": float(scaling.threads_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})
    room = sum(
        int(min(node.get(name, 0.0) // count for name, count in needs.items())) for node in nodes
    )
    free_room = min(room, *(int(free.get(name, 0.0) // count) for name, count in needs.items()))
    if free_room >= scaling.min_workers:
        return None
    each = " and ".join(f"{count:g} {name}{'s' * (count != 1)}" for name, count in needs.items())
    hint = (
        "add nodes"
        if room < scaling.min_workers
        else "the rest is taken, or its workers are just starting"
    )
    return (
        f"WAITING since {idle_s:.0f} s: the run needs {counted(scaling.min_workers, 'worker')} of {each}, the cluster "
        f"has room for {room} on {counted(len(nodes), 'node')}, {free_room} of them free: {hint} (scaling.min_workers)"
    )


def workers_precision(scaling: ScalingConfig) -> Precision:
    """Returns the precision that a training worker's processor computes at speed, as a task there
    finds it when the run first starts; later hardware keeps it. The launcher's own processor may be
    of another kind. Prints what it waits for while there is no place. On this machine alone no task
    is needed, whose process would take two seconds to start."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    if not scaling.use_gpu and {node["NodeManagerHostname"] for node in alive} == {
        socket.gethostname()
    }:
        return fast_precision("cpu")
    task = ray.remote(fast_precision).options(
        num_cpus=scaling.threads_per_worker, num_gpus=int(scaling.use_gpu), max_retries=-1
    )
    asked = task.remote("cuda" if scaling.use_gpu else "cpu")
    idle_s = 0.0
    while not ray.wait([asked], timeout=REPEAT_S)[0]:
        idle_s += REPEAT_S
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if message := waiting_for(
            scaling, nodes=nodes, free=ray.available_resources(), idle_s=idle_s
        ):
            say(message)
    precision: Precision = ray.get(asked)
    return precision


def at_odds(precision: Precision, device: Device) -> dict[str, Any] | None:
    """Returns the ledger's event where this processor computes another precision at speed than the
    run's, else None."""
    fast = fast_precision(device)
    if fast == precision:
        return None
    is_emulated = NUMERICS[precision].needs_units
    why = (
        ", which this processor emulates"
        if is_emulated
        else f"; this processor computes {fast} at speed"
    )
    return {
        "precision": precision,
        "fast": fast,
        "reason": f"the run computes in {precision}, as it began{why}",
    }
