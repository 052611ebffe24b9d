"""Where a run continues once a worker was found wrong."""

from typing import Any

import pytest

from jobs.run.ledger import void
from jobs.sentinel.way_back import (
    MOST_WAYS_BACK,
    Proof,
    WayBack,
    audits_of_node,
    checkpoints_of,
    doubtful_step,
    nodes_of_last_step,
    pending,
    steps_to_compare,
    way_back,
    way_back_before,
    why_no_further,
)

THREE = [Proof(100, "a"), Proof(200, "b"), Proof(300, "c")]


def checkpoint(step: int, parameter_hash: str = "h", *, generation: int = 1) -> dict[str, Any]:
    return {
        "event": "checkpoint",
        "step": step,
        "parameter_hash": parameter_hash,
        "generation": generation,
    }


def corruption(way: WayBack | None, *, generation: int = 1, attempt: int = 1) -> dict[str, Any]:
    fields = way.fields() if way else {"to_step": None}
    return {"event": "corruption", "generation": generation, "attempt": attempt, **fields}


@pytest.mark.parametrize(
    ("checkpoints", "least_steps", "expected"),
    [
        ([], 1, WayBack(0)),
        (THREE[:1], 1, WayBack(0, THREE[0])),
        (THREE, 1, WayBack(200, THREE[2])),
        (THREE, 100, WayBack(200, THREE[2], 100)),
        (THREE, 101, WayBack(100, THREE[2], 101)),
        (THREE, 250, WayBack(0, THREE[2], 250)),
        ([Proof(299, "b"), THREE[2]], 1, WayBack(299, THREE[2])),
    ],
)
def test_the_way_back_has_enough_steps_to_compare(
    checkpoints: list[Proof], least_steps: int, expected: WayBack
) -> None:
    assert way_back(checkpoints, least_steps=least_steps) == expected


@pytest.mark.parametrize(("audited_step", "to_step"), [(301, 300), (300, 200), (50, 0)])
def test_a_wrong_copy_is_older_than_no_audit_that_found_all_copies_alike(
    audited_step: int, to_step: int
) -> None:
    assert way_back_before(THREE, audited_step=audited_step) == WayBack(to_step)


def test_steps_are_compared_until_a_worker_so_often_wrong_must_be_wrong_in_one() -> None:
    assert steps_to_compare(num_audits=1, num_wrong=1, turns_per_step=4) == 3
    assert steps_to_compare(num_audits=1, num_wrong=2, turns_per_step=4) == 3
    assert steps_to_compare(num_audits=200, num_wrong=2, turns_per_step=4) == 250


def test_audits_count_from_the_start_in_which_a_node_joined() -> None:
    lines = [
        {"event": "start", "step": 0, "workers": [{"node": "a"}]},
        {"step": 1},
        {"event": "start", "step": 60, "workers": [{"node": "a"}, {"node": "b"}]},
    ]
    assert audits_of_node(lines, "a", step=100, every_steps=10) == 10
    assert audits_of_node(lines, "b", step=100, every_steps=10) == 4
    assert audits_of_node(lines, "c", step=100, every_steps=10) == 1
    assert audits_of_node(lines, "b", step=100, every_steps=50) == 1, "that of its first steps"


def test_checkpoints_behind_which_the_run_went_back_do_not_count() -> None:
    lines = [
        checkpoint(0),
        checkpoint(100, "a"),
        checkpoint(200, "b"),
        checkpoint(300, "wrong"),
        corruption(WayBack(200, Proof(300, "wrong"))),
        checkpoint(400, "stored meanwhile"),
        checkpoint(300, "c", generation=2),
    ]
    assert checkpoints_of(lines, range(1000)) == THREE
    assert checkpoints_of(lines, [200]) == [THREE[1]], "the others were deleted"
    [way] = void(lines)
    assert way.covers(300, generation=1)
    assert not way.covers(300, generation=2)
    assert not way.covers(200, generation=1)


