"""One keeper per node: a process that outlives the worker groups and owns the memory that snapshots
lie in.

The memory has no name in any file system: workers reach it through the keeper's /proc entry, other
nodes through its methods, and it is gone with the keeper, which ends with the launcher. So nothing
is ever left behind. A keeper does without PyTorch, which would take 200 MB of each node.
"""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.ray_train.cluster_view import renew_view
from jobs.snapshots.choice import COPIES, ONLY, Holding, copies, num_slots
from jobs.snapshots.slots import Bytes, Checksum, Slots

CHUNK_BYTES = 16 << 20  # of one message of a transfer between nodes
_POLL_S = 0.5
ANSWER_S = 2.0  # a keeper whose node is gone never answers
_PATIENCE_S = 20.0  # more, for one whose node is alive
READ_BYTES_PER_S = 0.4e9  # a tenth of what a keeper reads on two busy cores
_COPY_S = 60.0  # at most
_COPY_SHARE = 0.05  # of the time
_MEMORY_SHARE = 0.5  # of what Ray counts as a node's, where the settings say nothing

Key = TypeVar("Key")


@dataclass(frozen=True)
class NoRoom:
    """A keeper's refusal to open an area."""

    reason: str


class Keeper:
    """The actor on one node: pairs of slots ("areas") by name, up to `max_bytes`."""

    def __init__(self, *, node: str, max_bytes: int) -> None:
        self._node, self._max_bytes = node, max_bytes
        self._areas: dict[str, Slots] = {}
        self._openers: dict[str, int] = {}  # the newest attempt that asked for each area
        self._changing = threading.Lock()  # `copy` opens areas in its own thread

    def open(self, area: str, num_bytes: int, attempt: int) -> str | NoRoom:
        """Returns the path of an area for an attempt's shares of so many bytes; one of this size is
        left as it is.

        Where there is no room, areas of older attempts are freed, the oldest first, as many as it
        takes; none where all of them would not make room. So what the attempt continues from goes
        last, when the next state is about to be written in its place.
        """
        needed = Slots.bytes_needed(num_bytes, num_slots(area))
        with self._changing:
            if area in self._areas and self._areas[area].size != needed:
                del self._areas[area]
            if area not in self._areas:
                if not self._made_room(needed, attempt):
                    return NoRoom(
                        f"node {self._node} allows {self._max_bytes / 1e9:.1f} GB for them (checkpoint.snapshot_bytes, "
                        f"or half of its memory), of which {self._used_bytes() / 1e9:.1f} GB are used, and one more "
                        f"share takes {needed / 1e9:.1f} GB"
                    )
                descriptor = os.memfd_create(f"raymill-{area}")
                os.ftruncate(descriptor, needed)
                self._areas[area] = Slots(descriptor, num_slots(area))
            self._openers[area] = max(attempt, self._openers.get(area, 0))
            return self.path(area)

    def path(self, area: str) -> str:
        return f"/proc/{os.getpid()}/fd/{self._areas[area].file.fileno()}"

    def _used_bytes(self) -> int:
        return sum(slots.size for slots in self._areas.values())

    def _made_room(self, needed_bytes: int, newest: int) -> bool:
        missing_bytes = self._used_bytes() + needed_bytes - self._max_bytes
        to_free = []
        for attempt, area in sorted((self._attempt(area), area) for area in self._areas):
            if missing_bytes > 0 and attempt < newest:
                missing_bytes -= self._areas[area].size
                to_free.append(area)
        if missing_bytes > 0:
            return False
        for area in to_free:
            del self._areas[area]
        return True

    def _attempt(self, area: str) -> int:
        """Returns the newest attempt that wrote into an area or asked for it."""
        slots = self._areas[area]
        headers = [slots.header(slot) for slot in slots.numbers]
        return max([self._openers[area], *(header.attempt for header in headers if header)])

    def close_older(self, attempt: int) -> None:
        """Frees the areas that no attempt as new as this one wrote into or asked for."""
        with self._changing:
            for area in list(self._areas):
                if self._attempt(area) < attempt:
                    del self._areas[area]

    def holdings(self) -> list[Holding]:
        """Returns the sealed slots."""
        holdings = []
        for area, slots in list(self._areas.items()):  # `copy` opens areas in its own thread
            for slot in slots.numbers:
                header = slots.header(slot)
                if header is not None:
                    holdings.append(Holding(self._node, area, slot, header))
        return holdings

    def is_whole(self, held: Holding) -> bool:
        """Reports whether the slot was not written again since and its data match its checksum;
        reads all of them."""
        slots = self._areas.get(held.area)
        if slots is None or not slots.holds(held.header, held.slot):
            return False
        return slots.is_whole(held.slot)

    def pin(self, held: Holding, seconds: float) -> bool:
        """Keeps a slot from being written for so long. Returns False if it was written again
        before."""
        slots = self._areas.get(held.area)
        if slots is None:
            return False
        slots.pin(held.slot, seconds)
        return slots.holds(held.header, held.slot)

    def chunk(self, held: Holding, start: int, stop: int) -> Bytes | None:
        """Returns a copy of some of the data, or None when the slot was written again since."""
        slots = self._areas.get(held.area)
        if slots is None:
            return None
        content = slots.data(held.slot)[start:stop].copy()
        return content if slots.holds(held.header, held.slot) else None

    @ray.method(concurrency_group="copy")
    def copy(self, held: Holding, other: Any) -> bool:
        """Copies a slot of another node's keeper. Returns False where that is gone or there is no
        room here."""
        area, num_bytes = COPIES + held.area, held.header.num_bytes
        if isinstance(self.open(area, num_bytes, held.header.attempt), NoRoom):
            return False
        starts = range(0, num_bytes, CHUNK_BYTES)
        spans = [range(start, min(start + CHUNK_BYTES, num_bytes)) for start in starts]
        # The other keeper ended, most likely with its node; the older copy is left
        with suppress(RayError, LostError):
            slots = self._areas.get(area)
            if slots is not None:
                slots.write(held.header, fetch(held, other, spans))
                return True
        return False


