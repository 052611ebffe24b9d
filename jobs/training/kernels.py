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
from jobs.exact.untested import UntestedError
from jobs.run.run_plan import RunPlan
from jobs.run.storage_retry import patiently
from jobs.training.mixed_hardware import Hardware, device_here
from model.foreign_config import ForeignModelError
from raymill.errors import UserError
from raymill.workers.worker_group import WorkerGroup


class Prepared(NamedTuple):
    """The operations of a worker."""

    kernels: str | None  # the hash of its compiled kernels, if it has any
    self_test: str  # the hash of its self-test's gradients, empty where it failed
    problem: str = ""  # why it failed


class _Tested(NamedTuple):
    """The result of a self-test."""

    checksum: str = ""
    problem: str = ""  # why it failed
    untested: str = ""  # why it could not be taken
    may_pass: bool = False  # whether another try may take it


class SelfTest:
    """The self-test of one worker, which takes it once, however often it meets others: and anew where
    the run goes back, as a worker may be at fault for that."""

    def __init__(self, plan: RunPlan) -> None:
        self.device = device_here(plan.config)
        self._take = partial(self_test, plan.config, self.device)
        self._found: _Tested | None = None

    def found(self) -> _Tested:
        if self._found is None:
            self._found = _tested(self._take)
        return self._found

    def forget(self) -> None:
        self._found = None


def prepared(plan: RunPlan, group: WorkerGroup, test: SelfTest, kind: Hardware) -> Prepared:
    """Returns once this worker, of a kind of hardware, has taken its self-test. Raises an error on
    every worker where one of them could not take it: `UserError`, unless another try may.

    Those are on every rank the kernels that the run's storage has for rank 0's hardware, or that
    rank 0 compiles now. Whoever can write to that storage can thus run code in the workers, as
    PyTorch trusts what it loads.
    """
    kept: bytes | _Tested | None = None
    if way_to_compute(plan.config) == "compiled":
        kept = group.broadcast(_kept(plan.run, kind, test) if group.rank == 0 else None)
    kernels = kept if isinstance(kept, bytes) else None
    if kernels is not None:
        torch.compiler.load_cache_artifacts(kernels)
    tested = _known(kept, group.rank) or test.found()
    for rank, other in enumerate(group.gather(tested)):
        if other.untested:
            kind_of_error = RuntimeError if other.may_pass else UserError
            raise kind_of_error(f"worker {rank}: {other.untested}")
    digest = None if kernels is None else hashlib.sha256(kernels).hexdigest()
    return Prepared(digest, tested.checksum, tested.problem)


def _known(kept: bytes | _Tested | None, rank: int) -> _Tested | None:
    """Returns what a rank need not test: what failed on rank 0 would fail there again, and what
    could not be tested there ends all."""
    if isinstance(kept, _Tested) and (rank == 0 or kept.untested):
        return kept
    return None


def tested_again(plan: RunPlan, device: torch.device) -> str:
    """Returns what `prepared` does of the self-test, taken once more by a worker that trains."""
    return _tested(partial(self_test, plan.config, device)).checksum


def _tested(test: Callable[[], str]) -> _Tested:
    try:
        return _Tested(test())
    except UntestedError as error:
        return _Tested(untested=str(error), may_pass=error.may_pass)
    except ForeignModelError as error:
        return _Tested(untested=str(error))
    except UserError as error:
        return _Tested(problem=str(error))


def _kept(run: Storage, on: Hardware, test: SelfTest) -> bytes | _Tested:
    """Returns the kernels, or what the test found that was to compile them and did not pass."""
    name = f"kernels/{hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:16]}.bin"
    if (kept := patiently(lambda: run.find_bytes(name), name)) is not None:
        return kept
    tested = test.found()
    if not tested.checksum:
        return tested
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None, "something was compiled"
    kernels = saved[0]
    patiently(lambda: run.write_bytes(name, kernels), name)
    return kernels
