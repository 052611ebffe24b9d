"""Workers that round differently are told apart, and those that do not are not."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.settings.run import RunConfig
from jobs.pretrain import unfinished
from jobs.run.ledger import Ledger
from jobs.training.mixed_hardware import (
    changes,
    differences,
    hardware,
    settle_rounding,
    why_refused,
)
from jobs.training.train_loop import train
from jobs.watching.run_watcher import message_of
from tests.jobs.runs import tiny_plan
from tests.jobs.unlike_workers import train_unlike_workers, with_scaling
from tests.jobs.worker_processes import exit_code, into_log, worker_process

pytestmark = pytest.mark.more


def test_like_workers_have_no_differences() -> None:
    own = hardware(RunConfig(), torch.device("cpu"))
    assert own["torch"] == torch.__version__
    assert own["threads"] == str(torch.get_num_threads())
    assert own["cpu"]
    assert (
        differences([own, dict(own), hardware(RunConfig(), torch.device("cpu"))], nodes="abc") == []
    )
    assert differences([own], nodes="a") == []


def test_hardware__of_portable_kernels__is_their_sources_alone() -> None:
    portable = RunConfig.model_validate({"train": {"compute": "portable"}})
    assert [*hardware(portable, torch.device("cpu"))] == ["portable_kernels"]


def test_each_difference_names_its_ranks_and_their_nodes() -> None:
    own = {"cpu": "A", "torch": "2.8", "threads": "1"}
    lines = differences(
        [own, own | {"cpu": "B"}, own | {"threads": "4"}, own | {"gpu": "H100"}], nodes="aabb"
    )
    assert lines == [
        "cpu: A (rank 0 2 3 on a b), B (rank 1 on a)",
        "gpu: H100 (rank 3 on b), none (rank 0 1 2 on a b)",
        "threads: 1 (rank 0 1 3 on a b), 4 (rank 2 on b)",
    ]


def test_changes__are_those_since_the_last_attempt_that_recorded_its_hardware() -> None:
    cpu, newer = {"cpu": "A", "torch": "2.13"}, {"cpu": "A", "torch": "2.14"}
    old = Ledger([{"event": "start"}])  # of a version that recorded none
    assert changes(old, cpu) == changes(Ledger([]), cpu) == []
    before = Ledger([{"event": "start", "hardware": cpu}, {"event": "start"}])
    assert changes(before, cpu | {"recorded": "since a later version"}) == []
    assert changes(before, newer) == ["torch: 2.13 until now, 2.14 from here on"]
    assert changes(before, cpu | {"gpu": "H100"}) == ["gpu: none until now, H100 from here on"]
    assert changes(Ledger([*before.lines, {"event": "start", "hardware": newer}]), newer) == []


def test_unlike_workers__are_named_and_train_nothing_until_that_is_allowed(tmp_path: Path) -> None:
    plan = tiny_plan(str(tmp_path))
    ledger = train_unlike_workers(plan, tmp_path)
    assert [line["event"] for line in ledger.lines] == ["gave_up"]
    reason = str(unfinished(plan, ledger))
    assert (
        "threads: 1 (rank 0 on node-0), 2 (rank 1 on node-1). Give the run workers that are alike"
        in reason
    )
    assert "scaling.mixed_hardware=allow" in reason
    ledger = train_unlike_workers(with_scaling(plan, mixed_hardware="allow"), tmp_path)
    assert ledger.events("finish")
    (event,) = ledger.events("tolerance_mode")
    assert "threads: 1 (rank 0 on node-0), 2 (rank 1 on node-1)" in message_of(event)


def test_why_refused__is_nothing_where_no_bits_are_promised_any_more() -> None:
    begun_mixed = Ledger([{"event": "tolerance_mode", "reasons": ["threads"]}])
    config = RunConfig.model_validate({"model": {"preset": "tiny"}})
    inexact = RunConfig.model_validate({"model": {"preset": "tiny"}, "train": {"exact": False}})
    assert why_refused(config, Ledger([]), []) is None
    assert why_refused(config, Ledger([]), ["threads"]) is not None
    assert why_refused(config, begun_mixed, ["threads"]) is None
    assert why_refused(inexact, Ledger([]), ["threads"]) is None


@pytest.mark.more
def test_a_resume_on_other_hardware__waits_until_that_is_allowed(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    plan = tiny_plan(str(tmp_path))
    other = with_scaling(plan, threads_per_worker=2)
    try:
        train(replace(plan, until=3), rank=0, world_size=1)
        train(replace(other, until=5), rank=0, world_size=1)
        assert "threads: 1 until now, 2 from here on" in str(
            unfinished(plan, Ledger.read(plan.run))
        )
        assert len(Ledger.read(plan.run).steps) == 3
        train(replace(plan, until=5), rank=0, world_size=1)
        assert not Ledger.read(plan.run).events("tolerance_mode"), (
            "on what it began with it goes on as before"
        )
        train(replace(with_scaling(other, mixed_hardware="allow"), until=6), rank=0, world_size=1)
        train(plan, rank=0, world_size=1)
    finally:
        torch.set_num_threads(threads)
    ledger = Ledger.read(plan.run)
    assert [line["attempt"] for line in ledger.events("tolerance_mode")] == [3, 4], (
        "what was allowed once is said again"
    )
    assert [line["hardware"]["threads"] for line in ledger.events("start")] == ["1", "1", "2", "1"]
    assert ledger.events("finish")


def settle(log: Path, use_gpu: bool) -> None:
    into_log(log)
    config = RunConfig.model_validate(
        {"model": {"preset": "tiny"}, "scaling": {"max_workers": 1, "use_gpu": use_gpu}}
    )
    settle_rounding(config)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    if use_gpu:
        assert torch._inductor.config.deterministic
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NVIDIA_TF32_OVERRIDE"]) == (
            ":4096:8",
            "0",
        )
    else:
        assert "torch._inductor.config" not in sys.modules, "a second of each start"


@pytest.mark.parametrize("use_gpu", [False, True])
def test_rounding_is_settled_whole_and_cheaply_on_a_cpu(tmp_path: Path, use_gpu: bool) -> None:
    process = worker_process(settle, tmp_path / "log", use_gpu)
    process.start()
    assert exit_code(process) == 0, (tmp_path / "log").read_text()
