"""Lines that a signature states are the run, and what stands behind them replaces none of them."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.uris import Storage, open_storage
from jobs.run.ledger import LEDGER, Line
from jobs.run.ledger_chain import encoded, hash_of
from jobs.run.signed_lines import StatedLine, newest_stated_line, shown_ledger, stated_line
from model.signing.signature import TRAINING, SignatureError

BEFORE: list[Line] = [
    {"event": "start", "attempt": 1, "step": 0},
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.0},
    {"event": "checkpoint", "step": 2, "checkpoint": "c"},
]
FINISH: Line = {"event": "finish", "step": 2}


def written(run: Storage, lines: list[Line]) -> list[bytes]:
    chained: list[bytes] = []
    head: str | None = None
    for line in lines:
        chained.append(encoded(line, head))
        head = hash_of(chained[-1])
    run.write_bytes(LEDGER, b"".join(line + b"\n" for line in chained))
    return chained


def stating(*byproducts: Any) -> dict[str, Any]:
    return {"runDetails": {"byproducts": [*byproducts]}}


def named(number: int, line: bytes) -> dict[str, Any]:
    return {"name": f"{LEDGER}, line {number}", "digest": {"sha256": hash_of(line)}}


def signed_run(folder: Path, lines: list[Line], *, number: int) -> Storage:
    """A run of which a statement, whoever signed it, names a line."""
    run = open_storage(str(folder))
    chained = written(run, lines)
    state(run, 2, named(number, chained[number - 1]))
    return run


def state(run: Storage, step: int, line: dict[str, Any]) -> None:
    """Has a checkpoint's statement name a line."""
    payload = base64.b64encode(json.dumps({"predicate": stating(line)}).encode()).decode()
    bundle = json.dumps({"dsseEnvelope": {"payload": payload}})
    run.write_bytes(f"checkpoints/step-{step:09}/{TRAINING}", bundle.encode())


def test_behind_the_end_of_a_signed_run_nothing_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added: list[Line] = [{"step": 2, "loss": 0.5}, {"event": "start", "attempt": 2, "step": 2}]
    run = signed_run(tmp_path, [*BEFORE, FINISH, *added], number=5)
    assert shown_ledger(run).lines == [*BEFORE, FINISH]
    assert " 2 lines behind line 5 of ledger.jsonl" in f" {capsys.readouterr().err}"


def test_the_newest_statement_counts(tmp_path: Path) -> None:
    run = signed_run(tmp_path, BEFORE, number=4)
    for step in (1, 4, 3):
        state(run, step, named(step, b"a"))
    newest = newest_stated_line(run)
    assert newest is not None and newest.number == 4 and newest.sha256 == hash_of(b"a")


def test_what_is_only_added_is_shown_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also behind a signed line that has no step, and where a line itself has none."""
    for number in (1, 5):
        lines: list[Line] = [{"event": "spent", "usd": 1.0}, *BEFORE, {"event": "other"}]
        run = signed_run(tmp_path / str(number), lines, number=number)
        assert shown_ledger(run).lines == lines
    assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_is_shown_and_nothing_before_is_replaced(tmp_path: Path) -> None:
    honest: list[Line] = [
        {"event": "start", "attempt": 2, "step": 2},
        {"step": 3, "loss": 1.5},
        {"event": "validation", "step": 3, "val_loss": 1.6},
    ]
    forged: list[Line] = [
        {"step": 1, "loss": 0.5},
        {"event": "validation", "step": 2, "val_loss": 0.1},
        {"event": "checkpoint", "step": 2, "checkpoint": "other"},
        {"event": "rollback", "step": 3, "first": 1, "last": 2},
    ]
    run = signed_run(tmp_path, [*BEFORE, *honest, *forged], number=4)
    assert shown_ledger(run).lines == [*BEFORE, *honest]
    window: Line = {"event": "rollback", "step": 4, "first": 2, "last": 4}
    run = signed_run(tmp_path / "2", [*BEFORE, *honest, {"step": 4, "loss": 9.0}, window], number=4)
    assert shown_ledger(run).rollbacks == ((3, 4),)
    assert [line["step"] for line in shown_ledger(run).steps] == [1, 2]
    way: Line = {"event": "undecided", "step": 4, "attempt": 2, "generation": 2, "to_step": 0}
    run = signed_run(tmp_path / "3", [*BEFORE, *honest, {"step": 4, "loss": 9.0}, way], number=4)
    assert [line["step"] for line in shown_ledger(run).steps] == [1, 2]


def test_without_a_statement_or_with_another_ledgers_all_lines_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_storage(str(tmp_path / "unsigned"))
    written(run, BEFORE)
    assert newest_stated_line(run) is None
    assert shown_ledger(run).lines == BEFORE
    run = signed_run(tmp_path / "changed", BEFORE, number=4)
    changed = [BEFORE[0], {"step": 1, "loss": 0.1}, *BEFORE[2:]]
    written(run, changed)
    assert shown_ledger(run).lines == changed
    assert "has not the line 4 that its signature states" in capsys.readouterr().err
    run.write_bytes(f"checkpoints/step-000000002/{TRAINING}", b"no JSON")
    assert shown_ledger(run).lines == changed
    assert f"{TRAINING} is passed over" in capsys.readouterr().err


@pytest.mark.parametrize(
    "byproducts",
    [[], [named(1, b"a"), named(2, b"b")], [{"name": "another", "digest": {"sha256": "x"}}], [{}]],
)
def test_exactly_one_line_must_be_stated(byproducts: list[Any]) -> None:
    assert stated_line(stating(named(3, b"c"))) == StatedLine(3, hash_of(b"c"))
    with pytest.raises(SignatureError, match=r"states no line of a ledger\.jsonl"):
        stated_line(stating(*byproducts))
