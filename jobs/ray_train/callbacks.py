"""Callbacks of Ray Train's controller and workers: failures are noted, SIGTERM and drains become
notices."""

import signal
import threading
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from ray.actor import ActorHandle
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

from jobs.run.run_plan import RunPlan
from jobs.run.storage_retry import patiently
from jobs.workers.failures import main_cause
from jobs.workers.incident_notes import note
from jobs.workers.preemption import Signals


class FailureRecorder(UserCallback):
    """Notes why a worker group failed; called in Ray Train's controller."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def after_exception(
        self, run_context: Any, worker_exceptions: Mapping[int, BaseException]
    ) -> None:
        reasons = {rank: str(error) for rank, error in worker_exceptions.items()}
        rank, kind, reason = main_cause(reasons)
        run = self._plan.run  # if its storage is out of reach, the controller must not stop
        write = partial(note, run, "failure", rank=rank, kind=kind, reason=reason)
        threading.Thread(
            target=patiently, args=(write, "a failure"), name="failures", daemon=True
        ).start()


_sigterms: list[int] = []


class SignalListener(WorkerCallback):
    """Makes SIGTERM a notice in a worker's process, where Ray's own reaction is to exit at once.

    Handlers can be set only in the main thread, in which Ray Train calls this. The two names are
    private: the public `get_preemption_info` is a barrier of all ranks, for which a step need not
    wait.
    """

    def after_init_train_context(self) -> None:
        signal.signal(signal.SIGTERM, lambda signum, frame: _sigterms.append(signum))


def group_name(meets: ActorHandle | None = None) -> str:
    """Returns the name of a group, by the actor through which Ray Train has its workers meet: by
    default the name of this worker's group."""
    actor = meets or get_train_context().get_synchronization_actor()
    return actor._actor_id.hex()


def signals(seats: Collection[int], sizes: Collection[int]) -> Signals:
    """Returns the announced ends of this worker's process and of the processes of all who train, by
    their seats. `sizes` are the numbers of workers with which the run goes on without a start."""
    context = get_train_context()
    info = context.preemption_context.preemption_info
    if info is None or not info.deadline_ms:
        return Signals(len(_sigterms), info)
    end_s, staying = info.deadline_ms / 1000, {*seats}.difference(info.preempted_ranks)
    if not staying:
        return Signals(len(_sigterms), info, end_s)
    return Signals(len(_sigterms), info, own_end_s=end_s if len(staying) in sizes else None)
