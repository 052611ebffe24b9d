"""Replays a trace of spot nodes on a local cluster: nodes come, are warned, and go when the trace says
so.

Which node goes is drawn once from a seed, so that all contenders lose the same ones. A node needs
seconds to start, of which the trace knows nothing: it counts from when Ray has it.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.local.jobs_api import ClusterError
from cluster.local.local_cluster import LocalCluster
from jobs.plan.spot_trace import SpotTrace
from tests.benchmarks.goodput.drain import Drainer
from tests.benchmarks.goodput.records import NodeCount

_MOST_STARTING = 2
"""Nodes that start at once: Ray gives each 15 s, which more have not on two cores."""

_TICK_S = 0.1
_LOOK_S = 0.5  # between looks for nodes that have come


@dataclass(frozen=True)
class Lifetime:
    """A node of the trace, in its seconds; one without an end is there to the last."""

    start_s: float
    end_s: float | None


def lifetimes(trace: SpotTrace, *, seed: int) -> list[Lifetime]:
    """Returns the nodes of a trace, in the order in which they come; which goes is drawn."""
    rng = random.Random(seed)
    alive: list[int] = []
    starts: list[float] = []
    ends: dict[int, float] = {}
    for seconds, nodes in trace.changes:
        while len(alive) > nodes:
            ends[alive.pop(rng.randrange(len(alive)))] = seconds
        while len(alive) < nodes:
            alive.append(len(starts))
            starts.append(seconds)
    return [Lifetime(start, ends.get(number)) for number, start in enumerate(starts)]


class Watcher(Protocol):
    """What is told of the nodes. All calls come from the thread that replays."""

    def node_came(self, name: str) -> None: ...

    def node_warned(self, name: str, deadline_s: float) -> None:
        """The node goes at this UNIX time."""

    def node_went(self, name: str) -> None: ...

    def tick(self) -> None:
        """Called some times a second."""


@dataclass
class Replay:
    """The nodes of a cluster as a trace has them. `notice_s` is how long before its end a node is
    warned; None kills without notice."""

    cluster: LocalCluster
    drainer: Drainer
    watcher: Watcher
    notice_s: float | None
    counts: list[NodeCount] = field(default_factory=list)
    _waiting: list[int] = field(default_factory=list)  # the trace's nodes to be launched next
    _names: dict[int, str] = field(default_factory=dict)  # of the trace's nodes that are launched
    _ids: dict[str, str] = field(default_factory=dict)  # of the nodes that Ray has, by name
    _looked_s: float = 0.0

    def run(self, nodes: Sequence[Lifetime], *, initial: Sequence[str], duration_s: float) -> float:
        """Replays until the trace's end, and returns the Unix time then. `initial` names the nodes
        that are there already: those of the trace that begin at 0."""
        begun_s = time.time()
        self._names = dict(enumerate(initial))
        self._ids = self._seen()
        self._count()
        due = self._actions(nodes, begun_s)
        while (now_s := time.time()) < begun_s + duration_s:
            while due and due[0][0] <= now_s - begun_s:
                due.pop(0)[1]()
            self._see_new_nodes()
            self.watcher.tick()
            time.sleep(_TICK_S)
        return time.time()

    def see_first_nodes(self) -> list[str]:
        """Tells the watcher of the nodes that are there before the clock begins; returns their
        names."""
        self._ids = self._seen()
        names = sorted(self._ids)
        for name in names:
            self.watcher.node_came(name)
        return names

    def _actions(
        self, nodes: Sequence[Lifetime], begun_s: float
    ) -> list[tuple[float, Callable[[], None]]]:
        """Returns what is to be done, by the second."""
        actions: list[tuple[float, Callable[[], None]]] = []

        def warn(number: int, end_s: float) -> None:
            if number in self._names:
                self._warn(self._names[number], begun_s + end_s)

        for number, node in enumerate(nodes):
            if number not in self._names:
                actions.append((node.start_s, lambda n=number: self._waiting.append(n)))
            if node.end_s is not None:
                if self.notice_s:
                    warned_s = max(node.start_s, node.end_s - self.notice_s)
                    actions.append((warned_s, lambda n=number, end=node.end_s: warn(n, end)))
                actions.append((node.end_s, lambda n=number: self._kill(n)))
        return sorted(actions, key=lambda action: action[0])

    def _warn(self, name: str, deadline_s: float) -> None:
        if name not in self._ids:  # it never came
            return
        self.drainer.drain(self._ids[name], deadline_s=deadline_s)
        self.watcher.node_warned(name, deadline_s)

    def _launch(self) -> None:
        """Launches those that have to wait no longer, and those again that Ray has given up."""
        running = self.cluster.node_names
        ended = [number for number, name in self._names.items() if name not in running]
        for number in ended:
            self._forget(self._names.pop(number))
        self._waiting = ended + self._waiting
        num_starting = len(self._names) - len(self._ids)
        for _ in range(min(len(self._waiting), _MOST_STARTING - num_starting)):
            self._names[self._waiting.pop(0)] = self.cluster.add_node(wait=False)

    def _kill(self, number: int) -> None:
        if number in self._waiting:
            self._waiting.remove(number)
            return
        name = self._names.pop(number)
        self.cluster.kill_node(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        """Counts a node no more, if it had come at all."""
        if self._ids.pop(name, None) is not None:
            self._count()
            self.watcher.node_went(name)

    def _see_new_nodes(self) -> None:
        if time.monotonic() < self._looked_s + _LOOK_S:
            return
        self._looked_s = time.monotonic()
        seen = self._seen()
        for name in seen.keys() - self._ids.keys():
            self._ids[name] = seen[name]
            self._count()
            self.watcher.node_came(name)
        self._launch()

    def _seen(self) -> dict[str, str]:
        """Returns the ids of the nodes that Ray has and that run, without the head, by name."""
        try:
            rows = self.cluster.jobs_api.alive_nodes()
        except ClusterError:  # it is busy; the next look is soon
            return dict(self._ids)
        running = self.cluster.node_names[1:]
        return {row["node_name"]: row["node_id"] for row in rows if row["node_name"] in running}

    def _count(self) -> None:
        self.counts.append(NodeCount(time.time(), len(self._ids)))
