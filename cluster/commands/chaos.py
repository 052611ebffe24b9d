"""Injects faults into the local cluster at steps of a run: kills a worker, a node or the head, or
adds a node."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum

from cluster.local.local_cluster import LocalCluster
from cluster.output.progress import say
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, run_storage
from cluster.storage.uris import Storage, StorageError
from jobs.run.ledger import Ledger, Line

_POLL_S = 0.1
_PLANNED = "as planned: the failure that is told next is this one"


class FaultKind(StrEnum):
    KILL_WORKER = "kill-worker"  # SIGKILL to the process of the highest rank
    KILL_NODE = "kill-node"  # SIGKILL to the node that holds the highest rank
    KILL_HEAD = "kill-head"  # SIGKILL to the head, and with it to the job's driver
    ADD_NODE = "add-node"  # one more node joins


@dataclass(frozen=True)
class Fault:
    """A fault that happens once the run has completed `step`."""

    kind: FaultKind
    step: int

    @property
    def takes_a_node(self) -> bool:
        return self.kind is FaultKind.KILL_NODE


def parse_faults(words: Sequence[str]) -> list[Fault]:
    """Returns faults in the order of their steps, from words such as `kill-node@40`. Raises
    `ConfigError`."""
    faults = []
    for word in words:
        kind, _, step = word.partition("@")
        if kind not in list(FaultKind) or not step.isdecimal():
            raise ConfigError(
                f"--chaos {word!r}: expected FAULT@STEP with a fault among {', '.join(FaultKind)}"
            )
        faults.append(Fault(FaultKind(kind), int(step)))
    return sorted(faults, key=lambda fault: fault.step)


@contextmanager
def chaos(
    faults: Sequence[Fault], *, cluster: LocalCluster | None, config: RunConfig
) -> Iterator[None]:
    """Watches the run's ledger while the context lasts, and injects each fault when its step is
    reached."""
    ended = threading.Event()
    thread = threading.Thread(
        target=_inject, args=(faults, cluster, run_storage(config), ended), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _inject(
    faults: Sequence[Fault], cluster: LocalCluster | None, run: Storage, ended: threading.Event
) -> None:
    killed_attempt = 0
    for fault in faults:
        assert cluster is not None, "only a local cluster's processes may be killed"
        start: Line | None = None
        # After a kill the ledger still shows the attempt that was hit, until the next one has
        # started.
        while start is None or start["attempt"] <= killed_attempt:
            if ended.wait(_POLL_S):
                return
            start = _attempt_at(run, fault.step)
        worker = start["workers"][-1]
        if fault.kind is FaultKind.ADD_NODE:
            say(f"chaos: {cluster.add_node()} joined after step {fault.step}")
            continue
        killed_attempt = start["attempt"]
        if fault.kind is FaultKind.KILL_WORKER:
            say(f"chaos: SIGKILL to worker {worker['pid']} after step {fault.step}, {_PLANNED}")
            os.kill(worker["pid"], signal.SIGKILL)
        else:
            node = "head" if fault.kind is FaultKind.KILL_HEAD else worker["node"]
            say(f"chaos: SIGKILL to {node} after step {fault.step}, {_PLANNED}")
            cluster.kill_node(node)


def _attempt_at(run: Storage, step: int) -> Line | None:
    """Returns the start event of the current attempt once the run has completed `step`, until then
    None."""
    with suppress(StorageError):  # it is asked again
        ledger = Ledger.read(run)
        starts = ledger.events("start")
        steps = [line["step"] for line in ledger.lines if "event" not in line]
        return starts[-1] if starts and steps and steps[-1] >= step else None
    return None
