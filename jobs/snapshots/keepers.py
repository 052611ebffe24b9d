"""One keeper per node: a process that outlives the worker groups and owns the memory that snapshots lie in.

The memory has no name in any file system: workers reach it through the keeper's /proc entry, other nodes through its
methods, and it is gone with the keeper, which ends with the launcher. So nothing is ever left behind.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.ray_train.cluster_view import renew_view
from jobs.run.run_plan import RunPlan
from jobs.snapshots.choice import Holding, copies, copy_area
from jobs.snapshots.slots import NUM_SLOTS, Bytes, Slots, checksum_of

CHUNK_BYTES = 16 << 20  # of one message of a transfer between nodes
_POLL_S = 0.5
ANSWER_S = 2.0  # a keeper whose node is gone never answers
READ_BYTES_PER_S = 0.4e9  # a tenth of what a keeper reads on two busy cores
_COPY_S = 60.0  # at most

Key = TypeVar("Key")
_COPY_SHARE = 0.05  # of the time


class Keeper:
    """The actor on one node: pairs of slots ("areas") by name, up to `max_bytes`."""

    def __init__(self, *, node: str, max_bytes: int) -> None:
        self._node, self._max_bytes = node, max_bytes
        self._areas: dict[str, tuple[int, Slots]] = {}

    def open(self, area: str, num_bytes: int) -> str | None:
        """Returns the path of an area for states of so many bytes, or None where memory does not suffice.

        An existing area of the same size keeps its content.
        """
        needed = Slots.bytes_needed(num_bytes)
        if area in self._areas and os.fstat(self._areas[area][0]).st_size != needed:
            self._close(area)
        if area not in self._areas:
            if needed + sum(os.fstat(descriptor).st_size for descriptor, _ in self._areas.values()) > self._max_bytes:
                return None
            descriptor = os.memfd_create(f"raymill-{area}")
            os.ftruncate(descriptor, needed)
            self._areas[area] = (descriptor, Slots(descriptor))
        return self.path(area)

    def path(self, area: str) -> str:
        return f"/proc/{os.getpid()}/fd/{self._areas[area][0]}"

    def close_older(self, attempt: int) -> None:
        """Frees the areas that hold nothing as new as the attempt."""
        for area, (_, slots) in list(self._areas.items()):
            found = [header for slot in range(NUM_SLOTS) if (header := slots.header(slot))]
            if found and max(header.attempt for header in found) < attempt:
                self._close(area)

    def _close(self, area: str) -> None:
        os.close(self._areas.pop(area)[0])

    def holdings(self) -> list[Holding]:
        """Returns the sealed slots."""
        return [
            Holding(self._node, area, slot, header)
            for area, (_, slots) in self._areas.items()
            for slot in range(NUM_SLOTS)
            if (header := slots.header(slot))
        ]

    def is_whole(self, held: Holding) -> bool:
        """Reports whether the slot was not written again since and its data match its checksum; reads all of them."""
        slots = self._areas[held.area][1] if held.area in self._areas else None
        return slots is not None and slots.holds(held.header, held.slot) and slots.is_whole(held.slot)

    def chunk(self, held: Holding, start: int) -> Bytes | None:
        """Returns a copy of at most `CHUNK_BYTES`, or None when the slot was written again since."""
        if held.area not in self._areas:
            return None
        slots = self._areas[held.area][1]
        content = slots.data(held.slot)[start : start + CHUNK_BYTES].copy()
        return content if slots.holds(held.header, held.slot) else None

    def copy(self, held: Holding, other: Any) -> None:
        """Copies a slot of another node's keeper, unless that is gone or there is no room."""
        try:
            data = fetch(held, other)
        except RayError:  # the other keeper ended, most likely with its node
            return
        area = copy_area(held)
        if data is not None and self.open(area, data.size) is not None:
            self._areas[area][1].write(held.header, list(data.reshape(len(held.header.names), -1)))


def fetch(held: Holding, keeper: Any) -> Bytes | None:
    """Returns the data of a slot of another node's keeper, or None when it was written again meanwhile."""
    header = held.header
    data = np.empty(header.num_bytes, np.uint8)
    for start in range(0, data.size, CHUNK_BYTES):
        chunk = ray.get(keeper.chunk.remote(held, start))
        if chunk is None:
            return None
        piece = data[start : start + CHUNK_BYTES]
        piece[:] = chunk[: piece.size]
    return data if checksum_of(data, header.names) == header.checksum else None


def find_keepers(launch: str) -> dict[str, Any]:
    """Returns the keepers of a launch by the ids of their nodes."""
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == launch:
            try:
                found[actor["name"]] = ray.get_actor(actor["name"], namespace=launch)
            except ValueError:
                continue  # it has just ended
    return found


def ask(references: Mapping[Key, Any], *, num_bytes: int = 0) -> dict[Key, Any]:
    """Returns the answers of the keepers that are alive, which read `num_bytes` for them."""
    keys = {reference: key for key, reference in references.items()}
    timeout_s = ANSWER_S + num_bytes / READ_BYTES_PER_S
    ready, _ = ray.wait(list(keys), num_returns=len(keys), timeout=timeout_s) if keys else ([], [])
    answers = {}
    for reference in ready:
        try:
            answers[keys[reference]] = ray.get(reference)
        except RayError:  # a dead actor raises one of several kinds
            continue
    return answers


class Keepers:
    """Keeps, while the context lasts, a keeper on every node that can hold a worker, and each snapshot on two nodes."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._keepers: dict[str, Any] = {}
        self._newest_step = -1
        self.snapshot_time_s: float | None = None  # Unix time at which the newest snapshot was first seen
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="keepers", daemon=True)

    def __enter__(self) -> Self:
        self._start_missing()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
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
            answers = ask({node: keeper.holdings.remote() for node, keeper in self._keepers.items()})
            holdings = [held for found in answers.values() for held in found]
            newest = max((held.header.step for held in holdings), default=-1)
            if newest != self._newest_step:
                self._newest_step, self.snapshot_time_s = newest, time.time()
            start = time.monotonic()
            self._copy(holdings, list(answers))
            copied_until = time.monotonic() + (time.monotonic() - start) / _COPY_SHARE

    def _start_missing(self) -> None:
        capable = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if set(capable) != set(self._keepers):
            renew_view()
        self._keepers = {node: self._keepers.get(node) or self._start(node) for node in capable}

    def _start(self, node: str) -> Any:
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = ray.remote(Keeper).options(
            name=node, namespace=self._plan.launch, num_cpus=0, max_restarts=-1, scheduling_strategy=place
        )
        return actor.remote(node=node, max_bytes=self._plan.config.checkpoint.snapshot_bytes)

    def _copy(self, holdings: Sequence[Holding], nodes: Sequence[str]) -> None:
        for held, target in copies(holdings, nodes):
            ray.wait([self._keepers[target].copy.remote(held, self._keepers[held.node])], timeout=_COPY_S)
