"""Prepares a worker to compute: tests its device, and shares compiled kernels between a run's
workers and attempts."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from cluster.settings.run import way_to_compute
from cluster.storage.uris import Storage
from jobs.exact.self_test import self_test
from jobs.run.run_plan import RunPlan
from jobs.run.storage_retry import patiently
from jobs.training.mixed_hardware import Hardware
from jobs.workers.worker_group import WorkerGroup
from model.errors import UserError


class Prepared(NamedTuple):
    """What a worker computes with."""

    kernels: str | None  # the hash of its compiled kernels, if it has any
    self_test: str  # the hash of its self-test's gradients, empty where it failed
    problem: str = ""  # why it failed


def prepared(plan: RunPlan, group: WorkerGroup, device: torch.device, kind: Hardware) -> Prepared:
    """Returns once this worker, of a kind of hardware, has taken its self-test.

    Those are on every rank the kernels that the run's storage has for rank 0's hardware, or that
    rank 0 compiles now. Whoever can write to that storage can thus run code in the workers, as
    PyTorch trusts what it loads.
    """
    test = partial(self_test, plan.config, device)
    if way_to_compute(plan.config) != "compiled":
        return _tested(None, test)
    kernels = group.broadcast(_kept(plan.run, kind, test) if group.rank == 0 else None)
    if kernels is None:
        return _tested(None, test)
    torch.compiler.load_cache_artifacts(kernels)
    return _tested(hashlib.sha256(kernels).hexdigest(), test)


def tested_again(plan: RunPlan, device: torch.device) -> str:
    """Returns what `prepared` does of the self-test, taken once more by a worker that trains."""
    return _tested(None, partial(self_test, plan.config, device)).self_test


def _tested(kernels: str | None, test: Callable[[], str]) -> Prepared:
    try:
        return Prepared(kernels, test())
    except UserError as error:
        return Prepared(kernels, "", str(error))


def _kept(run: Storage, on: Hardware, compiles: Callable[[], object]) -> bytes | None:
    """Returns None where what compiles fails: then each worker says so for itself."""
    name = f"kernels/{hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:16]}.bin"
    if (kept := patiently(lambda: run.find_bytes(name), name)) is not None:
        return kept
    try:
        compiles()
    except UserError:
        return None
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None, "something was compiled"
    kernels = saved[0]
    patiently(lambda: run.write_bytes(name, kernels), name)
    return kernels
