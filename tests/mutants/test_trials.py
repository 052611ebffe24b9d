"""Mutants of a made module are killed by its tests, or survive them, as they should."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tests.mutants.trials as trials_module
from tests.mutants.chosen_tests import LONGEST_TEST_S, Baseline, InThisOrder
from tests.mutants.trials import Area, Outcome, Trial
from tests.mutants.try_mutants import END, explained, files_of, known_areas, mutants_of, with_rows
from tests.repository import REPOSITORY

MADE = "made_for_mutants"
CODE = """
def smaller(a, b):
    return a if a < b else b

def count(n):
    steps = 0
    while n > 0:
        n -= 1
        steps += 1
    return steps
"""
TESTS = f"""
import subprocess, sys
from {MADE} import count, smaller

def test_smaller():
    assert smaller(1, 2) == smaller(2, 1) == 1

def test_count():
    assert count(2) == 2 or count(2) == 4

def test_count_in_another_process():
    code = "from {MADE} import count; print(count(3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "3\\n"
"""


def test_each_mutant_ends_as_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, tests = tmp_path / f"{MADE}.py", tmp_path / "test_made.py"
    code.write_text(CODE)
    tests.write_text(TESTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    area = Area([str(tests)], [code])
    assert len(area.baseline.seconds) == 3

    def trial(before: str, after: str) -> Trial:
        assert CODE.count(before) == 1
        return Trial(MADE, CODE.replace(before, after), area.baseline.order(str(code), None))

    trials = [
        trial("a < b", "a <= b"),  # the same function
        trial("a < b", "a > b"),
        trial("steps += 1", "steps += 2"),  # which another process alone sees
        trial("n -= 1", "n -= 0"),  # never ends
        trial("def smaller", "def larger"),
    ]
    found = {id(trial): outcome for trial, outcome in area.outcomes(trials, num_processes=2)}
    outcomes = [found[id(trial)] for trial in trials]
    killed, survived = Outcome.KILLED, Outcome.SURVIVED
    assert outcomes == [survived, killed, killed, Outcome.STUCK, killed]
    assert MADE not in sys.modules
    monkeypatch.setattr(trials_module, "_USUAL_S", 1.0)
    waits = Trial(MADE, "import threading\nthreading.Event().wait()", trials[0].tests)
    assert [*area.outcomes([waits], num_processes=1)] == [(waits, Outcome.STUCK)]


def test_tests_that_fail_anyway_try_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_made.py").write_text("def test_it(): assert not 'true'")
    with pytest.raises(ValueError, match=r"fail without any mutant:(?s:.*)assert not 'true'"):
        Area([str(tmp_path / "test_made.py")], [])


def test_tests_that_enter_the_function_come_first_and_long_ones_never() -> None:
    seconds = {"long": LONGEST_TEST_S + 1, "enters": 2.0, "quick": 0.1, "enters at once": 0.5}
    entered = {"long": {"f": [3]}, "enters": {"f": [3, 9]}, "enters at once": {"f": [3]}}
    seconds |= {"beside long": 0.0}
    paths = dict.fromkeys(seconds, "test_quick.py")
    paths |= dict.fromkeys(["long", "beside long"], "test_long.py")
    baseline = Baseline(seconds, paths, entered)
    assert baseline.order("f", 3) == ["enters at once", "enters", "quick", "beside long"]
    assert baseline.order("f", None) == ["quick", "enters at once", "enters", "beside long"]


@pytest.fixture
def processor_s() -> Iterator[Callable[[], float]]:
    """The seconds that are left to this process."""
    yield lambda: round(signal.getitimer(signal.ITIMER_PROF)[0])
    signal.setitimer(signal.ITIMER_PROF, 0)


def test_what_tests_share_may_take_longer_than_the_cheap_one_that_comes_first(
    request: pytest.FixtureRequest, processor_s: Callable[[], float]
) -> None:
    order = InThisOrder([], {request.node.nodeid: 100.0, "dear": 1000.0})
    order.pytest_runtest_logstart()
    assert processor_s() == 3002
    order.pytest_runtest_call(request.node)
    assert processor_s() == 302


@pytest.mark.parametrize("area", known_areas())
def test_an_area_has_modules_and_tests(area: str) -> None:
    values = known_areas()[area]
    assert sum(len(mutants_of(file)) for file in files_of(values["modules"])) > 10
    assert all((REPOSITORY / test).exists() for test in values["tests"])


def test_a_pattern_that_names_no_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no file is called raymill/nothing\.py"):
        files_of(["raymill/nothing.py"])


def test_a_survivor_that_is_explained_is_still_there() -> None:
    for file, line, change in explained():
        here = {(mutant.line, mutant.change.text) for mutant in mutants_of(file)}
        assert (line, change) in here, f"{file}: {line}"


def test_a_measured_row_takes_the_place_of_the_earlier_one() -> None:
    file = "raymill/state/span.py"
    once = with_rows(f"before<!-- mutants: begin -->old{END}after", {file: f"| `{file}` | 1 |"})
    twice = with_rows(once, {file: f"| `{file}` | 2 |"})
    assert "| 1 |" in once and "| 1 |" not in twice and f"| `{file}` | 2 |" in twice
    assert twice.startswith("before") and twice.endswith("after")
