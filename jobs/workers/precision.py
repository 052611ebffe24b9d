"""Chooses a run's precision by the processor of a worker's place as the run first starts; later hardware keeps it."""

import socket
from typing import Any

import ray

from cluster.output.progress import say
from cluster.settings.run import ScalingConfig
from jobs.workers.room import REPEAT_S, waiting_for
from model.processor import Device, Precision, fast_precision


def workers_precision(scaling: ScalingConfig) -> Precision:
    """Returns the precision that a training worker's processor computes at speed, as a task there finds it: the
    launcher's own processor may be of another kind. Prints what it waits for while there is no place. On a cluster of
    this machine alone no task is needed, whose process would take two seconds to start."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    if not scaling.use_gpu and {node["NodeManagerHostname"] for node in alive} == {socket.gethostname()}:
        return fast_precision("cpu")
    task = ray.remote(fast_precision).options(
        num_cpus=scaling.threads_per_worker, num_gpus=int(scaling.use_gpu), max_retries=-1
    )
    asked = task.remote("cuda" if scaling.use_gpu else "cpu")
    idle_s = 0.0
    while not ray.wait([asked], timeout=REPEAT_S)[0]:
        idle_s += REPEAT_S
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if message := waiting_for(scaling, nodes=nodes, free=ray.available_resources(), idle_s=idle_s):
            say(message)
    precision: Precision = ray.get(asked)
    return precision


def at_odds(precision: Precision, device: Device) -> dict[str, Any] | None:
    """Returns the ledger's event where this processor computes another precision at speed than the run's, else None."""
    fast = fast_precision(device)
    if fast == precision:
        return None
    why = "; this processor computes bf16 at speed" if precision == "fp32" else ", which this processor emulates"
    return {"precision": precision, "fast": fast, "reason": f"the run computes in {precision}, as it began{why}"}
