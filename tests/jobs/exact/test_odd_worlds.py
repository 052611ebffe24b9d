"""Odd settings, and more workers than the other tests start: one hash all the same."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache

import pytest

from tests.jobs.train_worlds import MANY_CASES, ODD_CASES, Case
from tests.jobs.world_runs import Outcome, run_worlds

pytestmark = pytest.mark.slow

RunsOf = Callable[[str, str], list[Outcome]]


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> RunsOf:
    """Returns the results of a suite's cases in some worlds."""

    @cache
    def outcomes(worlds: str, suite: str) -> list[Outcome]:
        return run_worlds(tmp_path_factory.mktemp("worlds"), worlds, suite, within_s=180)

    return outcomes


def check_one_hash(runs: list[Outcome], case: Case, worlds: str) -> str:
    """Returns the hash."""
    runs_of_case = [run for run in runs if run["case"] == asdict(case)]
    assert [run["world"] for run in runs_of_case] == worlds.split(",")
    hashes = {value for run in runs_of_case for value in run["hashes"]}
    assert len(hashes) == 1, {run["world"]: run["hashes"] for run in runs_of_case}
    assert len({tuple(run["losses"]) for run in runs_of_case}) == 1
    return hashes.pop()


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_an_odd_run_has_one_hash_in_worlds_of_1_3_and_4(runs_of: RunsOf, case: Case) -> None:
    check_one_hash(runs_of("1,3,4", "odd"), case, "1,3,4")


def test_odd_runs_differ(runs_of: RunsOf) -> None:
    runs = runs_of("1,3,4", "odd")
    hashes = {check_one_hash(runs, case, "1,3,4") for case in ODD_CASES}
    assert len(hashes) == len(ODD_CASES) >= 10


@pytest.mark.parametrize("case", MANY_CASES, ids=str)
def test_six_and_nine_workers_have_the_hash_of_one(runs_of: RunsOf, case: Case) -> None:
    """Teams of four and two, and of eight and one: none of them a power of two."""
    check_one_hash(runs_of("1,6,9", "many"), case, "1,6,9")
