"""Decides how many workers Ray Train runs while some are lent: its own elastic policy, with fewer workers.

A resize works as when a node comes or goes: the group starts again from the newest snapshot in memory, and its result
has the same bits at any size.
"""

from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import ScalingConfig

from cluster.storage.lending import Lender
from cluster.storage.uris import open_storage


def workers_to_run(
    possible: int, *, num_lent: int, min_workers: int, max_workers: int, num_running: int, num_free: int
) -> int:
    """Returns the number of workers to run. A group grows only into free room: lent resources may still be in use when
    their loan is over, and a group that is started without room waits and starts over."""
    wanted = min(possible, max(max_workers - num_lent, min_workers))
    return min(wanted, num_running + num_free) if wanted > num_running > 0 else wanted


class LendingPolicy(ElasticScalingPolicy):
    """The policy that runs in Ray Train's controller."""

    def __init__(self, scaling_config: ScalingConfig, run_uri: str) -> None:
        super().__init__(scaling_config)
        self._run_uri = run_uri
        self._num_running = 0

    def after_controller_start(self, train_run_context: Any) -> None:
        self._lender = Lender(open_storage(self._run_uri))
        self._lender.look_forever()
        super().after_controller_start(train_run_context)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._num_running = worker_group_state.num_workers
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._num_running = 0
        return super().make_decision_for_non_running_worker_group()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        config = self.scaling_config
        free, needs = ray.available_resources(), config._resources_per_worker_not_none
        return workers_to_run(
            super()._count_possible_workers(reserved_resources),
            num_lent=self._lender.num_lent(),
            min_workers=config.min_workers,
            max_workers=config.max_workers,
            num_running=self._num_running,
            num_free=min(int(free.get(name, 0.0) // count) for name, count in needs.items() if count > 0),
        )
