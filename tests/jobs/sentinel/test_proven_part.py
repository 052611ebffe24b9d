"""How far a run is proven."""

from typing import Any

import pytest

from jobs.sentinel.proven_part import ProvenPart, proven_part, proven_to


def step(number: int, *, proven: int, since: int | None = None) -> dict[str, Any]:
    return {"step": number, "proven_to": proven} | ({"not_proven_since": since} if since else {})


def saved(step: int, proven: int | None, *, generation: int = 1) -> dict[str, Any]:
    return {"event": "checkpoint", "step": step, "generation": generation, "proven_to": proven}


def corruption(to_step: int | None) -> dict[str, Any]:
    return {"event": "corruption", "generation": 1, "attempt": 1, "to_step": to_step}


START = {"event": "start", "step": 0}
GONE_BACK = corruption(200)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([START, {"step": 25}, saved(20, None)], None),
        ([START, saved(20, None)], None),
        ([START, step(25, proven=24), {"step": 26}], 24),
        ([START, step(25, proven=24), saved(20, 20)], 24),
        ([saved(300, 274), {"step": 310}], 274),
        ([step(325, proven=324), GONE_BACK], 200),
        ([step(325, proven=324), corruption(None)], 324),
        ([step(325, proven=324), GONE_BACK, {"event": "proven", "step": 300}], 300),
        # Stored by the thread that saves after the run went back
        ([step(325, proven=324), GONE_BACK, saved(320, 320)], 200),
        ([step(325, proven=324), GONE_BACK, saved(320, 319, generation=2)], 319),
        ([step(325, proven=324), {"event": "rollback", "first": 311}], 310),
        ([step(325, proven=324), {"event": "start", "step": 300}], 300),
        ([step(325, proven=324), {"step": 326}], 324),
        ([step(325, proven=324), GONE_BACK], 200),
    ],
)
def test_a_run_is_proven_to_what_its_last_audit_found_alike_unless_it_went_back(
    lines: list[dict[str, Any]], expected: int | None
) -> None:
    assert proven_to(lines) == expected


KILLED = {"event": "start", "step": 330}


@pytest.mark.parametrize(
    ("lines", "since"),
    [
        ([START, step(325, proven=324)], None),
        ([START, step(325, proven=324), KILLED], 325),
        # All hold the same since then, whatever it is
        (
            [
                START,
                step(325, proven=324),
                KILLED,
                step(350, proven=324, since=325),
                saved(340, 324),
            ],
            325,
        ),
        ([START, step(325, proven=324), KILLED, {"event": "proven", "step": 340}], 325),
        ([START, step(325, proven=324), KILLED, GONE_BACK, {"event": "start", "step": 200}], None),
        (
            [START, step(325, proven=324), {"event": "start", "step": 320}, step(350, proven=349)],
            None,
        ),
        ([step(355, proven=324, since=325)], 325),
        ([step(355, proven=324, since=325), step(400, proven=399)], None),
        ([START, KILLED], None),  # nothing is audited
    ],
)
def test_a_run_that_continued_from_a_state_that_was_not_proven_is_proven_no_further(
    lines: list[dict[str, Any]], since: int | None
) -> None:
    assert proven_part(lines).not_proven_since == since


def test_a_steps_line_has_what_is_proven() -> None:
    assert ProvenPart().fields() == {}
    assert ProvenPart(4).fields() == {"proven_to": 4}
    behind = ProvenPart(4).from_start(6)
    assert behind.up_to(8).fields() == {"proven_to": 4, "not_proven_since": 5}
    assert ProvenPart(4).from_start(3).up_to(8) == ProvenPart(8)