def test_checkpoints_count_from_step_1_on__and_each_way_back_takes_its_own() -> None:
    lines = [checkpoint(0), checkpoint(1, "a"), checkpoint(3)]
    assert checkpoints_of(lines[:2], range(9)) == [Proof(1, "a")]
    lines += [corruption(WayBack(1)), corruption(WayBack(3))]
    assert checkpoints_of(lines, range(9)) == [Proof(1, "a")]


def test_a_proof_is_owed_until_it_is_proven_or_refuted() -> None:
    owed = WayBack(200, THREE[2], 7)
    lines = [corruption(None), corruption(owed)]
    assert pending(lines) == owed
    assert pending([*lines, {"event": "proven"}]) is None
    assert pending([*lines, corruption(WayBack(0))]) is None
    further = WayBack(100, THREE[1], 7)
    refuted = corruption(further) | {"event": "refuted"}
    assert pending([*lines, refuted]) == further
    assert pending([*lines, corruption(None) | {"event": "refuted"}]) is None


def undecided(attempt: int, *, to_step: int = 3) -> dict[str, Any]:
    return {
        "event": "undecided",
        "step": 7,
        "attempt": attempt,
        "generation": attempt,
        "what": "weights",
        "nodes": {"0": "a", "1": "b"},
        "to_step": to_step,
    }


def test_a_run_that_goes_back_again_and_again_without_a_new_step_stops() -> None:
    taken = [{"step": step} for step in (4, 5, 6)]
    lines: list[dict[str, Any]] = [{"step": 6}]
    for attempt in range(1, MOST_WAYS_BACK + 1):
        assert why_no_further(lines) is None
        lines += [undecided(attempt), undecided(attempt) | {"what": "vectors"}, *taken]
    reason = why_no_further(lines)
    assert reason is not None
    assert "went back 8 times and got no further than step 6" in reason
    assert "at step 7, on a and b" in reason
    assert why_no_further([*lines, {"step": 7}]) is None
    assert why_no_further([*lines, {"event": "gave_up"}]) is None


def test_the_first_step_gets_a_run_further_too() -> None:
    lines: list[dict[str, Any]] = [undecided(attempt, to_step=0) for attempt in range(8)]
    assert "went back 8 times and got no further than step 0" in str(why_no_further(lines))
    assert why_no_further([*lines, {"step": 1}]) is None


def test_ways_back_of_workers_that_are_left_out_are_bounded_too() -> None:
    lines: list[dict[str, Any]] = [{"step": 6}]
    for attempt in range(1, MOST_WAYS_BACK + 1):
        way = corruption(WayBack(3), attempt=attempt)
        lines.append(way | {"node": f"node-{attempt}", "what": "sum", "step": 7})
    assert "on node-8" in str(why_no_further(lines))


def test_ways_back_that_refute_go_further_each_time_and_do_not_count() -> None:
    refuted = {"event": "refuted", "to_step": 3, "generation": 1, "attempt": 1}
    assert why_no_further([{"step": 6}, *[refuted] * 2 * MOST_WAYS_BACK]) is None


def test_the_step_of_the_last_contradiction_is_audited_once_more() -> None:
    assert doubtful_step([{"step": 5}]) is None
    last = undecided(3) | {"step": 9}
    assert doubtful_step([undecided(1), undecided(2), last, {"step": 10}]) == 9


def test_the_nodes_of_the_last_step_are_those_of_the_attempt_that_took_it() -> None:
    def start(*nodes: str) -> dict[str, Any]:
        return {"event": "start", "workers": [{"node": node} for node in nodes]}

    assert nodes_of_last_step([start("a", "b")]) == set()
    lines = [start("a", "b"), {"event": "skip"}, start("a", "c")]
    assert nodes_of_last_step(lines) == {"a", "b"}
    assert nodes_of_last_step([*lines, {"step": 2}]) == {"a", "c"}
