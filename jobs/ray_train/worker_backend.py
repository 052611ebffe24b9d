"""Makes Ray Train replace a lost worker alone, while the others live on.

The workers connect by themselves (`rendezvous`), at the start and after each loss. Ray Train's
public way restarts the whole group, which costs every worker its process and all that it has
loaded: measured here, two thirds of a restart. The names from `_internal` belong to its support for
torchft, which works the same way.
"""

import os
import sys
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.train import ControllerError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    ReplicaGroupCallback,
    WorkerGroupCallback,
)
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util import placement_group_table, remove_placement_group

from cluster.storage.uris import Storage
from jobs.ray_train.cluster_view import gone_nodes, renew_view, wait_until_known
from jobs.ray_train.lending_policy import LendingPolicy, give_back
from jobs.workers.failures import is_left_out, is_lost_node
from jobs.workers.left_out_nodes import left_out_ids, selector
from jobs.workers.round_end import RoundEnd

_NO_PLACE_S = 6.0
_STUCK_S = 15.0
# At most: the others leave a step within two seconds, and then copy what no snapshot has
_RESCUE_S = 30.0
_POLL_S = 0.5
_SETTLED_S = 8.0


class _Backend(_TorchBackend):
    has_replica_groups = True
    share_cuda_visible_devices = False  # a replacement does not learn the others' devices

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Does nothing: workers meet in their own time."""

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Does nothing: workers disconnect before they return, and a lost one cannot."""


class WorkerBackend(TorchConfig):
    """Replaces `TorchConfig`, with another backend."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


class NodeLosses(WorkerGroupCallback, ControllerCallback):
    """Makes Ray Train plan again, with the living nodes, when a node died or a worker's place is
    gone."""

    def __init__(self, *, is_elastic: bool, address: str) -> None:
        """The workers meet at the address."""
        self._is_elastic, self._address = is_elastic, address
        # Of the newest group; none yet, as an event does not travel to the controller
        self._ended: threading.Event | None = None
        self._is_training = False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Ends the whole group with a node. While Ray Train replaces one worker, it fails for good
        if another one that it takes for alive does not answer, as those of a dying node do not."""
        errors = worker_group_status.errors
        if not errors:
            return
        workers = self._worker_group.get_workers()
        if any(is_left_out(error) for error in errors.values()):
            _end_all(worker_group_status, "CorruptionError: another worker was found wrong")
            return
        gone = gone_nodes({workers[rank].metadata.node_id for rank in errors})
        if not gone and not any(is_lost_node(error) for error in errors.values()):
            return
        self._let_survivors_rescue(lost=errors.keys())
        # Spot nodes go together: others may have died since
        gone |= gone_nodes({worker.metadata.node_id for worker in workers})
        wait_until_known(gone)
        renew_view()
        _end_all(worker_group_status, "Connection closed: the node of another worker has died")

    def _let_survivors_rescue(self, *, lost: Collection[int]) -> None:
        """Returns once each worker on a living node has left its step and put the state of the last
        completed one into its node's memory: it is about to end with the group, and may have the
        only copy."""
        workers = self._worker_group.get_workers()
        group = self._worker_group.get_worker_group_state().placement_group_handle.placement_group.id.hex()
        node_of_rank = {
            rank: worker.metadata.node_id for rank, worker in enumerate(workers) if rank not in lost
        }
        deadline_s = time.monotonic() + _RESCUE_S
        try:
            round_end = RoundEnd(self._address, group=group, lost=lost)
            while time.monotonic() < deadline_s:
                staying = {
                    rank: node
                    for rank, node in node_of_rank.items()
                    if not round_end.is_left_by(rank)
                }
                if not set(staying.values()) - gone_nodes(staying.values()):
                    return
                time.sleep(_POLL_S)
        except RuntimeError as error:
            sys.stderr.write(
                f"the workers' meeting place does not answer, so they end without a rescue: {error}\n"
            )
            return
        ranks = ", ".join(map(str, staying))
        sys.stderr.write(
            f"rank {ranks} did not leave its step within {_RESCUE_S:g} s after a node was lost\n"
        )

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watches the placement group: Ray Train would wait forever for a replacement's place,
        though a smaller group could train."""
        self._worker_group = worker_group
        self._ended, self._is_training = threading.Event(), False
        if not self._is_elastic:
            return
        place = worker_group.get_worker_group_state().placement_group_handle.placement_group
        threading.Thread(
            target=_watch, args=(place, self._ended), name="node-losses", daemon=True
        ).start()

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._is_training = True

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._end_watch()

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        self._end_watch()

    def _end_watch(self) -> None:
        if self._ended is not None:
            self._ended.set()

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
            state = self._worker_group.get_worker_group_state()
            remove_placement_group(state.placement_group_handle.placement_group)


def _end_all(worker_group_status: Any, reason: str) -> None:
    """Ends the whole group: Ray Train then plans all its workers' places again."""
    for status in worker_group_status.worker_statuses.values():
        status.error = status.error or RuntimeError(reason)