AS_ACTOR: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {"copy": 1}}
"""How Ray runs a `Keeper`: with a thread of its own for copying, as two keepers may copy from each
other."""


class LostError(RuntimeError):
    """A slot was written again, or altered, while it was read."""


def fetch(held: Holding, keeper: Any, spans: Sequence[range]) -> Iterator[Bytes]:
    """Yields a slot of another node's keeper in these pieces, each asked for while the one before
    is used. Raises `LostError`, at the end where the data do not match their checksum."""
    checksum = Checksum()
    waiting = deque([keeper.chunk.remote(held, span.start, span.stop) for span in spans[:1]])
    for number in range(len(spans)):
        if number + 1 < len(spans):
            span = spans[number + 1]
            waiting.append(keeper.chunk.remote(held, span.start, span.stop))
        data = ray.get(waiting.popleft(), timeout=_COPY_S)
        if data is None:
            break
        checksum.add(data)
        yield data
    if checksum.value != held.header.checksum:
        raise LostError(
            f"the snapshot of step {held.header.step} on node {held.node} was lost on its way"
        )


def find_keepers(launch: str) -> dict[str, Any]:
    """Returns the keepers of a launch by the ids of their nodes."""
    keepers = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == launch:
            with suppress(ValueError):  # it has just ended
                keepers[actor["name"]] = ray.get_actor(actor["name"], namespace=launch)
    return keepers


def read_s(num_bytes: int) -> float:
    """Returns the time in which a keeper has read so many bytes and answered."""
    return ANSWER_S + num_bytes / READ_BYTES_PER_S


def ask(references: Mapping[Key, Any], *, timeout_s: float = ANSWER_S) -> dict[Key, Any]:
    """Returns the answers of the keepers that are alive."""
    answers: dict[Key, Any] = {}
    if not references:
        return answers
    keys = {reference: key for key, reference in references.items()}
    ready, _ = ray.wait(list(keys), num_returns=len(keys), timeout=timeout_s)
    for reference in ready:
        with suppress(RayError):  # a dead actor raises one of several kinds
            answers[keys[reference]] = ray.get(reference)
    return answers


