"""The room that a cluster has for a run's workers, in words."""

from collections.abc import Mapping, Sequence

from cluster.settings.run import ScalingConfig

REPEAT_S = 60.0
"""Seconds between two messages of what a run waits for."""


def waiting_for(
    scaling: ScalingConfig, *, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float], idle_s: float
) -> str | None:
    """What a run lacks that has had no sign of a worker for `idle_s` seconds; None where it lacks nothing.

    `nodes` are the resources of each node that is alive, `free` those of the whole cluster that nobody uses.
    """
    needs = {"CPU": float(scaling.threads_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})
    room = sum(int(min(node.get(name, 0.0) // count for name, count in needs.items())) for node in nodes)
    free_room = min(room, *(int(free.get(name, 0.0) // count) for name, count in needs.items()))
    if free_room >= scaling.min_workers:
        return None
    each = " and ".join(f"{count:g} {name}{'s' * (count != 1)}" for name, count in needs.items())
    hint = "add nodes" if room < scaling.min_workers else "the rest is taken, or its workers are just starting"
    return (
        f"WAITING since {idle_s:.0f} s: the run needs {scaling.min_workers} workers of {each}, the cluster has room "
        f"for {room} on {len(nodes)} nodes, {free_room} of them free: {hint} (scaling.min_workers)"
    )
