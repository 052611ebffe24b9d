"""The ledger: appended lines read back, torn ends dropped, lost steps superseded, recoveries and
futile attempts counted."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.uris import Storage, open_storage
from jobs.run.ledger import LEDGER, Ledger, LedgerTail, LedgerWriter
from raymill.errors import UserError


def lines_of(*words: tuple[Any, ...]) -> Ledger:
    """A ledger from (time, step) pairs, and (time, "start", attempt, step) for a start."""
    lines: list[dict[str, Any]] = []
    for at, *rest in words:
        if rest[0] == "start":
            _, attempt, step = rest
            lines.append(
                {"event": "start", "time": at, "attempt": attempt, "step": step, "world_size": 2}
            )
        else:
            lines.append({"time": at, "step": rest[0], "loss": at})
    return Ledger(lines)


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "runs/r"))
    return open_storage(f"s3://{request.getfixturevalue('s3_bucket')}/runs/r")


def test_lines_read_back_and_a_later_writer_goes_on(run: Storage) -> None:
    assert Ledger.read(run).lines == []
    first = LedgerWriter(run)
    first.event("start", attempt=1, world_size=3, step=0)
    first.step(step=1, loss=0.1 + 0.2)
    first.event("checkpoint", step=1)
    first.close()
    second = LedgerWriter(run)
    second.event("start", attempt=2, world_size=2, step=1)
    second.close()
    ledger = Ledger.read(run)
    assert [line.get("event") for line in ledger.lines] == ["start", None, "checkpoint", "start"]
    assert ledger.steps[0]["loss"] == 0.1 + 0.2, "the same float, to the bit"
    assert ledger.world_sizes == [3, 2]
    assert [line["step"] for line in ledger.events("start", "checkpoint")] == [0, 1, 1]


def test_a_torn_last_line_is_dropped_and_written_over(run: Storage) -> None:
    whole = json.dumps({"time": 1.0, "step": 1, "loss": 2.0}).encode() + b"\n"
    run.write_bytes(LEDGER, whole + whole[:20])
    assert [line["step"] for line in Ledger.read(run).lines] == [1]
    writer = LedgerWriter(run)
    writer.event("start", attempt=2, world_size=1, step=1)
    writer.close()
    assert run.read_bytes(LEDGER).startswith(whole + b'{"event": "start"')
    assert [line["step"] for line in Ledger.read(run).lines] == [1, 1]
    run.write_bytes(LEDGER, whole[:20])
    assert Ledger.read(run).lines == []


def test_lines_that_somebody_cut_off_meanwhile_are_missed(tmp_path: Path) -> None:
    writer = LedgerWriter(open_storage(str(tmp_path)))
    writer.step(step=1, loss=2.0)
    writer.step(step=2, loss=1.0)
    os.truncate(tmp_path / LEDGER, (tmp_path / LEDGER).stat().st_size - 5)
    with pytest.raises(UserError, match="no end of a line where this process wrote one"):
        list(writer.blocks(start=0))


@pytest.mark.parametrize(
    "damaged", [b"\0" * 50, b'{"step": 2, "\xff": 1}', b"7", b"[]", b"null", b""], ids=repr
)
def test_a_damaged_line_is_named(damaged: bytes, tmp_path: Path) -> None:
    run = open_storage(str(tmp_path))
    whole = b'{"time": 1.0, "step": 1, "loss": 2.0}\n'
    run.write_bytes(LEDGER, whole)
    tail = LedgerTail(run)
    assert len(tail.read()) == 1
    run.write_bytes(LEDGER, whole + damaged + b"\n" + whole)
    for read in (lambda: Ledger.read(run), tail.read):
        with pytest.raises(
            UserError, match=f"^{tmp_path}/{LEDGER}, line 2 is damaged: expected an object of JSON"
        ):
            read()


def test_of_a_step_taken_twice_the_last_line_counts() -> None:
    ledger = lines_of(
        (0, "start", 1, 0), (1, 1), (2, 2), (3, 3), (5, "start", 2, 1), (6, 2), (7, 3), (8, 4)
    )
    assert [(line["step"], line["loss"]) for line in ledger.steps] == [
        (1, 1),
        (2, 6),
        (3, 7),
        (4, 8),
    ]
    assert len(ledger.lines) == 8, "nothing is rewritten"


def gone_back(to_step: int | None, *, attempt: int = 1) -> dict[str, Any]:
    event = {"event": "corruption", "step": 9, "attempt": attempt, "generation": 1}
    return {**event, "to_step": to_step}


def rolled_back(first: int, last: int) -> dict[str, Any]:
    return {"event": "rollback", "step": last, "first": first, "last": last}


def test_what_the_run_has_gone_back_behind_counts_no_longer() -> None:
    """A worker that was wrong had part in it: steps, skips, rollbacks and validations."""
    steps = [{"step": step, "loss": step} for step in (1, 2, 3)]
    skip = {"event": "skip", "step": 4}
    validation = {"event": "validation", "step": 3}
    lines = [*steps, validation, skip, rolled_back(3, 4), {"step": 5}]
    assert Ledger(lines).rollbacks == ((3, 4),)
    assert Ledger([*lines, gone_back(None)]).standing.lines == [*lines, gone_back(None)]
    undone = Ledger([*lines, gone_back(2)])
    assert undone.rollbacks == ()
    assert undone.steps == steps[:2]
    assert undone.standing.lines == [*steps[:2], gone_back(2)]
    assert undone.events("skip") == [skip], "it took place"
    again = Ledger([*undone.lines, {"step": 3, "loss": 7}, {"step": 4, "loss": 8}])
    assert [line["loss"] for line in again.steps] == [1, 2, 7, 8]


def test_rollbacks_from_before_and_after_a_way_back_count() -> None:
    lines = [rolled_back(1, 2), {"step": 3}, gone_back(2), {"step": 3}, rolled_back(3, 5)]
    assert Ledger(lines).rollbacks == ((1, 2), (3, 5))
    assert Ledger([*lines, gone_back(0, attempt=2)]).rollbacks == ()


def test_recoveries_count_lost_steps_and_seconds() -> None:
    ledger = lines_of(
        *((0, "start", 1, 0), (1, 1), (2, 2), (3, 3)),
        *((7, "start", 2, 1), (9.5, 2)),  # steps 2 and 3 were lost
        # None lost; attempt 3 came to nothing
        *((12, "start", 3, 2), (13, "start", 4, 2), (14, 3)),
        (20, "start", 5, 3),  # no step yet
    )
    assert [(stop.attempt, stop.lost_steps, stop.seconds) for stop in ledger.recoveries()] == [
        (2, 2, 6.5),
        (4, 0, 4.5),
    ]
    assert [(stop.attempt, stop.step) for stop in ledger.interruptions()] == [
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 3),
    ]
    assert lines_of((0, "start", 1, 0), (1, "start", 2, 0), (2, 1)).recoveries() == []