def ask_patiently(
    references: Mapping[Key, Any], nodes: Mapping[Key, str], *, timeout_s: float = ANSWER_S
) -> dict[Key, Any]:
    """Returns the answers of the keepers that are alive. Those on living nodes have longer: where
    other processes want the processors, what would be missing is the newest state."""
    answers = ask(references, timeout_s=timeout_s)
    late = references.keys() - answers.keys()
    if late:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        awaited = {key: references[key] for key in late if nodes[key] in alive}
        answers |= ask(awaited, timeout_s=_PATIENCE_S)
    return answers


def _all_agree(references: Sequence[Any], *, timeout_s: float = ANSWER_S) -> bool:
    answers = ask(dict(enumerate(references)), timeout_s=timeout_s)
    return sum(answers.values()) == len(references)


def copy_to_second_nodes(
    keepers: Mapping[str, Any],
    holdings: Sequence[Holding],
    nodes: Sequence[str],
    kept: Collection[Holding],
) -> Collection[Holding]:
    """Copies the shares of one step, all nodes at once, and returns those that stay as they are
    until the next are copied: `kept` where one could not be, as it had been written again, or a
    node was lost."""
    wanted = copies(holdings, nodes)
    shares = [held for held, _ in wanted]
    pins = [keepers[held.node].pin.remote(held, math.inf) for held in shares]
    are_copied = bool(wanted) and _all_agree(pins)
    if are_copied:
        made = []
        for held, target in wanted:
            made.append(keepers[target].copy.remote(held, keepers[held.node]))
        num_bytes = sum(held.header.num_bytes for held in shares) // max(1, len(nodes))
        are_copied = _all_agree(made, timeout_s=_COPY_S + read_s(num_bytes))
    stay = [held for held in shares if held.area.startswith(ONLY)] if are_copied else kept
    for held in [*kept, *shares]:
        if held not in stay and held.node in keepers:
            keepers[held.node].pin.remote(held, 0.0)
    return stay


class Keepers:
    """Keeps, while the context lasts, a keeper on every node that can hold a worker, and each
    snapshot on two nodes."""

    def __init__(self, launch: str | None, *, node_bytes: int | None) -> None:
        """`launch` is the name by which workers find the keepers. Each keeps `node_bytes` at most,
        or, where that is left open, half of what Ray counts as its node's memory."""
        self._launch, self._node_bytes = launch, node_bytes
        self._keepers: dict[str, Any] = {}
        self._kept: Collection[Holding] = ()
        self._newest_step = -1
        # Unix time at which the newest snapshot was first seen
        self.snapshot_time_s: float | None = None
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
            questions = {node: keeper.holdings.remote() for node, keeper in self._keepers.items()}
            answers = ask(questions)
            holdings = list(chain.from_iterable(answers.values()))
            newest = max((held.header.step for held in holdings), default=-1)
            if newest != self._newest_step:
                self._newest_step, self.snapshot_time_s = newest, time.time()
            start = time.monotonic()
            self._kept = copy_to_second_nodes(self._keepers, holdings, list(answers), self._kept)
            newest_shares = [held.header for held in holdings if held.header.step == newest]
            num_bytes = sum(header.num_bytes for header in newest_shares)
            # Small states are no work: waiting for answers is what takes long
            took_s = min(time.monotonic() - start, num_bytes / READ_BYTES_PER_S)
            copied_until = time.monotonic() + took_s / _COPY_SHARE

    def _start_missing(self) -> None:
        resources = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        capable = [node for node in resources if resources[node].get("CPU")]
        if set(capable) != set(self._keepers):
            renew_view()
        self._keepers = {
            node: self._keepers.get(node) or self._start(node, resources[node]) for node in capable
        }

    def _start(self, node: str, resources: Mapping[str, float]) -> Any:
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = ray.remote(**AS_ACTOR)(Keeper).options(
            name=node, namespace=self._launch, max_restarts=-1, scheduling_strategy=place
        )
        max_bytes = self._node_bytes
        if max_bytes is None:
            max_bytes = int(_MEMORY_SHARE * resources.get("memory", 0))
        return actor.remote(node=node, max_bytes=max_bytes)
