"""What the launcher of a run says: what the ledger tells of, and what the run waits for when it has no workers."""

from collections.abc import Mapping, Sequence

import ray

from cluster.config import ScalingConfig
from cluster.storage import Storage
from jobs.incidents import INCIDENTS
from jobs.ledger import Ledger, Line

REPEAT_S = 60.0

_MESSAGES = {
    "start": "attempt {attempt}: {world_size} workers, from step {step}",
    "failure": "a failure ({kind}, rank {rank}): {reason}",
    "hang": "rank {rank} hung for {seconds} s ({health}), its stack is in {stack}",
    "precision": "{reason}",
    "skip": "step {step} is skipped: {reason}",
    "rollback": "steps {first} to {last} are left out: {reason}",
    "preempted": "saved after step {step} on notice ({notice})",
}

TOLD = tuple(_MESSAGES)


def told(event: Line) -> str:
    """A line of the log for one of the events `TOLD`."""
    return _MESSAGES[event["event"]].format(**event)


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


class Patience:
    """Tells a run that has no workers from one that trains."""

    def __init__(self, run: Storage, scaling: ScalingConfig, before: Ledger) -> None:
        """`before` is what the run's ledger held before this launch."""
        self._run, self._scaling = run, scaling
        self._num_starts = len(before.world_sizes)
        self._num_lines = -1
        self._since_s = self._said_s = 0.0

    def message(self, ledger: Ledger, *, now_s: float) -> str | None:
        """What to say now, if anything: each minute at most."""
        if len(ledger.lines) != self._num_lines:
            self._num_lines, self._since_s, self._said_s = len(ledger.lines), now_s, 0.0
        idle_s = now_s - self._since_s
        if idle_s < self._scaling.start_timeout_s or (self._said_s and now_s - self._said_s < REPEAT_S):
            return None
        # A failure that no attempt has written down yet is one after which none has started.
        has_started = len(ledger.world_sizes) > self._num_starts
        if has_started and not any(self._run.child(INCIDENTS).list()):
            return None
        self._said_s = now_s
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return waiting_for(self._scaling, nodes=nodes, free=ray.available_resources(), idle_s=idle_s)
