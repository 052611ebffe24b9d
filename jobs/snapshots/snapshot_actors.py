"""One keeper a node: started, watched and made to copy by the run's launcher, found by its workers."""

import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.ray_train.cluster_view import renew_view
from jobs.run.run_plan import RunPlan
from jobs.snapshots.choice import Holding, copies
from jobs.snapshots.snapshot_actor import Keeper

_POLL_S = 0.5
_ANSWER_S = 2.0  # a keeper whose node is gone never answers
_COPY_S = 60.0  # at most
_COPY_SHARE = 0.05  # of the time


def find_keepers(launch: str) -> dict[str, Any]:
    """The keepers of a launch, by their nodes' ids."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in named if actor["namespace"] == launch]
    found = {}
    for name in names:
        try:
            found[name] = ray.get_actor(name, namespace=launch)
        except ValueError:
            continue  # it has just ended
    return found


def ask(references: Mapping[str, Any]) -> dict[str, Any]:
    """The answers, by node, of those that are alive."""
    nodes = {reference: node for node, reference in references.items()}
    ready, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=_ANSWER_S) if nodes else ([], [])
    answers = {}
    for reference in ready:
        try:
            answers[nodes[reference]] = ray.get(reference)
        except RayError:  # of an actor that is gone; there are several
            continue
    return answers


class Keepers:
    """While the context lasts, every node that can hold a worker has a keeper, and each snapshot a second node."""

    def __init__(self, plan: RunPlan) -> None:
        assert plan.launch is not None
        self._plan, self._launch = plan, plan.launch
        self._keepers: dict[str, Any] = {}
        self._newest_step = -1
        self.snapshot_time_s: float | None = None
        """When a newer one was first seen, Unix time."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="keepers", daemon=True)

    def __enter__(self) -> Self:
        self._start_missing()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        for keeper in self._keepers.values():
            ray.kill(keeper)

    def _work(self) -> None:
        copied_until = 0.0
        while not self._ended.wait(_POLL_S):
            self._start_missing()
            if time.monotonic() < copied_until:
                continue
            answers = ask({node: keeper.holdings.remote(verify=False) for node, keeper in self._keepers.items()})
            holdings = [held for found in answers.values() for held in found]
            newest = max((held.step for held in holdings), default=-1)
            if newest != self._newest_step:
                self._newest_step, self.snapshot_time_s = newest, time.time()
            start = time.monotonic()
            self._copy(holdings, list(answers))
            copied_until = time.monotonic() + (time.monotonic() - start) / _COPY_SHARE

    def _start_missing(self) -> None:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        capable = [node["NodeID"] for node in nodes if node["Resources"].get("CPU")]
        if set(capable) != set(self._keepers):
            renew_view()
        self._keepers = {node: keeper for node, keeper in self._keepers.items() if node in capable}
        for node in capable:
            if node not in self._keepers:
                self._keepers[node] = self._start(node)

    def _start(self, node: str) -> Any:
        options = {
            "name": node,
            "namespace": self._launch,
            "num_cpus": 0,
            "max_restarts": -1,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        return (
            ray.remote(Keeper)
            .options(**options)
            .remote(identity=self._plan.identity, max_bytes=self._plan.config.checkpoint.snapshot_bytes)
        )

    def _copy(self, holdings: Sequence[Holding], nodes: Sequence[str]) -> None:
        for held, target in copies(holdings, nodes):
            ray.wait([self._keepers[target].copy.remote(held, self._keepers[held.node])], timeout=_COPY_S)
