"""What one of four workers holds of a model of 124M parameters, where the weights are sharded."""

from pathlib import Path

import pytest

from tests.benchmarks.bench_sharded import KEPT, MOST_OF_A_QUARTER, large_memory

pytestmark = pytest.mark.slow


def test_a_worker_of_four_holds_little_more_than_a_quarter(tmp_path: Path) -> None:
    share = large_memory(tmp_path)
    print(share)
    assert share["whole"] >= 16 * 124e6, "weights, gradients and two moments in fp32"
    assert all(share[name] > 0 for name in KEPT)
    assert share["over_quarter"] <= MOST_OF_A_QUARTER
