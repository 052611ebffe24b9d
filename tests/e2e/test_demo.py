"""The whole demo works on a processor restricted to AVX2; most laptops and many clouds have no
more."""

import json
import os
from pathlib import Path

import pytest

from tests.command_line import raymill
from tests.time_limits import slowness

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

LONGEST_S = 360.0
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "RAYMILL_KERNELS_MARCH": "x86-64-v3",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="AVX2 is x86's")
def test_it_takes_minutes_without_avx512(tmp_path: Path) -> None:
    longest_s = LONGEST_S * slowness()
    done = raymill(
        "demo", "--storage.uri", str(tmp_path / "store"), "--json", env=AVX2, timeout_s=longest_s
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["precision"] == "fp32"
    assert result["world_sizes"] == [2, 1, 2]
    assert result["train_loss"] < result["first_loss"] - 2
    assert all(completion["text"] for completion in result["completions"])
    assert result["wall_s"] < longest_s, result["stage_s"]
