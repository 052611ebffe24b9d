"""The outline of a ledger answers a new attempt as the whole ledger does, and reads each line once
and few of them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.uris import open_storage
from jobs.run import ledger as ledgers
from jobs.run import ledger_outline
from jobs.run.ledger import LEDGER, Ledger, LedgerWriter, Line
from jobs.run.ledger_outline import MEASUREMENTS, LedgerOutline, last_recorded, last_step
from jobs.workers.failures import why_give_up
from raymill.errors import UserError

STEP: dict[str, Any] = {
    "loss": 2.1,
    "grad_norm": 0.2,
    "world_size": 2,
    "seconds": {"load": 0.1},
    "wall_s": 1.2,
}


def made_lines(rng: random.Random, num_attempts: int) -> Iterator[Line]:
    """Yields a run's lines as its attempts write them: steps that are lost, skipped and rolled
    back, events among them."""
    saved = 0
    for attempt in range(1, num_attempts + 1):
        yield {
            "event": "start",
            "time": 1.0,
            "attempt": attempt,
            "world_size": rng.randint(1, 4),
            "step": saved,
        }
        last = saved + rng.randint(0, 30)
        for step in range(saved + 1, last + 1):
            if rng.random() < 0.05:
                yield {"event": "skip", "time": 1.0, "step": step, "reason": "a spike"}
                continue
            yield {"time": 1.0, "step": step} | STEP
            name = rng.choice([*MEASUREMENTS, "checkpoint", *[""] * 12])
            if name:
                saved = step if name == "checkpoint" else saved
                yield {
                    "event": name,
                    "time": 1.0,
                    "step": step,
                    "checkpoint": f"checkpoints/{step}",
                }
        end = rng.choice(["failure", "rollback", "undecided", "gave_up", ""])
        if end == "rollback" and last > saved:
            yield {"event": end, "time": 1.0, "first": saved + 1, "last": last}
            saved = last
        elif end == "undecided":
            way = {"step": last, "attempt": attempt, "generation": 1, "to_step": saved}
            yield {"event": end, "time": 1.0, **way}
        elif end in ("failure", "gave_up"):
            reason = rng.choice(["an error", "another error", "a third error at 0x7f"])
            yield {"event": end, "time": 1.0, "kind": "raised", "reason": reason}


def answers(ledger: Ledger) -> list[Any]:
    """What an attempt asks of the lines before it."""
    kept = [line for line in ledger.events() if line["event"] not in MEASUREMENTS]
    give_up = [why_give_up(ledger.lines, max_fruitless_attempts=most) for most in (2, 3, 6)]
    return [kept, ledger.rollbacks, ledger.world_sizes, last_recorded(ledger), give_up]


@pytest.mark.parametrize("seed", range(30))
def test_an_outline_answers_as_the_whole_ledger(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read at once, and in turns while the run goes on; in blocks of a few lines, of which the
    longest fills several."""
    monkeypatch.setattr(ledgers, "_BLOCK_BYTES", 500)
    rng = random.Random(seed)
    lines = [*made_lines(rng, rng.randint(0, 12))]
    run = open_storage(str(tmp_path))
    writer, in_turns = LedgerWriter(run), LedgerOutline("a ledger")
    for line in lines:
        fields = dict(line)
        name = fields.pop("event", None)
        writer.event(name, **fields, note="x" * rng.choice([0, 2000])) if name else writer.step(
            **fields
        )
        if rng.random() < 0.1:
            in_turns.add(writer.blocks(start=in_turns.num_bytes))
    whole = Ledger.read(run)
    assert len(whole.lines) == len(lines)
    at_once = LedgerOutline("a ledger").add(writer.blocks(start=0))
    for outline in (at_once, in_turns.add(writer.blocks(start=in_turns.num_bytes))):
        assert answers(outline) == answers(whole)
        assert last_step(outline) == (whole.steps[-1]["step"] if whole.steps else 0)
        num_steps = sum("event" not in line for line in outline.lines)
        assert num_steps <= 1 + len(outline.events())


def test_an_outline_parses_neither_steps_nor_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, parsed = open_storage(str(tmp_path)), []
    parse = ledger_outline.parsed_line

    def counted(line: bytes, uri: str, number: int) -> Line:
        parsed.append(number)
        return parse(line, uri, number)

    monkeypatch.setattr(ledger_outline, "parsed_line", counted)
    writer, outline = LedgerWriter(run), LedgerOutline("a ledger")
    writer.event("start", world_size=2, step=0)
    for step in range(1, 1001):
        writer.step(step=step, **STEP)
        if step % 10 == 0:
            writer.event("phases", step=step, ranks=[])
    read = outline.add(writer.blocks(start=0))
    assert [line["step"] for line in read.lines] == [0, 1000]
    assert parsed == [1, 1100]
    writer.step(step=1001, **STEP)
    read = outline.add(writer.blocks(start=outline.num_bytes))
    assert [line["step"] for line in read.lines] == [0, 1001]
    assert parsed == [1, 1100, 1102]


def test_lines_that_another_program_wrote_in_its_own_way_are_read(tmp_path: Path) -> None:
    lines: list[Line] = [
        {"time": 1.0, "step": 1},
        {"time": 2.0, "event": "rollback", "first": 1, "last": 1},
    ]
    lines += [{"time": 3.0, "step": 2}, {"step": 3, "time": 4.0}]
    for separators in ((",", ":"), (", ", " : ")):
        content = b"".join(
            json.dumps(line, separators=separators).encode() + b"\n" for line in lines
        )
        outline = LedgerOutline("a ledger").add([content])
        assert outline.rollbacks == ((1, 1),)
        assert [line["step"] for line in outline.steps] == [3]


@pytest.mark.parametrize(
    "damaged", [b"\0" * 50, b'{"event": "start", "\xff": 1}', b"7", b"null", b""], ids=repr
)
def test_a_damaged_line_that_counts_is_named(damaged: bytes, tmp_path: Path) -> None:
    step = b'{"time": 1.0, "step": 1, "loss": 2.0}\n'
    content = step + step + damaged + b"\n" + b'{"event": "start", "world_size": 1}\n'
    with pytest.raises(
        UserError, match=r"^a ledger, line 3 is damaged: expected an object of JSON"
    ):
        LedgerOutline("a ledger").add([content])


def test_an_unfinished_last_line_is_no_part_of_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it is."""
    run = open_storage(str(tmp_path))
    for length in (5, 100, 1000):
        monkeypatch.setattr(ledgers, "_BLOCK_BYTES", 50)
        run.write_bytes(LEDGER, b'{"time": 1.0, "step": 1}\n' + b"x" * length)
        writer = LedgerWriter(run)
        assert b"".join(writer.blocks(start=0)) == b'{"time": 1.0, "step": 1}\n'
        writer.step(step=2)
        assert [line["step"] for line in Ledger.read(run).lines] == [1, 2]
        writer.close()
