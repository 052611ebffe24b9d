"""Every folder of tests that mirrors one of the code is an area, and the README's table names no
other."""

from tests.areas import README, areas, rows, with_rows
from tests.repository import REPOSITORY

# And what several areas share
NOT_AREAS = {"benchmarks", "chaos", "dashboards", "e2e", "gpu", "mutants"}
OF_SEVERAL = {"serving/clients", "serving/endpoint"}


def test_each_folder_of_tests_is_an_area_or_known_as_none() -> None:
    folders = set()
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        parts = path.relative_to(REPOSITORY / "tests").parent.parts
        if parts and parts[0] not in NOT_AREAS:
            folders.add("/".join(parts))
    shared = {"cluster", "jobs", "serving", *OF_SEVERAL}
    outside = [
        folder
        for folder in folders - shared
        if not any(f"{folder}/".startswith(f"{area}/") for area in areas())
    ]
    assert len(areas()) > 30 and outside == []


def test_the_table_names_areas_alone() -> None:
    assert set(rows(README.read_text(encoding="utf-8"))) <= set(areas())


def test_a_measured_row_takes_the_place_of_the_earlier_one() -> None:
    text = README.read_text(encoding="utf-8")
    once = with_rows(text, {"model": "| `model` | 1 | 2 | then |"})
    twice = with_rows(once, {"jobs/run": "| `jobs/run` | 3 | 4 | now |"})
    assert rows(twice)["model"] == "| `model` | 1 | 2 | then |"
    assert rows(twice)["jobs/run"] == "| `jobs/run` | 3 | 4 | now |"
    assert twice.partition("<!-- areas: begin")[0] == text.partition("<!-- areas: begin")[0]
    assert twice.partition("end -->")[2] == text.partition("end -->")[2]
