"""A ledger's lines vouch for one another: whatever is done to one of them is found at its place."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.storage.uris import Storage, open_storage
from jobs.run.ledger import LEDGER, Ledger, LedgerWriter
from jobs.run.ledger_chain import KEY, Chain, chain_of, encoded, hash_of, head_of

Tampering = Callable[[list[bytes], int], list[bytes]]


def written(losses: list[float]) -> list[bytes]:
    lines: list[bytes] = []
    head: str | None = None
    for step, loss in enumerate(losses, start=1):
        lines.append(encoded({"time": 1.0, "step": step, "loss": loss}, head))
        head = hash_of(lines[-1])
    return lines


def edited(lines: list[bytes], at: int) -> list[bytes]:
    fields = json.loads(lines[at]) | {"loss": -1.0}
    return [*lines[:at], json.dumps(fields).encode(), *lines[at + 1 :]]


def reformatted(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at].replace(b": ", b":"), *lines[at + 1 :]]


def dropped(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], *lines[at + 1 :]]


def moved(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]


def repeated(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[: at + 1], lines[at], *lines[at + 1 :]]


def without_hash(lines: list[bytes], at: int) -> list[bytes]:
    fields = json.loads(lines[at + 1])
    del fields[KEY]
    return [*lines[: at + 1], json.dumps(fields).encode(), *lines[at + 2 :]]


def of_another_run(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[: at + 1], *written([7.0, 8.0, 9.0])]


@given(
    st.lists(st.floats(0, 9), min_size=4, max_size=9),
    st.integers(0, 2),
    st.sampled_from([edited, reformatted, dropped, moved, repeated, without_hash, of_another_run]),
)
def test_whatever_is_done_to_a_line_is_found_there(
    losses: list[float], at: int, tampering: Tampering
) -> None:
    lines = written(losses)
    assert chain_of(lines).problems == ()
    spoiled = tampering(lines, at)
    assert spoiled != lines
    problems = chain_of(spoiled).problems
    assert problems
    place = int(problems[0].split()[1])
    assert at + 1 <= place <= at + 2


def test_each_place_is_named_in_words() -> None:
    lines = written([1.0, 2.0, 3.0, 4.0])
    first = json.loads(lines[1])[KEY][:12]
    assert chain_of(lines[1:]).problems == (
        f"line 1 was written behind another line ({first}…): the ledger's beginning is missing",
    )
    assert (
        chain_of(dropped(lines, 1)).problems[0].endswith("lines between them are missing or moved")
    )
    assert chain_of(repeated(lines, 1)).problems == (
        "line 3 was written behind line 1: what stands between was not there",
    )
    assert "is the first of a ledger" in chain_of(of_another_run(lines, 1)).problems[0]


def test_what_is_cut_off_at_the_end_shows_by_the_head_alone() -> None:
    lines = written([1.0, 2.0, 3.0])
    short = chain_of(lines[:2])
    assert short.problems == ()
    assert short.head != chain_of(lines).head == head_of(b"\n".join(lines) + b"\n")


@given(st.lists(st.binary().filter(lambda line: b"\n" not in line)), st.sampled_from([b"", b"{"]))
@example([b"", b"a"], b"")
def test_the_head_is_the_hash_of_the_last_whole_line(lines: list[bytes], torn: bytes) -> None:
    whole = b"".join(line + b"\n" for line in lines)
    assert head_of(whole + torn) == (hash_of(lines[-1]) if lines else None)


def test_a_ledger_without_lines_has_no_head() -> None:
    assert chain_of([]) == Chain(0, None, None)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_writers_chain_what_they_append(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bucket = f"s3://{request.getfixturevalue('s3_bucket')}/r" if where == "s3" else str(tmp_path)
    run = open_storage(bucket)
    for attempt in (1, 2):
        writer = LedgerWriter(run)
        writer.event("start", attempt=attempt, step=0)
        writer.step(step=1, loss=0.5)
        writer.close()
    chain = chain_of(content(run).splitlines())
    assert (chain.problems, chain.num_lines, chain.first) == ((), 4, 1)
    assert chain.head == head_of(content(run))
    assert chain.summary == "all 4 lines of the ledger follow one another"
    assert KEY not in Ledger.read(run).lines[0], "it is no field of the line"


def test_an_old_ledger_is_read_and_told_of_and_chained_from_the_next_line_on(
    tmp_path: Path,
) -> None:
    run = open_storage(str(tmp_path))
    old = json.dumps({"time": 1.0, "step": 1, "loss": 2.0}).encode() + b"\n"
    run.write_bytes(LEDGER, old * 2)
    assert len(Ledger.read(run).lines) == 2
    [problem] = chain_of(content(run).splitlines()).problems
    assert problem.startswith("it has no chain: an earlier version of raymill wrote")
    writer = LedgerWriter(run)
    writer.step(step=2, loss=1.0)
    writer.close()
    chain = chain_of(content(run).splitlines())
    assert chain.first == 3
    [problem] = chain.problems
    assert problem.startswith("lines 1 to 2 have no chain")
    spoiled = content(run).replace(b'"loss": 2.0', b'"loss": 2.5')
    assert len(chain_of(spoiled.splitlines()).problems) == 2, (
        "the first chained line vouches for it"
    )


def test_a_line_with_a_name_twice_is_a_problem() -> None:
    """Other readers of JSON take the first one."""
    first, second = written([1.0, 2.0])
    doubled = second.replace(b'"loss"', b'"loss": 0.5, "loss"', 1)
    assert chain_of([first, second]).problems == ()
    [problem] = chain_of([first, doubled]).problems
    assert problem == "line 2 is not as raymill writes it: the key loss occurs twice"


def test_a_torn_last_line_has_no_part_in_the_chain(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path))
    lines = b"\n".join(written([1.0, 2.0])) + b"\n"
    run.write_bytes(LEDGER, lines + b'{"time": 1.0, "st')
    writer = LedgerWriter(run)
    writer.step(step=3, loss=1.0)
    writer.close()
    chain = chain_of(content(run).splitlines())
    assert (chain.problems, chain.num_lines) == ((), 3)


def content(run: Storage) -> bytes:
    return run.read_bytes(LEDGER)
