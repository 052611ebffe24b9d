"""Real workers: every rank's phases in the ledger, the slow one named, and the same numbers for any
world."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.settings.run import run_storage
from jobs.proof.diff_runs import diff
from jobs.report.why_slow import why_slow
from jobs.run.ledger import Ledger
from tests.jobs.insight_worlds import NUM_STEPS, SLOW_BY_S, WORLDS, plan_of
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    command = [sys.executable, "-m", "tests.jobs.insight_worlds", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=REPOSITORY, timeout=limit_s(240), check=True)
    return folder


def ledger_of(name: str, folder: Path) -> Ledger:
    return Ledger.read(run_storage(plan_of(name, folder).config))


@pytest.mark.parametrize("name", WORLDS)
def test_every_rank_is_recorded(folder: Path, name: str) -> None:
    ledger = ledger_of(name, folder)
    windows = ledger.events("phases")
    assert [event["step"] for event in windows] == [10, 20]
    for event in windows:
        assert len(event["ranks"]) == WORLDS[name]
        assert event["lanes"] == [2 / WORLDS[name]] * WORLDS[name]
        walls = [sum(seconds.values()) for seconds in event["ranks"]]
        assert max(walls) == pytest.approx(min(walls), rel=0.3), "ranks keep step"
        assert all(
            {"load", "forward", "loss", "backward"} <= seconds.keys() for seconds in event["ranks"]
        )


def test_layers_have_the_same_numbers_for_any_world(folder: Path) -> None:
    def measured(name: str) -> list[tuple[int, list[float], list[float], list[float]]]:
        return [
            (event["step"], event["gradient_norm"], event["weight_norm"], event["update_ratio"])
            for event in ledger_of(name, folder).events("layers")
        ]

    assert [step for step, *_ in measured("one")] == [6, 12, 18]
    assert all(measured(name) == measured("one") for name in WORLDS)


def test_worlds_differ_in_nothing_that_diff_compares(folder: Path) -> None:
    """With a parameter hash at every fourth step, as well as at the checkpoint."""
    runs = [run_storage(plan_of(name, folder).config) for name in ("one", "divided")]
    result = diff(*runs)
    assert (result.equal, result.equal_steps, result.verdict) == (
        True,
        NUM_STEPS,
        "equal for 20 steps",
    )
    hashes = [line["step"] for line in Ledger.read(runs[1]).steps if "parameter_hash" in line]
    assert hashes == [4, 8, 12, 16, 20]


def test_the_slow_rank_is_named(folder: Path) -> None:
    ledger = ledger_of("slow", folder)
    (event,) = ledger.events("straggler")
    assert (event["step"], event["rank"]) == (20, 1)
    assert event["node"] == ledger.events("start")[0]["workers"][1]["node"]
    assert event["ratio"] > 1.3
    assert all(window["ranks"][1]["forward"] > SLOW_BY_S for window in ledger.events("phases"))
    found = why_slow(ledger)
    assert found.fix_first == "straggler"
    assert found.evidence.straggler.rank == 1
    assert "rank 1 on" in found.verdict.lower()
    assert found.shares["straggler"] > 0.2
