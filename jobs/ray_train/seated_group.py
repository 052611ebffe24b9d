"""A worker group of Ray Train whose seats have places of their own: one of them can be lost, left
vacant and taken again, and others can be added, while the rest train.

Ray Train places all workers of a group together. Of such a placement group Ray finds lost bundles a
new place only when it has one for all of them, and it cannot grow.
"""

import secrets
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    PlacementGroupHandle,
)
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.util import get_placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup, placement_group

_PLACE_S = 5.0  # within which a place that seemed free is given


class NoPlaceError(Exception):
    """The place for a worker was taken meanwhile, or its group has ended."""


class SeatPlaces(PlacementGroupHandle):
    """A placement group of one bundle for each seat of a group that is not vacant."""

    def __init__(self, make: Callable[[int], PlacementGroup], num_seats: int) -> None:
        """`make` asks Ray for a place for the worker of a seat."""
        self._make, self._lock, self._has_ended = make, threading.Lock(), False
        self._places = {seat: make(seat) for seat in range(num_seats)}

    def __getitem__(self, seat: int) -> PlacementGroup:
        return self._places[seat]

    @property
    def placement_group(self) -> PlacementGroup:
        """The first place: Ray Train's own cleaner knows one."""
        return next(iter(self._places.values()))

    def ready(self) -> Any:
        return self.placement_group.ready()

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Returns whether all places are given within this time, the places of a node side by
        side."""
        end_s = time.monotonic() + timeout_seconds
        for place in self._places.values():
            if not place.wait(max(end_s - time.monotonic(), 0.0)):
                return False
        node_of = {seat: self._node(seat) for seat in self._places}
        first = {node: seat for seat, node in reversed(node_of.items())}
        order = sorted(node_of, key=lambda seat: first[node_of[seat]])
        self._places = dict(enumerate(self._places[seat] for seat in order))
        return True

    def _node(self, seat: int) -> str:
        nodes: dict[int, str] = placement_group_table(self._places[seat])["bundles_to_node_id"]
        return nodes.get(0, "")

    def reserve(self, seat: int) -> None:
        """Waits for a place for a vacant or a new seat. Raises `NoPlaceError` where there is none."""
        with self._lock:
            if self._has_ended:
                raise NoPlaceError("the group has ended")
            place = self._places[seat] = self._make(seat)
        if not place.wait(_PLACE_S):
            self.give_up([seat])
            raise NoPlaceError(f"no node has room within {_PLACE_S:g} s")

    def give_up(self, seats: Collection[int]) -> None:
        """Removes the places of these seats, which ends what is there."""
        with self._lock:
            places = [self._places.pop(seat) for seat in seats if seat in self._places]
        for place in places:
            remove_placement_group(place)

    def rescheduling(self) -> set[int]:
        """Returns the seats whose node has died, and for which Ray looks for another one."""
        table = placement_group_table()
        with self._lock:
            states = {
                seat: table.get(place.id.hex(), {}).get("state")
                for seat, place in self._places.items()
            }
        return {seat for seat, state in states.items() if state == "RESCHEDULING"}

    def shutdown(self) -> None:
        with self._lock:
            self._has_ended = True
        self.give_up([*self._places])


class SeatedGroup(WorkerGroup):
    """Starts a group's workers each in a place of its own, and later ones one by one."""

    def _create_placement_group(
        self, scaling_config: Any, worker_group_context: Any
    ) -> PlacementGroupHandle:
        context = worker_group_context
        labels = context.label_selector

        def place(seat: int) -> PlacementGroup:
            return placement_group(
                [context.resources_per_worker],
                strategy=context.placement_strategy,
                bundle_label_selector=labels[:1] if labels else None,
                name=f"{_prefix(self._train_run_context)}{context.run_attempt_id}/{seat}/{secrets.token_hex(4)}",
            )

        self._places = SeatPlaces(place, context.num_workers)
        return self._places

    def _create_workers(
        self,
        num_workers: int,
        placement_group: PlacementGroup,
        resources_per_worker: dict[str, float],
        placement_group_bundle_indices: list[int] | None = None,
        starting_world_rank: int = 0,
        world_size: int | None = None,
        replica_group_size: int | None = None,
    ) -> list[Any]:
        """Starts the workers of some seats in a row at the same time, and returns them in that
        order."""
        create = super()._create_workers

        def start(seat: int) -> Any:
            (worker,) = create(
                1,
                self._places[seat],
                resources_per_worker,
                [0],
                starting_world_rank=seat,
                world_size=world_size or num_workers,
                replica_group_size=1,
            )
            return worker

        seats = range(starting_world_rank, starting_world_rank + num_workers)
        with ThreadPoolExecutor(num_workers) as threads:
            return [*threads.map(start, seats)]

    def start_in(self, seat: int) -> ReplicaGroup:
        """Starts a worker for a vacant or a new seat, in a place of its own, and has it train. Takes
        seconds, in any thread. Raises `NoPlaceError`, or what Ray raises where the worker ends."""
        self._places.reserve(seat)
        context = self._worker_group_context
        state = self.get_worker_group_state()
        resources = context.resources_per_worker
        workers = self._create_workers(
            1,
            self._places[seat],
            resources,
            starting_world_rank=seat,
            world_size=max(state.num_workers, seat + 1),
        )
        started = ReplicaGroup(workers, resources, [*self._replica_group_callbacks])
        self._init_train_context(workers, state.sync_actor)
        started.start_training(context)
        return started

    def seat(self, seat: int, started: ReplicaGroup) -> None:
        """Makes what was started a part of the group, which is polled from now on. A new seat is the
        one behind the last."""
        workers: list[Any] = [*self.get_workers()]
        workers[seat : seat + 1] = started.get_workers()
        self._worker_group_state = replace(self.get_worker_group_state(), workers=workers)
        self._all_alone[seat : seat + 1] = [started]
        self._worker_rank_to_replica_group_rank = {seat: seat for seat in range(len(workers))}
        self._world_rank_to_ongoing_poll.pop(seat, None)

    @property
    def _all_alone(self) -> list[ReplicaGroup]:
        """Ray Train's groups of workers that are replaced together: each worker is one."""
        groups = self.get_replica_groups()
        assert groups is not None, "the group has started"
        return groups

    def leave(self, seats: Collection[int]) -> None:
        """Ends the workers of seats that have become vacant. Else Ray Train asks them for their results
        while others are started."""
        for seat in seats:
            self._all_alone[seat].shutdown()


def remove_leftovers(train_run_context: Any) -> None:
    """Removes the places of a controller of this run that died: as long as the launcher lives, Ray
    keeps them."""
    prefix = _prefix(train_run_context)
    for row in placement_group_table().values():
        if row["name"].startswith(prefix) and row["state"] != "REMOVED":
            with suppress(ValueError):  # another launcher's, which end with it
                remove_placement_group(get_placement_group(row["name"]))


def _prefix(train_run_context: Any) -> str:
    return f"seats of {train_run_context.run_config.storage_path}: "
