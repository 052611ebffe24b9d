"""What becomes of a worker that was found wrong."""

from typing import Any

import pytest

from jobs.sentinel.measures import REPEATED_WITHIN_S, Measure, measure, ranks_to_leave_out
from jobs.sentinel.verdict import Corruption, What

NOW_S = 1e9
NODES = ["a", "b"]


def corruption(what: What = What.GRADIENT, *, rank: int = 1, repeats: bool = False) -> Corruption:
    return Corruption(what, rank, shown=1, right=2, repeats=repeats)


def event(node: str, *, age_s: float, name: str = "corruption") -> dict[str, Any]:
    return {"event": name, "node": node, "time": NOW_S - age_s}


@pytest.mark.parametrize(
    ("found", "earlier", "expected"),
    [
        (corruption(), [], Measure.TAKEN_AGAIN),
        (corruption(What.WEIGHTS), [], Measure.GONE_BACK),
        (corruption(What.VECTORS), [], Measure.GONE_BACK),
        (corruption(What.SUM), [], Measure.TAKEN_AGAIN),
        (corruption(What.UPDATE), [], Measure.GONE_BACK),
        (corruption(repeats=True), [], Measure.LEFT_OUT),
        (corruption(), [event("b", age_s=60)], Measure.LEFT_OUT),
        (corruption(), [event("b", age_s=60, name="named")], Measure.LEFT_OUT),
        (corruption(What.WEIGHTS), [event("b", age_s=60)], Measure.LEFT_OUT),
        (corruption(), [event("b", age_s=REPEATED_WITHIN_S + 1)], Measure.TAKEN_AGAIN),
        (corruption(), [event("a", age_s=60)], Measure.TAKEN_AGAIN),
        (corruption(), [event("b", age_s=60, name="straggler")], Measure.TAKEN_AGAIN),
    ],
)
def test_a_node_is_left_out_at_once_if_it_is_wrong_again_and_else_at_its_second_time(
    found: Corruption, earlier: list[dict[str, Any]], expected: Measure
) -> None:
    known: dict[str, Any] = {"nodes": NODES, "earlier": earlier, "now_s": NOW_S}
    assert measure([found], **known) is expected
    left_out = [found.rank] if expected is Measure.LEFT_OUT else []
    assert ranks_to_leave_out([found], **known) == left_out


def test_of_several_the_strongest_measure_is_taken() -> None:
    known: dict[str, Any] = {"nodes": NODES, "earlier": [], "now_s": NOW_S}
    several = [corruption(rank=0), corruption(rank=1, repeats=True)]
    assert measure(several, **known) is Measure.LEFT_OUT
    assert ranks_to_leave_out(several, **known) == [1]
