"""What becomes of a group when nodes die or come, in Ray Train's controller: the other workers go on
without a lost node's seats, with all that they have loaded, and one is started wherever there is
room.

Ray Train by itself ends all workers and starts a smaller group, and starts it once more when a node
comes.
"""

import os
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import count, islice
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback

from jobs.ray_train.callbacks import FailureRecorder, group_name
from jobs.ray_train.cluster_view import gone_nodes, renew_view, wait_until_known
from jobs.ray_train.group_watch import GroupWatch
from jobs.ray_train.joiners import Joiners
from jobs.ray_train.lending_policy import give_back, num_to_add, tell_policy
from jobs.ray_train.seated_group import SeatPlaces
from jobs.workers.failures import is_left_out, is_lost_node
from jobs.workers.round_end import RoundEnd, vacate

_NO_PLACE_S = 6.0
_STUCK_S = 15.0
# At most: the others leave a step within two seconds, and then copy what no snapshot has
_RESCUE_S = 30.0
_POLL_S = 0.5
_LOOK_S = 1.0  # from one look for room for more workers to the next


class NodeLosses(GroupWatch, ControllerCallback):
    """Leaves a lost node's seats vacant, and has workers start where there is room. Where too few
    would be left, or one was found wrong, it makes Ray Train plan again, with the living nodes."""

    def __init__(
        self,
        recorder: FailureRecorder,
        *,
        is_elastic: bool,
        sizes: Collection[int],
        address: str,
    ) -> None:
        """The group meets at the address. `sizes` are the numbers of workers with which it goes on
        without a start."""
        super().__init__()
        self._recorder, self._address = recorder, address
        self._is_elastic, self._sizes = is_elastic, sizes
        self._is_training = False
        self._vacant: set[int] = set()
        self._gone: set[str] = set()  # ids of nodes, at the last loss
        self._next_look_s = 0.0

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Handles what has failed. Ray Train replaces the workers whose errors stay in the
        status."""
        statuses = worker_group_status.worker_statuses
        if self._is_elastic:
            for status in statuses.values():
                status.preemption_info = None  # workers see to it, and Ray Train would end them
        self._settle_vacant(statuses)
        errors = worker_group_status.errors
        if any(is_left_out(error) for error in errors.values()):
            _end_all(statuses, "CorruptionError: another worker was found wrong")
        elif errors and (lost := self._lost(errors)):
            self._handle(lost, statuses)
        num_failed = len(worker_group_status.errors)
        if self._is_elastic and not num_failed and not worker_group_status.finished:
            self._join()
        tell_policy(
            num_training=self._num_training,
            num_seats=len(statuses) if 0 < num_failed < len(statuses) else None,
        )

    @property
    def _num_training(self) -> int:
        """The workers that train, or soon will."""
        num_new = len(self._joiners.seats - self._vacant)
        return len(self._worker_group.get_workers()) + num_new - len(self._vacant_now)

    @property
    def _vacant_now(self) -> set[int]:
        """The vacant seats for which no worker is being started."""
        return self._vacant - self._joiners.seats

    def _settle_vacant(self, statuses: Mapping[int, Any]) -> None:
        """Hides the vacant seats' errors."""
        is_running = any(
            status.running for seat, status in statuses.items() if seat not in self._vacant
        )
        for seat in self._vacant:
            statuses[seat].running, statuses[seat].error = is_running, None

    def _join(self) -> None:
        """Has workers start where there is room, and takes in those that have."""
        self._vacant -= self._joiners.take_in()
        now_s = time.monotonic()
        if now_s < self._next_look_s or not self._joiners.may_start:
            return
        self._next_look_s = now_s + _LOOK_S
        num_seats = len(self._worker_group.get_workers())
        free = (
            seat
            for seat in count()
            if seat not in self._joiners.seats and (seat >= num_seats or seat in self._vacant)
        )
        for seat in islice(free, num_to_add(self._num_training)):
            self._joiners.start(seat)

    def _lost(self, errors: Mapping[int, Exception]) -> set[int]:
        """Returns the seats of all nodes that have died, where an error tells of one. Spot nodes go
        together: others may have died since."""
        workers = self._worker_group.get_workers()
        of_errors = {workers[seat].metadata.node_id for seat in errors}
        died = {seat for seat, error in errors.items() if is_lost_node(error)}
        if not died and not gone_nodes(of_errors):
            return set()
        self._gone = gone_nodes({worker.metadata.node_id for worker in workers})
        return (
            died.union(
                seat for seat, worker in enumerate(workers) if worker.metadata.node_id in self._gone
            )
            - self._vacant
        )

    def _handle(self, lost: Collection[int], statuses: Mapping[int, Any]) -> None:
        errors = {seat: statuses[seat].error for seat in lost if statuses[seat].error}
        # At once: a place for which Ray looks for another node ends the whole group after a while
        self._places.give_up(lost)
        num_left = len(statuses) - len(self._vacant) - len(lost)
        if num_left in self._sizes and self._vacated(lost):
            self._recorder.after_exception(None, errors)
            self._settle_vacant(statuses)
            return
        self._let_survivors_rescue(lost)
        wait_until_known(self._gone)
        renew_view()
        _end_all(statuses, "Connection closed: the node of another worker has died")

    def _vacated(self, lost: Collection[int]) -> bool:
        """Lets the others meet without these. Returns False where they cannot be told."""
        try:
            self._vacate(lost)
        except RuntimeError as error:
            sys.stderr.write(f"the workers' meeting place does not answer: {error}\n")
            return False
        self._vacant |= {*lost}
        wait_until_known(self._gone)
        self._worker_group.leave(lost)
        return True

    def _vacate(self, seats: Collection[int]) -> None:
        vacate(self._address, group=self._group, num_seats=self._num_started, seats=seats)

    def _let_survivors_rescue(self, lost: Collection[int]) -> None:
        """Returns once each worker on a living node has left its step and put the state of the last
        completed one into its node's memory: it is about to end with the group, and may have the
        only copy."""
        node_of_seat = {
            seat: worker.metadata.node_id
            for seat, worker in enumerate(self._worker_group.get_workers())
            if seat not in self._vacant.union(lost)
        }
        deadline_s = time.monotonic() + _RESCUE_S
        try:
            round_end = RoundEnd(self._address, group=self._group, lost=lost)
            while time.monotonic() < deadline_s:
                staying = {
                    seat: node
                    for seat, node in node_of_seat.items()
                    if not round_end.is_left_by(seat)
                }
                if not set(staying.values()) - gone_nodes(staying.values()):
                    return
                time.sleep(_POLL_S)
        except RuntimeError as error:
            sys.stderr.write(
                f"the workers' meeting place does not answer, so they end without a rescue: {error}\n"
            )
            return
        seats = ", ".join(map(str, staying))
        sys.stderr.write(
            f"worker {seats} did not leave its step within {_RESCUE_S:g} s after a node was lost\n"
        )

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watches the workers' places: Ray Train would wait forever for a replacement's, though a
        smaller group could train."""
        self._worker_group, state = worker_group, worker_group.get_worker_group_state()
        self._group, self._num_started = group_name(state.sync_actor), state.num_workers
        self._places = state.placement_group_handle
        ended, self._is_training = self._begin_watch(), False
        self._vacant = set()
        self._joiners = Joiners(worker_group, self._give_up)
        if self._is_elastic:
            threading.Thread(
                target=self._watch,
                args=(self._places, self._joiners, ended),
                name="node-losses",
                daemon=True,
            ).start()

    def _give_up(self, seat: int) -> None:
        """Sees to it that the others do not wait for a worker that did not come."""
        self._places.give_up([seat])
        with suppress(RuntimeError):  # the meeting place has ended with the run
            self._vacate([seat])

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._is_training = True

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._give_back_forgotten()

    async def before_controller_shutdown(self) -> None:
        self._give_back_forgotten()

    def _give_back_forgotten(self) -> None:
        """Gives back the places of a group that Ray Train forgets: one that lost a worker while its
        workers were told to train. The next group would find these places taken."""
        is_forgotten = self._ended is not None and not self._ended.is_set()
        if is_forgotten and not self._is_training:
            self._end_watch()
            self._places.shutdown()

    def _watch(self, places: SeatPlaces, joiners: Joiners, ended: threading.Event) -> None:
        since_s: dict[int, float] = {}  # by the seat for which Ray looks for another place
        while not ended.wait(_POLL_S):
            now_s = time.monotonic()
            since_s = {seat: since_s.get(seat, now_s) for seat in places.rescheduling()}
            late = {seat for seat, since in since_s.items() if now_s - since > _NO_PLACE_S}
            places.give_up(late & joiners.seats)
            if late - joiners.seats:
                places.shutdown()
                if not ended.wait(_STUCK_S):
                    # Ray forgets a replacement that waits for a place that is removed: seen once.
                    # The launcher starts another controller.
                    sys.stderr.write(
                        "the controller waits for a worker that never comes: it ends, to be replaced\n"
                    )
                    try:
                        give_back()
                    finally:
                        os._exit(1)
                return


def _end_all(statuses: Mapping[int, Any], reason: str) -> None:
    """Ends the whole group: Ray Train then plans all its workers' places again."""
    for status in statuses.values():
        status.error = status.error or RuntimeError(reason)
