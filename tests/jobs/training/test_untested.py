"""A self-test that could not be taken ends all workers with one sentence, and what cannot succeed is
not tried again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.exact import self_test
from jobs.exact.untested import UntestedError, no_memory, why_untested
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from tests.foreign_models import ROFORMER
from tests.jobs.runs import tiny_plan
from tests.jobs.train_worlds import CPU
from tests.jobs.untested_runs import start_twice

pytestmark = pytest.mark.more

NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"
)
NOT_DETERMINISTIC = "cumsum_cuda_kernel does not have a deterministic implementation, but you set"


def plan_of(folder: Path, **how: Any) -> RunPlan:
    return tiny_plan(str(folder / "storage"), scaling={"max_workers": 2}, **how)


def check_given_up(plan: RunPlan, ends: list[list[dict[str, Any]]], sentence: str) -> None:
    """Checks that both workers ended with a sentence, and that the second start tested nothing and
    trained nothing."""
    first, second = ends
    [error] = {end["error"] for end in first}
    assert error.startswith("UserError: worker ")
    assert sentence in error
    assert second == [{"error": "", "num_tests": 0}] * 2
    ledger = Ledger.read(plan.run)
    assert [event["kind"] for event in ledger.events("failure")] == ["user_error"] * 2
    assert f"UserError: {ledger.events('gave_up')[0]['reason']}" == error
    assert not ledger.steps


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "worker 1: the self-test on this processor",
        ),
        (RuntimeError(NO_MEMORY), "needs more memory than there is"),
        (RuntimeError(NOT_DETERMINISTIC), "needs cumsum_cuda_kernel, which has no deterministic"),
    ],
    ids=["out of memory", "no memory on a CPU", "not deterministic"],
)
def test_a_self_test_that_cannot_be_taken__ends_all_workers_and_is_not_tried_again(
    error: Exception, sentence: str, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path)
    ends = start_twice(plan, tmp_path, error=error)
    check_given_up(plan, ends, sentence)
    assert [end["num_tests"] for end in ends[0]] == [1, 1]


@pytest.mark.slow  # imports the compiler
@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_kernels_that_cannot_be_compiled__end_all_workers_and_are_not_tried_again(
    faulty_rank: int, tmp_path: Path
) -> None:
    """That of a worker without a compiler."""
    plan = plan_of(tmp_path, train={"compute": "compiled"})
    environment = {
        "CXX": str(tmp_path / "none"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    ends = start_twice(plan, tmp_path, environment=environment, faulty_rank=faulty_rank)
    check_given_up(
        plan, ends, f"worker {faulty_rank}: the self-test on this processor cannot compile"
    )
    assert [end["num_tests"] for end in ends[0]] == ([1, 0] if faulty_rank == 0 else [1, 1])


def test_a_model_with_a_frozen_parameter__ends_all_workers_with_its_name(tmp_path: Path) -> None:
    values = {**ROFORMER, "vocab_size": 320}
    plan = plan_of(tmp_path, model={"config": values})
    ends = start_twice(plan, tmp_path)
    check_given_up(plan, ends, "transformers freezes roformer.encoder.embed_positions.weight")


def test_memory_that_other_processes_hold__is_told_and_may_be_there_at_another_try() -> None:
    gib = 2**30
    full = no_memory("the self-test on a GPU", free=gib, total=80 * gib, own=78 * gib)
    assert not full.may_pass
    assert str(full).startswith(
        "the self-test on a GPU needs more than its 80.0 GiB of memory: this worker has 78.0 GiB and other "
        "processes hold 1.0 GiB: nothing was trained."
    )
    held = no_memory("the self-test on a GPU", free=gib, total=80 * gib, own=9 * gib)
    assert held.may_pass
    assert "other processes hold 70.0 GiB" in str(held)


def test_another_try_that_may_pass__is_no_error_of_the_user(tmp_path: Path) -> None:
    """Ray Train starts the workers again, until the same error comes twice."""
    plan = plan_of(tmp_path)
    ends = start_twice(plan, tmp_path, error=UntestedError("others hold memory", may_pass=True))
    expected = {"error": "RuntimeError: worker 1: others hold memory", "num_tests": 1}
    assert ends == [[expected] * 2] * 2
    assert not Ledger.read(plan.run).events("failure")


def test_an_error_of_a_device__is_no_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device may take the test."""
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert why_untested(error, CPU) is None

    def failing(*_: Any) -> str:
        raise error

    monkeypatch.setattr(self_test, "_checksum", failing)
    config = plan_of(tmp_path).config
    with pytest.raises(torch.AcceleratorError):
        self_test.self_test(config, CPU)
