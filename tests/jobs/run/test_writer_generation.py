"""The fence: writers are numbered, the newest one writes, and a launcher that was replaced no
longer gets a number."""

import threading
from pathlib import Path

import pytest

from cluster.storage.lease import LeaseLostError
from cluster.storage.uris import Storage, open_storage
from jobs.run.ledger import LEDGER, Ledger, LedgerWriter
from jobs.run.ledger_chain import chain_of
from jobs.run.writer_generation import WRITER, Fence
from tests.cluster.fault_proxy import Cut, running_proxy


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "runs/r"))
    return open_storage(f"s3://{request.getfixturevalue('s3_bucket')}/runs/r")


def test_the_newest_writer_is_the_only_one(run: Storage) -> None:
    first = Fence(run, launcher=0)
    first.check()
    second = Fence(run, launcher=0)
    assert (first.generation, second.generation) == (1, 2)
    second.check()
    with pytest.raises(LeaseLostError, match="writer 1 was replaced by writer 2, process"):
        first.check()


def test_attempts_of_a_replaced_launcher_are_turned_away(run: Storage) -> None:
    old = Fence(run, launcher=None).generation
    Fence(run, launcher=old)
    new = Fence(run, launcher=None).generation
    assert new == 3
    with pytest.raises(
        LeaseLostError, match=r"launcher 3 on .* took this run over from launcher 1"
    ):
        Fence(run, launcher=old)
    Fence(run, launcher=new).check()


def test_of_many_at_once_each_gets_a_number_of_its_own(tmp_path: Path) -> None:
    run, fences = open_storage(str(tmp_path)), []
    threads = [
        threading.Thread(target=lambda: fences.append(Fence(run, launcher=0))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fence.generation for fence in fences) == list(range(1, 9))
    max(fences, key=lambda fence: fence.generation).check()


def test_a_lost_answer_costs_a_number_at_most(
    s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_storage(f"s3://{s3_bucket}/r")
    with running_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.script = [Cut(kind="unanswered")]
        fence = Fence(run, launcher=0)
        fence.check()
        assert fence.generation <= 2


def test_a_stale_writer_s_lines_reach_nobody(run: Storage) -> None:
    """The old writer continues like a rank that was stopped meanwhile: it neither writes nor hides
    the new one's lines."""
    old = LedgerWriter(run, Fence(run, launcher=0))
    old.event("start", attempt=1, world_size=1, step=0)
    old.mirror()
    new = LedgerWriter(run, Fence(run, launcher=0))
    new.event("start", attempt=2, world_size=1, step=0)
    new.step(step=1, loss=2.0)
    new.mirror()
    with pytest.raises(LeaseLostError, match="replaced by writer 2"):
        for _ in range(100):  # remotely, its own thread finds out
            old.step(step=1, loss=3.0)
            old.mirror()
    new.step(step=2, loss=1.5)
    new.close()
    ledger = Ledger.read(run)
    assert [line.get("attempt") for line in ledger.events()] == [1, 2]
    assert [line["loss"] for line in ledger.steps] == [2.0, 1.5]
    assert run.exists(WRITER)


def test_what_a_writer_was_about_to_write_when_the_next_one_came_is_in_nobody_s_way(
    tmp_path: Path,
) -> None:
    """It is stopped after it found itself the newest, and goes on after the new one has begun."""
    run = open_storage(str(tmp_path))
    newer: list[LedgerWriter] = []

    class StoppedFence(Fence):
        def check(self) -> None:
            super().check()
            if before:
                newer.append(LedgerWriter(run, Fence(run, launcher=0)))
                newer[0].step(step=1, loss=2.0)

    before: list[bytes] = []
    old = LedgerWriter(run, StoppedFence(run, launcher=0))
    old.event("start", attempt=1, world_size=1, step=0)
    before += old.blocks(start=0)
    old.step(step=1, loss=3.0)
    [new] = newer
    new.step(step=2, loss=1.5)
    content = b"".join(new.blocks(start=0))
    new.close()
    assert content == run.read_bytes(LEDGER) and content.startswith(before[0])
    assert [line["loss"] for line in Ledger.read(run).steps] == [2.0, 1.5]
    assert chain_of(content.splitlines()).problems == ()
