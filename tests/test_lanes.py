"""Files that start clusters or share a Ray are found, and begin."""

from tests.lanes import LANES, lane_of, place
from tests.repository import REPOSITORY


def test_files_of_a_lane_follow_each_other_and_begin() -> None:
    files = [
        path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("tests/**/test_*.py")
    ]
    in_order = [lane_of(file) for file in sorted(files, key=place)]
    assert list(dict.fromkeys(in_order)) == [*LANES, None]
    assert lane_of("tests/serving/endpoint/test_endpoint.py") == "serving"
    assert lane_of("tests/jobs/test_evaluate.py") == "data"
    assert lane_of("tests/e2e/test_exactness.py") == "clusters"
    assert lane_of("tests/model/test_gpt.py") is None
