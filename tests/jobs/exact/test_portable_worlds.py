"""Training by portable kernels: the hashes below are those of every kind of processor, any worlds of
workers that differ, every way to shard, and every commit."""

import os
from pathlib import Path

import pytest

from tests.jobs.train_worlds import PORTABLE_CASES
from tests.jobs.world_runs import run_worlds

GOLDEN = {
    "gelu adamw none": "49b4cc898af7 daf493296219",
    "gelu_exact adamw optimizer": "f7f420001434 8e00e08ca100",
    "relu adamw gradients": "2f976ad115ec 74208741eb8a",
    "gelu muon parameters": "2132b1395f60 eaeeb416ad5e",
}
"""The beginning of the SHA-256 of the weights and of that of the update rule's vectors, by case."""


def found_in(folder: Path, sizes: str) -> dict[str, set[str]]:
    """Returns the hashes of all worlds by case."""
    found: dict[str, set[str]] = {}
    for outcome in run_worlds(folder, sizes, "portable", within_s=120):
        case = outcome["case"]
        name = f"{case['activation']} {case['optimizer']} {case['shard']}"
        short = {" ".join(word[:12] for word in whole.split()) for whole in outcome["hashes"]}
        found.setdefault(name, set()).update(short)
    return found


def golden() -> dict[str, set[str]]:
    return {name: {hashes} for name, hashes in GOLDEN.items()}


def test_a_world_of_one_and_of_two_that_differ__have_the_golden_hashes(tmp_path: Path) -> None:
    """Every second worker is held to AVX2, and workers have other numbers of threads."""
    assert len(PORTABLE_CASES) == len(GOLDEN)
    assert found_in(tmp_path, "1,2") == golden()


@pytest.mark.more
def test_worlds_of_one_to_four_and_resizes__on_the_least_processor__have_the_golden_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    }
    for name, value in least.items():
        monkeypatch.setitem(os.environ, name, value)
    assert found_in(tmp_path, "4") == golden()
