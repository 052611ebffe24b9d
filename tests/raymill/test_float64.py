"""The exact engine takes the steps of a plain loop in float64, to rounding, however it is sharded."""

from typing import Any

import pytest

from tests.json_program import last_line_of
from tests.raymill.float64_worlds import MODULES, SHARDS

pytestmark = pytest.mark.more

ROUNDING = 1e-5  # of the largest change: fp32 has 6e-8 of a weight, and a few steps lie between


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("world")
    return last_line_of("-m", "tests.raymill.float64_worlds", "3", str(folder))


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
