"""A job's log in its run's storage: whole lines in order, bounded, past an outage, for a reader who
comes later."""

import json
import threading
import time
from pathlib import Path

import pytest

from cluster.output import job_log
from cluster.output.job_log import Ended, JobLog, LogReader, Started, launches
from cluster.storage.uris import Storage, open_storage
from tests.cluster.fault_proxy import FaultProxy
from tests.time_limits import limit_s
from tests.waiting import wait_until

STARTED = Started("demo.1", "pretrain", "host", 1.0)
WELL = Ended(0, False, {"loss": 1.5}, 2.0)


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    root = (
        str(tmp_path)
        if request.param == "local"
        else f"s3://{request.getfixturevalue('s3_bucket')}/store"
    )
    return open_storage(root).child("runs/demo")


def text(run: Storage, launch: str) -> str:
    return "".join(LogReader(run, launch).new_text())


def test_a_reader_sees_whole_lines_as_they_come_and_how_it_ended(run: Storage) -> None:
    log = JobLog(run, "first", STARTED)
    assert launches(run) == ["first"]
    reader = LogReader(run, "first")
    assert (reader.started(), reader.ended()) == (STARTED, None)
    seen = ""
    for line in ("one\n", "zwei Ä\n", "three\n"):
        log.write(line.encode())
        wait_until(lambda: run.exists("jobs/first/log-000000000000"))
        log_so_far = seen + line

        def catches_up(log_so_far: str = log_so_far) -> bool:
            nonlocal seen
            seen += "".join(reader.new_text())
            return seen == log_so_far

        wait_until(catches_up)
    log.close(WELL)
    assert reader.ended() == WELL
    assert "".join(reader.new_text()) == ""
    assert text(run, "first") == "one\nzwei Ä\nthree\n"


def test_a_log_is_bounded_and_says_what_it_leaves_out(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_log, "_INTERVAL_S", 0.01)
    log = JobLog(run, "long", STARTED, launch_bytes=3 * (256 << 10))
    lines = [f"{number:07d} {'x' * 1000}\n" for number in range(2500)]  # ten segments
    for number, line in enumerate(lines):
        log.write(line.encode())
        if number % 250 == 0:
            time.sleep(0.05)  # no longer behind than the memory for an outage
    log.close(WELL)
    kept = run.list("jobs/long/log-")
    assert sum(entry.size for entry in kept) <= 4 * (257 << 10)
    shown = text(run, "long").splitlines(keepends=True)
    (left_out,) = [line for line in shown if line.startswith("[")]
    assert left_out.endswith("bytes are left out here]\n")
    at = shown.index(left_out)
    assert shown[:at] == lines[:at] and at > 100  # how it began
    assert shown[at + 1 :] == lines[-(len(shown) - at - 1) :]  # how it ended
    assert int(left_out[1:].split()[0].replace(",", "")) == sum(map(len, lines)) - sum(
        map(len, shown)
    ) + len(left_out)


def test_old_launches_make_room(run: Storage) -> None:
    for number in range(12):
        JobLog(run, f"launch-{number:02d}", STARTED).close(WELL)
    assert launches(run) == [f"launch-{number:02d}" for number in range(2, 12)]
    assert not run.list("jobs/launch-00/")


def test_an_outage_neither_holds_up_the_writer_nor_costs_lines(
    proxy: FaultProxy, s3_bucket: str
) -> None:
    run = open_storage(f"s3://{s3_bucket}/runs/demo")
    log = JobLog(run, "first", STARTED)
    log.write(b"before\n")
    wait_until(lambda: text(run, "first") == "before\n")
    proxy.down = True
    began = time.monotonic()
    for number in range(1000):
        log.write(f"{number} {'y' * 600}\n".encode())
    assert time.monotonic() - began < limit_s(1)
    threading.Timer(3, lambda: setattr(proxy, "down", False)).start()
    log.close(WELL)
    lines = text(run, "first").splitlines()
    assert [line.split()[0] for line in lines] == ["before", *map(str, range(1000))]


def test_a_writer_that_is_cut_off_leaves_what_it_stored(run: Storage) -> None:
    """As with SIGKILL, no end is written, and at most the last lines of an interval are missing."""
    log = JobLog(run, "cut", STARTED)
    log.write(b"stored\n")
    wait_until(lambda: text(run, "cut") == "stored\n")
    assert LogReader(run, "cut").ended() is None
    assert json.loads(run.read_bytes("jobs/cut/started.json"))["job"] == "demo.1"
    log.close(WELL)
