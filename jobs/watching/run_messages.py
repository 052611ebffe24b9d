"""The lines that a run's launcher logs: events of the ledger, and what the run waits for while it has no workers."""

import ray

from cluster.settings.run import ScalingConfig
from cluster.storage.uris import Storage
from jobs.run.ledger import Ledger, Line
from jobs.workers.incident_notes import INCIDENTS
from jobs.workers.room import REPEAT_S, waiting_for

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
        if idle_s < REPEAT_S or (self._said_s and now_s - self._said_s < REPEAT_S):
            return None
        # A failure that no attempt has written down yet is one after which none has started.
        has_started = len(ledger.world_sizes) > self._num_starts
        if has_started and not any(self._run.child(INCIDENTS).list()):
            return None
        self._said_s = now_s
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return waiting_for(self._scaling, nodes=nodes, free=ray.available_resources(), idle_s=idle_s)
