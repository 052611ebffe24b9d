"""Where a run continues once a worker was found wrong."""

from typing import Any

import pytest

from jobs.sentinel.way_back import (
    Proof,
    WayBack,
    audits_of_node,
    checkpoints_of,
    pending,
    proven_to,
    steps_to_compare,
    void,
    way_back,
    way_back_before,
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
    assert steps_to_compare(num_audits=1, num_wrong=2, turns_per_step=4) == 3
    assert steps_to_compare(num_audits=200, num_wrong=2, turns_per_step=4) == 250


def test_audits_count_from_the_start_in_which_a_node_joined() -> None:
    lines = [
        {"event": "start", "step": 0, "workers": [{"node": "a"}]},
        {"event": "start", "step": 60, "workers": [{"node": "a"}, {"node": "b"}]},
    ]
    assert audits_of_node(lines, "a", step=100, every_steps=10) == 10
    assert audits_of_node(lines, "b", step=100, every_steps=10) == 4
    assert audits_of_node(lines, "c", step=100, every_steps=10) == 1


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


def audited(step: int) -> dict[str, Any]:
    return {"step": step, "audit_seconds": 0.1}


def saved(step: int, proven: int | None, *, generation: int = 1) -> dict[str, Any]:
    return checkpoint(step, generation=generation) | {"proven_to": proven}


START = {"event": "start", "step": 0}
GONE_BACK = corruption(WayBack(200, Proof(300, "wrong")))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([START, {"step": 25}, checkpoint(20)], None),
        ([START, saved(20, None)], None),
        ([START, audited(25), {"step": 26}], 24),
        ([START, audited(25), saved(20, 20)], 24),
        ([saved(300, 274), {"step": 310}], 274),
        ([audited(325), GONE_BACK], 200),
        ([audited(325), corruption(None)], 324),
        ([audited(325), GONE_BACK, {"event": "proven", "step": 300}], 300),
        # Stored by the thread that saves after the run went back
        ([audited(325), GONE_BACK, saved(320, 320)], 200),
        ([audited(325), GONE_BACK, saved(320, 319, generation=2)], 319),
        ([audited(325), {"event": "rollback", "first": 311}], 310),
        ([audited(325), {"event": "start", "step": 300}], 300),
    ],
)
def test_a_run_is_proven_to_what_its_last_audit_found_alike_unless_it_went_back(
    lines: list[dict[str, Any]], expected: int | None
) -> None:
    assert proven_to(lines) == expected
