"""Ray Train's own elastic policy with fewer workers while some are lent, and with spares where all
would be slower."""

import threading
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from ray.train.v2.api.config import ScalingConfig

from cluster.storage.lending import Lender
from cluster.storage.uris import Storage
from jobs.ray_train.cluster_view import gone_nodes, renew_view, wait_until_known
from jobs.ray_train.seated_group import SeatedGroup, remove_leftovers
from jobs.ray_train.worker_count import WorkerCount, can_join, starts_again, workers_to_run
from jobs.run.storage_retry import patiently
from jobs.workers.incident_notes import note
from jobs.workers.left_out_nodes import left_out_ids


class LendingPolicy(ElasticScalingPolicy):
    """The policy, in Ray Train's controller. Where workers cannot join one by one, or are lent, the
    group starts again from the newest snapshot in memory, with the same bits at any size.

    Spares are places that Ray Train has reserved for the run and that no worker takes: after the
    next loss of a node the run has as many workers as before.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        storage: Storage,
        run: Storage,
        counts: Mapping[int, int],
    ) -> None:
        super().__init__(scaling_config)
        self._storage, self._run, self._counts = storage, run, counts
        self._num_running = 0
        self._count = WorkerCount(0)
        self.num_training = 0
        self.num_seats: int | None = None
        self._alive: set[str] = set()  # ids of nodes, at the last look
        self._left_out: set[str] = set()  # ids of nodes, as the storage had them at the last start

    def after_controller_start(self, train_run_context: Any) -> None:
        self._lender = Lender(self._run)
        threading.Thread(target=self._lender.look_forever, name="lender", daemon=True).start()
        TrainController.worker_group_cls = SeatedGroup
        remove_leftovers(train_run_context)
        super().after_controller_start(train_run_context)
        _policies.append(self)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        self._num_running = self.num_training
        decision = super().make_decision_for_running_worker_group(
            # As if the vacant seats were none
            replace(worker_group_state, workers=worker_group_state.workers[: self._num_running]),
            worker_group_status,
        )
        if isinstance(decision, ResizeDecision) and not self._is_due(decision.num_workers):
            return NoopDecision()
        return self._noted(decision)

    def _is_due(self, num_workers: int) -> bool:
        return starts_again(
            num_workers,
            num_lent=self._lender.num_lent(),
            min_workers=self.scaling_config.min_workers,
            max_workers=self.scaling_config.max_workers,
            num_training=self._num_running,
            counts=self._counts,
        )

    def num_to_add(self, num_training: int) -> int:
        """Returns how many workers can join the group, one by one."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if alive != self._alive:
            renew_view()
            self._alive = alive
        reserved = self._get_reserved_resources()
        if reserved is None:
            return 0
        self._num_running = num_training
        possible = self._count_possible_workers(reserved)
        if not can_join(possible, num_training=num_training, counts=self._counts):
            return 0
        return max(possible - num_training, 0)

    def make_decision_for_non_running_worker_group(self) -> Any:
        num_seats, self.num_seats = self.num_seats, None
        if num_seats is not None:
            return self._get_resize_decision(num_seats)  # the same group: some of it is replaced
        self._num_running = 0
        self._left_out = left_out_ids(self._storage)
        return self._noted(super().make_decision_for_non_running_worker_group())

    def _noted(self, decision: Any) -> Any:
        """Notes the spares of a group that is to start, for the ledger."""
        if isinstance(decision, ResizeDecision) and self._count.spares:
            fields = {"world_size": self._count.to_run, "spares": self._count.spares}
            write = partial(note, self._run, "spares", **fields)
            # In a thread: the controller must not stop while the storage is out of reach.
            threading.Thread(
                target=patiently, args=(write, "spares"), name="spares", daemon=True
            ).start()
        return decision

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        unusable = self._left_out
        if not self._num_running and (gone := gone_nodes(reserved_resources)):
            # A group would wait in vain for a node that has died since the head last asked it
            wait_until_known(gone)
            unusable = unusable | gone
        config = self.scaling_config
        free = ray.available_resources()
        needs = config._resources_per_worker_not_none
        self._count = workers_to_run(
            super()._count_possible_workers(_without(reserved_resources, unusable)),
            num_lent=self._lender.num_lent(),
            min_workers=config.min_workers,
            max_workers=config.max_workers,
            num_running=self._num_running,
            num_free=min(
                int(free.get(name, 0.0) // count) for name, count in needs.items() if count > 0
            ),
            counts=self._counts,
        )
        return self._count.to_run


def _without(reserved_resources: Any, node_ids: Collection[str]) -> Any:
    """Returns the resources by node that Ray Train has reserved, without those of some nodes."""
    return {
        node_id: resources
        for node_id, resources in reserved_resources.items()
        if node_id not in node_ids
    }


_policies: list[LendingPolicy] = []
"""The policy of the controller whose process this is."""


def tell_policy(*, num_training: int, num_seats: int | None) -> None:
    """Tells the policy of this process's controller how many workers train. Where `num_seats` is a
    number, some of the group are about to be replaced, and it stays as large."""
    for policy in _policies:
        policy.num_training, policy.num_seats = num_training, num_seats


def num_to_add(num_training: int) -> int:
    """Returns how many workers the policy of this process's controller lets join."""
    return sum(policy.num_to_add(num_training) for policy in _policies)


def give_back() -> None:
    """Takes back what this process's controller asked the cluster for, before it ends by itself. The
    request would outlive it by three minutes, in which the next controller finds nothing free."""
    for policy in _policies:
        policy.before_controller_abort()
