"""Tokenizes while training runs, in a thread of the launcher, on the CPUs that training leaves."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
from ray.data import DataContext, ExecutionResources

from cluster.output.progress import say
from cluster.settings.run import RunConfig, ScalingConfig, batch_schedule
from cluster.storage.uris import Storage
from jobs.run.run_plan import TOKENIZING_FAILED, RunPlan, num_validation_rows, open_stream
from jobs.tokens.build_store import tokenize


@contextmanager
def tokenizing(config: RunConfig, run: Storage) -> Iterator[None]:
    """Makes the token store of `config` while the context lasts, which ends when the store is finished.

    When tokenizing fails, a file in the run's storage tells the workers, and its error is raised before any other.
    """
    run.delete(TOKENIZING_FAILED)
    finished: Future[dict[str, Any]] = Future()

    def work() -> None:
        try:
            finished.set_result(tokenize(config))
        except BaseException as error:
            finished.set_exception(error)
            run.write_bytes(TOKENIZING_FAILED, str(error).encode())

    options = DataContext.get_current().execution_options
    before = options.resource_limits
    options.resource_limits = ExecutionResources(cpu=free_cpus(config.scaling, ray.cluster_resources().get("CPU", 0)))
    threading.Thread(target=work, name="tokenizing", daemon=True).start()
    try:
        yield
        finished.result()
    except BaseException as error:
        failure = finished.exception() if finished.done() else None
        if failure is None or failure is error:
            raise
        raise failure from error
    finally:
        options.resource_limits = before


def free_cpus(scaling: ScalingConfig, num_cpus: float) -> float:
    """Returns the CPUs for tokenizing. Without a limit its tasks would take every free CPU, and training none."""
    return max(1.0, num_cpus - scaling.max_workers * scaling.threads_per_worker)


def wait_for_first_rows(plan: RunPlan) -> None:
    """Waits until the sealed part holds the rows of every validation and of the first step."""
    num_validation_rows(open_stream(plan, "val"), plan.config)
    open_stream(plan, "train").wait_for(np.array(batch_schedule(plan.config).samples(1)))
    say("training starts on the sealed part of the token store")
