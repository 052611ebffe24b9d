"""A trace of spot nodes is read whole, and what is wrong with one is said with its line."""

from pathlib import Path

import pytest

from jobs.plan.spot_trace import SpotTrace, read_trace
from raymill.errors import UserError

TEXT = "# a day\nseconds,nodes\n0,4\n\n600,4\n900, 2\n# later\n1500,0\n"


def written(folder: Path, text: str) -> str:
    path = folder / "day.csv"
    path.write_text(text)
    return str(path)


def test_lines_become_changes_and_the_last_one_lasts_a_tick(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, TEXT))
    assert trace == SpotTrace(((0.0, 4), (900.0, 2), (1500.0, 0)), 1800.0)
    assert [*trace.intervals()] == [(0, 900, 4), (900, 1500, 2), (1500, 1800, 0)]
    assert (trace.node_seconds, trace.max_nodes) == (900 * 4 + 600 * 2, 4)
    assert trace.mean_nodes == 4800 / 1800
    fast = trace.compressed(60)
    assert fast == SpotTrace(((0.0, 4), (15.0, 2), (25.0, 0)), 30.0)
    assert fast.mean_nodes == trace.mean_nodes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0,4\n600,2\n", "line 1: '0,4' was read, expected the header seconds,nodes"),
        ("seconds,nodes\n5,4\n9,1\n", "line 2: '5,4' was read, expected a first line at 0 seconds"),
        ("seconds,nodes\n0,4\n0,1\n", "line 3: '0,1' was read, expected more than 0 seconds"),
        ("seconds,nodes\n0,4\n9,x\n", "line 3: '9,x' was read, expected two numbers"),
        ("seconds,nodes\n0,4\n9,1,1\n", "line 3: '9,1,1' was read, expected two numbers"),
        ("seconds,nodes\n0,4\nnan,1\n", "line 3: 'nan,1' was read, expected two numbers"),
        ("seconds,nodes\n0,4\n9,-1\n", "line 3: '9,-1' was read, expected two numbers"),
        ("seconds,nodes\n0,4\n9,1.5\n", "line 3: '9,1.5' was read, expected two numbers"),
        ("seconds,nodes\n0,4\n", "has 1 lines of seconds,nodes; expected two at least"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        read_trace(written(tmp_path, text))
    assert problem in str(caught.value)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file; expected a trace"):
        read_trace(str(tmp_path / "none.csv"))
