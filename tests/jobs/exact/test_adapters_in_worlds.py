"""Adapters in the exact engine: one hash for any number of workers, however the frozen weights are
divided."""

from dataclasses import asdict
from pathlib import Path

import pytest

from tests.jobs.train_worlds import LORA_CASES
from tests.jobs.world_runs import run_worlds


@pytest.mark.slow
def test_adapters__in_any_world_and_sharding__have_one_hash(tmp_path: Path) -> None:
    runs = run_worlds(tmp_path, "5", "lora", within_s=180)
    for case in LORA_CASES:
        mine = [run for run in runs if run["case"] == asdict(case)]
        assert [run["world"] for run in mine] == ["1", "2", "3", "4", "5", "resized"]
        hashes = {value for run in mine for value in run["hashes"]}
        assert len(hashes) == 1, case
        assert len({tuple(run["losses"]) for run in mine}) == 1, case
    whole, divided = LORA_CASES[:2]
    assert whole.numbers == divided.numbers
    of_both = [run["hashes"][0] for run in runs if run["case"] in (asdict(whole), asdict(divided))]
    assert len(set(of_both)) == 1
