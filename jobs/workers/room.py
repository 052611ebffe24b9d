"""Describes the room that a cluster lacks for a run's workers."""

from collections.abc import Mapping, Sequence

from cluster.settings.run import ScalingConfig

REPEAT_S = 60.0
"""Seconds without workers before a run says what it waits for, and between two such messages."""


def waiting_for(
    scaling: ScalingConfig, *, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float], idle_s: float
) -> str | None:
    """Returns what is missing for a run that has had no workers for `idle_s` seconds; None if nothing is.

    `nodes` has the resources of each living node, `free` the unused ones of the whole cluster.
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
