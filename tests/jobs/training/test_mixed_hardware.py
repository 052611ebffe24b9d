"""Workers that round differently are told apart, and those that do not are not."""

import os
import sys
from pathlib import Path

import pytest
import torch

from cluster.settings.run import RunConfig
from jobs.training.mixed_hardware import differences, hardware, settle_rounding
from tests.jobs.worker_processes import exit_code, into_log, worker_process


def test_like_workers_have_no_differences() -> None:
    own = hardware(torch.device("cpu"))
    assert own["torch"] == torch.__version__
    assert own["threads"] == str(torch.get_num_threads())
    assert own["cpu"]
    assert differences([own, dict(own), hardware(torch.device("cpu"))]) == []
    assert differences([own]) == []


def test_each_difference_names_its_ranks() -> None:
    own = {"cpu": "A", "torch": "2.8", "threads": "1"}
    lines = differences([own, own | {"cpu": "B"}, own | {"threads": "4"}, own | {"gpu": "H100"}])
    assert lines == [
        "cpu: A (rank 0 2 3), B (rank 1)",
        "gpu: H100 (rank 3), none (rank 0 1 2)",
        "threads: 1 (rank 0 1 3), 4 (rank 2)",
    ]


def settle(log: Path, use_gpu: bool) -> None:
    into_log(log)
    config = RunConfig.model_validate({"model": {"preset": "tiny"}, "scaling": {"max_workers": 1, "use_gpu": use_gpu}})
    settle_rounding(config)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    if use_gpu:
        assert torch._inductor.config.deterministic
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NVIDIA_TF32_OVERRIDE"]) == (":4096:8", "0")
    else:
        assert "torch._inductor.config" not in sys.modules, "a second of each start"


@pytest.mark.parametrize("use_gpu", [False, True])
def test_rounding_is_settled_whole_and_cheaply_on_a_cpu(tmp_path: Path, use_gpu: bool) -> None:
    process = worker_process(settle, tmp_path / "log", use_gpu)
    process.start()
    assert exit_code(process) == 0, (tmp_path / "log").read_text()
