"""People read words where programs read names, and nothing of what did not occur."""

from cluster.output.result_text import lines
from cluster.output.spoken_names import for_people


def test_a_result_is_told_in_words() -> None:
    status = {"run_id": "first", "backend": "by hand", "where": "desk", "number": 0}
    assert for_people(status) == {"run_id": "first", "kind of job": "by hand", "place": "desk"}
    assert for_people(status | {"number": 2})["submissions"] == 2
    assert for_people({"world_sizes": [2, 1], "lost_steps": 0}) == {
        "workers by attempt": [2, 1],
        "steps taken again": 0,
    }


def test_only_reasons_that_dropped_something_are_shown() -> None:
    assert for_people({"dropped": {"empty": 0, "duplicate": 2}}) == {"dropped": {"duplicate": 2}}
    assert list(lines(for_people({"dropped": {"empty": 0}}))) == ["dropped  none"]