def _watch(place: Any, ended: threading.Event) -> None:
    lost_at: float | None = None
    while not ended.wait(_POLL_S):
        is_lost = placement_group_table(place)["state"] == "RESCHEDULING"
        lost_at = (lost_at or time.monotonic()) if is_lost else None
        if lost_at and time.monotonic() - lost_at > _NO_PLACE_S:
            remove_placement_group(place)
            if not ended.wait(_STUCK_S):
                # Ray forgets a replacement that waits for a place that is removed: seen once. The
                # launcher starts another controller.
                sys.stderr.write(
                    "the controller waits for a worker that never comes: it ends, to be replaced\n"
                )
                try:
                    give_back()
                finally:
                    os._exit(1)
            return


class StartLosses(DefaultFailurePolicy):
    """Ray Train's own policy, which ends its controller if a worker dies between its start and its
    first step. Here such a group is planned again, as after any other loss."""

    def _is_retryable_error(self, training_failed_error: Any) -> bool:
        is_of_start = isinstance(training_failed_error, ControllerError) and isinstance(
            training_failed_error.controller_failure, RayActorError
        )
        is_retryable: bool = super()._is_retryable_error(training_failed_error)
        return is_of_start or is_retryable


class LeftOutNodes(ControllerCallback):
    """Places no worker on a node that is left out, since one there was found wrong."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def on_controller_start_worker_group(
        self, *, scaling_config: Any, num_workers: int
    ) -> dict[str, str] | None:
        return selector(left_out_ids(self._storage)) or None


class Drains(PreemptionCallback, ReplicaGroupCallback):
    """Ray Train's watch for draining nodes, which it leaves out where workers are replaced
    alone."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._worker_group = worker_group
        super().after_worker_group_start(worker_group)

    def after_replica_group_start(self, replica_group: Any) -> None:
        """Watches the new worker too, after a while: first it needs the processors more than a new
        watch does."""
        threading.Timer(
            _SETTLED_S, lambda: super(Drains, self).after_worker_group_start(self._worker_group)
        ).start()


class Trainer(TorchTrainer):
    """A trainer without Ray Train's datasets, which would start a process with each worker: rows
    come from shards. An elastic group may lend some of its workers, and keep some spare: `counts`
    has the number to run by the number that could, where they differ."""

    def __init__(
        self,
        *args: Any,
        storage: Storage,
        run: Storage,
        counts: Mapping[int, int],
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self._storage, self._run, self._counts = storage, run, counts

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = StartLosses(parts["failure_policy"].failure_config)
        stock = parts["scaling_policy"]
        if isinstance(stock, ElasticScalingPolicy):
            parts["scaling_policy"] = LendingPolicy(
                stock.scaling_config,
                self._storage,
                self._run,
                self._counts,
            )
        return super()._initialize_and_run_controller(**parts)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]
