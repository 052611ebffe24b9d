"""The process on each node that outlives the worker groups: it owns the memory that snapshots lie in.

The memory has no name in any file system: workers reach it through the keeper's /proc entry, other nodes through its
methods, and it is gone with the keeper, which ends with the launcher. So nothing is ever left behind.
"""

import os
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from jobs.snapshots.choice import Holding, copy_area
from jobs.snapshots.slots import Bytes, Header, Slots, checksum_of

CHUNK_BYTES = 16 << 20
"""Of a transfer between nodes."""


class SnapshotMemory:
    """Pairs of slots by name, up to `max_bytes`."""

    def __init__(self, *, node: str, identity: str, max_bytes: int) -> None:
        self._node, self._identity, self._max_bytes = node, identity, max_bytes
        self._areas: dict[str, tuple[int, Slots]] = {}

    def open(self, area: str, num_bytes: int) -> tuple[str, Slots] | None:
        """The path and the slots of an area for states of so many bytes; None where memory does not suffice.

        One that is there with the same size keeps what it holds.
        """
        needed = Slots.bytes_needed(num_bytes)
        if area in self._areas and os.fstat(self._areas[area][0]).st_size != needed:
            self.close(area)
        if area not in self._areas:
            if needed + sum(os.fstat(descriptor).st_size for descriptor, _ in self._areas.values()) > self._max_bytes:
                return None
            descriptor = os.memfd_create(f"raymill-{area}")
            os.ftruncate(descriptor, needed)
            self._areas[area] = (descriptor, Slots.map(descriptor))
        descriptor, slots = self._areas[area]
        return f"/proc/{os.getpid()}/fd/{descriptor}", slots

    def close(self, area: str) -> None:
        os.close(self._areas.pop(area)[0])

    def close_older(self, attempt: int) -> None:
        """Gives back the memory of areas in which nothing is as new as the attempt."""
        for area, (_, slots) in list(self._areas.items()):
            found = [header for slot in (0, 1) if (header := slots.header(slot))]
            if found and max(header.attempt for header in found) < attempt:
                self.close(area)

    def holdings(self, *, verify: bool) -> list[Holding]:
        """What is sealed; with `verify`, what is whole, by a pass over all of it."""
        found = []
        for area, (_, slots) in self._areas.items():
            for slot in (0, 1):
                header = slots.header(slot)
                if header is None or header.identity != self._identity or (verify and not slots.is_whole(slot)):
                    continue
                found.append(
                    Holding(
                        node=self._node,
                        area=area,
                        slot=slot,
                        sequence=header.sequence,
                        attempt=header.attempt,
                        step=header.step,
                        rank=header.rank,
                        world_size=header.world_size,
                    )
                )
        return found

    def header(self, held: Holding) -> Header | None:
        """None when the slot was written again since."""
        if held.area not in self._areas:
            return None
        header = self._areas[held.area][1].header(held.slot)
        return header if header and header.sequence == held.sequence else None

    def chunk(self, held: Holding, start: int) -> Bytes | None:
        """A copy of at most `CHUNK_BYTES` from a place on; None when the slot was written again since."""
        if self.header(held) is None:
            return None
        content = self._areas[held.area][1].data(held.slot)[start : start + CHUNK_BYTES].copy()
        return content if self.header(held) else None

    def path(self, area: str) -> str:
        return f"/proc/{os.getpid()}/fd/{self._areas[area][0]}"


class Keeper:
    """The actor."""

    def __init__(self, *, identity: str, max_bytes: int) -> None:
        node = ray.get_runtime_context().get_node_id()
        self._memory = SnapshotMemory(node=node, identity=identity, max_bytes=max_bytes)

    def open(self, area: str, num_bytes: int) -> str | None:
        found = self._memory.open(area, num_bytes)
        return found[0] if found else None

    def close_older(self, attempt: int) -> None:
        self._memory.close_older(attempt)

    def holdings(self, *, verify: bool) -> list[Holding]:
        return self._memory.holdings(verify=verify)

    def path(self, area: str) -> str:
        return self._memory.path(area)

    def header(self, held: Holding) -> Header | None:
        return self._memory.header(held)

    def chunk(self, held: Holding, start: int) -> Bytes | None:
        return self._memory.chunk(held, start)

    def copy(self, held: Holding, other: Any) -> bool:
        """Takes a copy of what another node's keeper holds; False when that is gone or there is no room."""
        try:
            fetched = fetch(held, other)
        except RayError:  # of its node, rather
            return False
        if fetched is None:
            return False
        header, data = fetched
        found = self._memory.open(copy_area(held), data.size)
        if found is None:
            return False
        found[1].write(header, list(data.reshape(len(header.names), -1)))
        return True


def fetch(held: Holding, keeper: Any) -> tuple[Header, Bytes] | None:
    """What another node's keeper holds, whole; None when it was written again meanwhile."""
    header: Header | None = ray.get(keeper.header.remote(held))
    if header is None:
        return None
    data = np.empty(header.num_bytes, np.uint8)
    for start in range(0, data.size, CHUNK_BYTES):
        chunk = ray.get(keeper.chunk.remote(held, start))
        if chunk is None:
            return None
        piece = data[start : start + CHUNK_BYTES]
        piece[:] = chunk[: piece.size]
    return (header, data) if checksum_of(data, header.names) == header.checksum else None
