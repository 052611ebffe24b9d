"""Makes Ray Train replace a lost worker alone, while the others live on.

The workers connect by themselves (`rendezvous`), at the start and after each loss. Ray Train's
public way restarts the whole group, which costs every worker its process and all that it has
loaded: measured here, two thirds of a restart. The names from `_internal` belong to its support for
torchft, which works the same way.
"""

from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.train import ControllerError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.torch.torch_trainer import TorchTrainer

from cluster.storage.uris import Storage
from jobs.ray_train.lending_policy import LendingPolicy
from jobs.ray_train.node_losses import NodeLosses
from jobs.workers.left_out_nodes import left_out_ids, selector


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
        wanted = [part for part in callbacks if not isinstance(part, DatasetsCallback)]
        # First what decides which failures the others hear of
        return sorted(wanted, key=lambda callback: not isinstance(callback, NodeLosses))
