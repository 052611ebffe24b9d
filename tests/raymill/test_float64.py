"""The exact engine takes the steps of a plain loop in float64, to rounding, however it is sharded."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.raymill.float64_worlds import MODULES, SHARDS
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

ROUNDING = 1e-5  # of the largest change: fp32 has 6e-8 of a weight, and a few steps lie between


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("world")
    done = subprocess.run(
        [sys.executable, "-m", "tests.raymill.float64_worlds", "3", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=limit_s(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("name", MODULES)
def test_a_module__trained_by_three_workers__ends_where_a_plain_loop_in_float64_does(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    by_shard = found[name]
    assert [*by_shard] == [*SHARDS]
    assert len({ending["hash"] for ending in by_shard.values()}) == 1
    for ending in by_shard.values():
        assert ending["change"] > 0.001, "the weights have moved"
        assert ending["error"] < ROUNDING
